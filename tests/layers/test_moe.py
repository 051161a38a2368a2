"""The MoE layer against the oracle and against what must hold whatever the numbers are."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import moe, moe_layer
from moe_jax.layers.basic import Mlp
from moe_jax.parallel.mesh import make_mesh
from moe_jax.routing import groups, sizes
from tests import oracle
from tests.layers import small_layer

ONE = (1, 1)


@pytest.mark.parametrize(
  ('batch', 'length', 'mesh', 'changes'),
  [
    (4, 8, (2, 2), {'activation': 'gelu', 'group_size': 1}),
    (4, 8, ONE, {'group_size': 4, 'priority': 'choice', 'capacity_factor': 0.5}),
    (4, 5, ONE, {'group_size': 2, 'capacity_factor': None, 'renormalize': 'none'}),
    (4, 6, (1, 2), {'num_selected_experts': 8, 'renormalize': 'after_drop'}),
    (4, 7, (1, 4), {'num_selected_experts': 1, 'renormalize': 'none', 'capacity_factor': 1.25}),
    (1, 1, ONE, {'capacity_factor': 1.25}),
    (1, 3, ONE, {'capacity_factor': 8.0, 'softmax_order': 'after'}),
  ],
)
def test_matches_the_oracle(batch, length, mesh, changes):
  options = small_layer.make_options(**changes)
  small_layer.check_layer(small_layer.draw(options, batch, length), make_mesh(*mesh), options)


@pytest.mark.parametrize('winner', [None, 3])
def test_equal_logits_and_one_expert_that_wins_all(winner):
  # Router weights 0: all tie, experts 0 and 1 get every token. Else expert 3 is everyone's first.
  options = small_layer.make_options(capacity_factor=1.0, priority='choice')
  inputs = small_layer.draw(options, batch=2)
  router = jnp.zeros_like(inputs.params.router['router'])
  if winner is not None:
    router = router.at[-1, winner].set(50.0)
  inputs = inputs._replace(params=inputs.params._replace(router={'router': router}))
  small_layer.check_layer(inputs, make_mesh(*ONE), options)

  def loss(x, params):
    y, sums = small_layer.apply(inputs._replace(x=x, params=params), make_mesh(*ONE), options)
    return jnp.sum(jnp.square(y)) + small_layer.auxiliary(sums, options)

  gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(inputs.x, inputs.params)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def outcome(inputs, options, mesh):
  """Y on valid tokens, sums, and gradients of a loss over them."""

  def loss(x, params):
    y, sums = small_layer.apply(inputs._replace(x=x, params=params), mesh, options)
    return jnp.mean(jnp.square(y)) + small_layer.auxiliary(sums, options), (y, sums)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(inputs.x, inputs.params)


@pytest.mark.parametrize('dispatch', ['gather', 'dropless', 'einsum'])
def test_content_of_padding_changes_nothing(dispatch):
  # Batch priority looks at probabilities and could be tempted by sure padding.
  options = small_layer.make_options(priority='priority', dispatch=dispatch, group_size=2)
  mesh = make_mesh(1, 2)
  inputs = small_layer.draw(options, batch=8)
  noise = 30 * jax.random.normal(jax.random.key(1), inputs.x.shape)
  other = inputs._replace(x=jnp.where(inputs.valid[..., None], inputs.x, noise))
  first, second = outcome(inputs, options, mesh), outcome(other, options, mesh)
  np.testing.assert_equal(jax.tree.map(np.asarray, first), jax.tree.map(np.asarray, second))
  (_, (y, sums)), (of_x, _) = first
  padding = ~np.asarray(inputs.valid)
  assert padding.any()
  np.testing.assert_array_equal(y[padding], 0)
  np.testing.assert_array_equal(of_x[padding], 0)
  assert sums.tokens.sum() == inputs.valid.sum()


@pytest.mark.parametrize('activation', ['swiglu', 'gelu'])
def test_equal_experts_without_drops_are_one_dense_layer(activation):
  # y = sum_k w_k f(x) = f(x), since renormalised gates sum to 1.
  options = small_layer.make_options(activation=activation, capacity_factor=None)
  inputs = small_layer.draw(options, batch=4)
  w_in, w_out = inputs.params.w_in[0], inputs.params.w_out[0]
  equal = inputs.params._replace(
    w_in=jnp.broadcast_to(w_in, inputs.params.w_in.shape),
    w_out=jnp.broadcast_to(w_out, inputs.params.w_out.shape),
  )
  inputs = inputs._replace(params=equal, valid=jnp.ones_like(inputs.valid))
  y, sums = jax.jit(lambda i: small_layer.apply(i, make_mesh(1, 4), options))(inputs)
  dense = Mlp(options.mlp_dim, activation).apply(
    {'params': {'w_in': w_in, 'w_out': w_out}}, inputs.x
  )
  np.testing.assert_allclose(y, dense, rtol=1e-5, atol=1e-6)
  assert sums.kept_per_expert.sum() == 2 * inputs.valid.size


def router_slope(options, inputs, direction):
  """Slope of the task loss, sum of y times a fixed cotangent, along a change of the router."""
  cotangent = np.cos(np.arange(inputs.x.size)).reshape(inputs.x.shape)

  def loss(router):
    params = inputs.params._replace(router={'router': router})
    y, _ = small_layer.apply(inputs._replace(params=params), make_mesh(1, 2), options)
    return jnp.sum(y * cotangent)

  gradient = jax.jit(jax.grad(loss))(inputs.params.router['router'])

  def expected(router):
    params = inputs.params._replace(router={'router': router})
    return np.sum(small_layer.expected(inputs._replace(params=params), options).y * cotangent)

  slope = oracle.central_difference(expected, inputs.params.router['router'], direction)
  return np.sum(np.asarray(gradient) * direction), slope


@pytest.mark.parametrize(
  'changes',
  [
    {'num_selected_experts': 1, 'renormalize': 'none'},
    {'renormalize': 'before_drop'},
    {'renormalize': 'after_drop', 'capacity_factor': 0.5},
  ],
)
def test_router_learns_from_the_task(changes):
  options = small_layer.make_options(**{'capacity_factor': None, **changes})
  inputs = small_layer.draw(options, batch=4)
  direction = np.random.default_rng(2).normal(size=inputs.params.router['router'].shape)
  slope, expected = router_slope(options, inputs, direction)
  assert abs(expected) > 0.05
  np.testing.assert_allclose(slope, expected, rtol=1e-3)


def test_counts_are_the_same_under_remat():
  options = small_layer.make_options(jitter=0.1, priority='random', capacity_factor=0.5)
  inputs = small_layer.draw(options, batch=4)

  def loss(params, layer):
    y, sums = layer(inputs._replace(params=params))
    return jnp.sum(jnp.square(y)) + small_layer.auxiliary(sums, options), sums

  def layer(inputs):
    return small_layer.apply(inputs, make_mesh(1, 2), options)

  plain, again = (
    jax.jit(jax.value_and_grad(functools.partial(loss, layer=f), has_aux=True))(inputs.params)
    for f in (layer, jax.checkpoint(layer))
  )
  np.testing.assert_equal(
    jax.tree.map(np.asarray, plain[0][1]), jax.tree.map(np.asarray, again[0][1])
  )
  for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_narrow_tokens_are_routed_in_float32():
  # The same rounded tokens give the same logits, so the same sums, in both dtypes.
  options = small_layer.make_options()
  inputs = small_layer.draw(options, batch=4)
  narrow = inputs.x.astype(jnp.bfloat16)
  run = jax.jit(lambda x: small_layer.apply(inputs._replace(x=x), make_mesh(1, 2), options))
  y, sums = run(narrow)
  _, wide_sums = run(narrow.astype(jnp.float32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_equal(jax.tree.map(np.asarray, sums), jax.tree.map(np.asarray, wide_sums))
  assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype('float32')}


def test_groups_stand_in_order_of_position():
  # Two sequences a and b: a0 b0 a1 b1 a2 b2.
  x = jnp.array([[[0], [1], [2]], [[10], [11], [12]]], jnp.float32)
  grouped = groups.to_groups(x, 2)
  np.testing.assert_array_equal(grouped[0, :, 0], [0, 10, 1, 11, 2, 12])
  np.testing.assert_array_equal(groups.from_groups(grouped, 2), x)


@pytest.mark.parametrize(
  ('mesh', 'batch', 'changes', 'message'),
  [
    ((1, 4), 4, {'num_experts': 6}, 'num_experts=6.*expert axis of 4'),
    ((2, 2), 6, {}, 'batch_size=6.*4 devices x 1'),
    ((2, 2), 4, {'group_size': 2}, 'batch_size=4.*4 devices x 2'),
    ((1, 1), 4, {'balance_scopes': 3}, 'balance_scopes=3.*4 routing groups'),
  ],
)
def test_what_does_not_divide_is_an_error(mesh, batch, changes, message):
  options = small_layer.make_options(**changes)
  with pytest.raises(ValueError, match=message):
    small_layer.apply(small_layer.draw(options, batch), make_mesh(*mesh), options)


@pytest.mark.parametrize(('factor', 'slots'), [(None, 16), (0.5, 2), (1.25, 5), (100.0, 16)])
def test_capacity_of_a_group(factor, slots):
  # S = 16, K = 2, E = 8: 4 slots per unit of the factor, never more than the S that can be filled.
  assert moe_layer.sizes_of(small_layer.make_options(capacity_factor=factor), 16).capacity == slots


def module_and_params(options):
  module = moe.Moe(options, make_mesh(1, 2), small_layer.VOCAB_SIZE)
  inputs = small_layer.draw(options, batch=4)
  init = jax.jit(module.init, static_argnums=3)
  variables = init(jax.random.key(0), inputs.x, small_layer.info_of(inputs.valid), True)
  return module, inputs, nn.unbox(variables)


def test_module_evaluates_without_a_random_stream():
  options = small_layer.make_options(jitter=0.3, priority='random', capacity_factor=0.5)
  module, inputs, params = module_and_params(options)
  info = small_layer.info_of(inputs.valid)
  apply = jax.jit(module.apply, static_argnums=3)
  y = apply(params, inputs.x, info, True).y
  np.testing.assert_array_equal(y, apply(params, inputs.x, info, True)[0])
  draws = [
    apply(params, inputs.x, info, False, rngs={'routing': jax.random.key(seed)})[0]
    for seed in (1, 1, 2)
  ]
  np.testing.assert_array_equal(draws[0], draws[1])
  assert not np.array_equal(draws[0], draws[2])
  with pytest.raises(flax.errors.InvalidRngError, match='routing'):
    module.apply(params, inputs.x, info, False)


def test_module_starts_each_expert_with_the_variance_of_a_dense_layer():
  # fan-in D = 8 for w_in and F = 64 for w_out, the expert dimension left out; router 0.1 / D.
  options = small_layer.make_options(num_experts=8, mlp_dim=64)
  params = module_and_params(options)[2]['params']
  for name, variance in (('router', 0.1 / 8), ('w_in', 1 / 8), ('w_out', 1 / 64)):
    size = params[name].size
    np.testing.assert_allclose(
      np.var(params[name]), variance, rtol=5 * np.sqrt(2 / size), err_msg=name
    )
    assert params[name].dtype == jnp.float32


def test_control_capacity_off_by_one_is_noticed(monkeypatch):
  options = small_layer.make_options()
  inputs = small_layer.draw(options, batch=4)
  small_layer.check_layer(inputs, make_mesh(1, 2), options)
  original = sizes.expert_capacity
  monkeypatch.setattr(sizes, 'expert_capacity', lambda *numbers: original(*numbers) - 1)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    small_layer.check_layer(inputs, make_mesh(1, 2), options)


def test_control_a_missing_sum_over_devices_is_refused(monkeypatch):
  options = small_layer.make_options()
  inputs = small_layer.draw(options, batch=4)
  monkeypatch.setattr(jax.lax, 'psum', lambda sums, axes: sums)
  with pytest.raises(ValueError, match='out_specs'):
    small_layer.check_layer(inputs, make_mesh(1, 2), options)


def test_control_a_doubled_sum_over_devices_is_noticed(monkeypatch):
  options = small_layer.make_options()
  inputs = small_layer.draw(options, batch=4)
  original = jax.lax.psum

  def doubled(sums, axes):
    return jax.tree.map(lambda leaf: 2 * leaf, original(sums, axes))

  monkeypatch.setattr(jax.lax, 'psum', doubled)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    small_layer.check_layer(inputs, make_mesh(1, 2), options)
