"""The collectives of the compiled layer, counted: nothing moves that need not."""

import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax.parallel.mesh import BATCH_AXES, EXPERT_AXIS, make_mesh
from tests.layers import small_layer

COLLECTIVES = ('all-to-all', 'all-gather', 'collective-permute', 'reduce-scatter', 'all-reduce')


def count(text):
  return {name: len(re.findall(rf'= \S.* {name}(?:-start)?\(', text)) for name in COLLECTIVES}


def place(inputs, mesh):
  """Puts the batch on both axes, the experts on theirs, as in training."""

  def put(array, *axes):
    spec = jax.sharding.PartitionSpec(*axes)
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))

  params = inputs.params._replace(
    router={'router': put(inputs.params.router['router'])},
    w_in=put(inputs.params.w_in, EXPERT_AXIS),
    w_out=put(inputs.params.w_out, EXPERT_AXIS),
  )
  return inputs._replace(
    x=put(inputs.x, BATCH_AXES), valid=put(inputs.valid, BATCH_AXES), params=params
  )


@pytest.mark.parametrize(('data', 'expert'), [(1, 1), (1, 4), (2, 4)])
def test_gradients_of_experts_are_summed_over_data_alone(data, expert):
  mesh = make_mesh(data, expert, jax.devices()[: data * expert])
  options = small_layer.make_options()
  inputs = place(small_layer.draw(options), mesh)

  def loss(params):
    return jnp.sum(jnp.square(small_layer.apply(inputs._replace(params=params), mesh, options)[0]))

  text = jax.jit(jax.grad(loss)).lower(inputs.params).compile().as_text()
  reduced = [line for line in text.splitlines() if ' all-reduce(' in line]
  local = (options.num_experts // expert, options.mlp_dim, small_layer.WIDTH)
  of_experts = [line for line in reduced if f'f32[{",".join(map(str, local))}]' in line]
  # A sum over one device would copy the gradients of all experts.
  assert bool(of_experts) == (data > 1), reduced


def test_forward_exchanges_twice_and_backward_twice_more():
  mesh = make_mesh(2, 4)
  options = small_layer.make_options()
  inputs = place(small_layer.draw(options), mesh)

  def layer(x, params):
    return small_layer.apply(inputs._replace(x=x, params=params), mesh, options)

  def loss(x, params):
    y, sums = layer(x, params)
    return jnp.sum(jnp.square(y)) + small_layer.auxiliary(sums, options)

  def compiled(function):
    return jax.jit(function).lower(inputs.x, inputs.params).compile().as_text()

  forward = count(compiled(layer))
  assert forward['all-to-all'] == 2
  both = count(compiled(jax.grad(loss, argnums=(0, 1))))
  assert both['all-to-all'] == 4
  for counted in (forward, both):
    assert counted['all-gather'] == counted['collective-permute'] == 0, counted
    assert counted['reduce-scatter'] == 0, counted
    # The sums of the router, and in the backward pass those of the gradients.
    assert counted['all-reduce'] > 0, counted
