"""The layer with the ragged exchange against the padded one, and what its program exchanges.

CPUs have no ragged all-to-all: here one out of gathers stands in for it, and the real one is
lowered but not compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch
from moe_jax.dispatch import exchange as exchange_room
from moe_jax.parallel.mesh import make_mesh
from tests.layers import ragged_stand_in, small_layer

# Space for all under `dropless` would be the whole buffer, and nothing would go in rounds.
BATCH, LENGTH = 32, 16


@pytest.fixture
def allowed(monkeypatch):
  monkeypatch.setattr(exchange_room, 'RAGGED_PLATFORMS', ('cpu',))


@pytest.fixture
def stand_in(allowed, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_stand_in.ragged_all_to_all)


def draw():
  """Inputs most of which select expert 0, so that slots of others stay empty."""
  inputs = small_layer.draw(small_layer.OPTIONS, BATCH, LENGTH)
  router = inputs.params.router['router'].at[-1, 0].add(2.0)
  return inputs._replace(params=inputs.params._replace(router={'router': router}))


def results(mesh, names, ways):
  """Returns {(dispatcher, exchange): (y, gradients)}, from one program."""

  def loss(x, params, options):
    y, sums = small_layer.apply(inputs._replace(x=x, params=params), mesh, options)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return jnp.sum(y * cotangent) / 16 + small_layer.auxiliary(sums, options), y

  @jax.jit
  def program(x, params):
    found = {}
    for name in names:
      for way in ways:
        options = small_layer.make_options(
          dispatch=name, exchange=way, capacity_factor=None if name == 'dropless' else 1.25
        )
        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params, options)
        found[name, way] = both[0][1], both[1]
    return found

  inputs = draw()
  return jax.device_get(program(inputs.x, inputs.params))


def largest_difference(found, name):
  pairs = zip(
    jax.tree.leaves(found[name, 'padded']), jax.tree.leaves(found[name, 'ragged']), strict=True
  )
  return max(np.abs(a - b).max() / np.abs(a).max() for a, b in pairs)


@pytest.mark.parametrize(('data', 'expert'), [(1, 8), (2, 4)])
def test_outputs_and_gradients_are_those_of_the_padded_exchange(data, expert, stand_in):
  found = results(make_mesh(data, expert), dispatch.DISPATCHERS, dispatch.EXCHANGES)
  for name in dispatch.DISPATCHERS:
    assert largest_difference(found, name) < 1e-6, name


@pytest.mark.parametrize('field', ['output_offsets', 'recv_sizes', 'input_offsets'])
def test_a_wrong_slice_would_be_seen(field, stand_in, monkeypatch):
  def wrong(*arguments):
    there, back = exchange_room.slices_of(*arguments)
    return there, back._replace(**{field: jnp.roll(getattr(back, field), 1)})

  monkeypatch.setattr(dispatch.run, 'slices_of', wrong)
  found = results(make_mesh(2, 4), ('gather',), dispatch.EXCHANGES)
  assert not largest_difference(found, 'gather') < 1e-3


def test_the_program_exchanges_twice_forward_and_twice_more_backward(allowed):
  mesh = make_mesh(2, 4)
  inputs = draw()
  for name in ('gather', 'dropless'):
    options = small_layer.make_options(dispatch=name, exchange='ragged')

    def layer(x, options=options):
      return small_layer.apply(inputs._replace(x=x), mesh, options)[0]

    def exchanges(function):
      return jax.jit(function).lower(inputs.x).as_text().count('@ragged_all_to_all(')

    assert exchanges(layer) == 2, name
    assert exchanges(jax.grad(lambda x, layer=layer: jnp.sum(layer(x) ** 2))) == 4, name


def test_one_device_exchanges_nothing(allowed):
  mesh, inputs = make_mesh(1, 1), draw()

  def text(exchange):
    options = small_layer.make_options(exchange=exchange)
    layer = jax.jit(lambda x: small_layer.apply(inputs._replace(x=x), mesh, options)[0])
    return layer.lower(inputs.x).as_text()

  assert 'ragged' not in text('ragged') and text('ragged') == text('padded')


@pytest.mark.parametrize(
  ('router', 'platforms', 'words'),
  [
    ('top_k', ('gpu', 'tpu'), r"^exchange='ragged': must be padded on cpu: .* only on GPUs"),
    ('soft', ('cpu',), r"^exchange='ragged': must be padded with router soft"),
  ],
)
def test_refuses_devices_and_routers_without_it(router, platforms, words, monkeypatch):
  monkeypatch.setattr(exchange_room, 'RAGGED_PLATFORMS', platforms)
  options = small_layer.make_options(router=router, exchange='ragged')
  with pytest.raises(ValueError, match=words):
    small_layer.apply(draw(), make_mesh(2, 4), options)
