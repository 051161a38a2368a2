"""One result on every mesh: loss, gradients (plain SGD), every sum, and the keep-mask bit for bit.

Four policies, each with the dispatchers, on eight meshes; jitter, group size and balance scopes
vary with the policy. Every mesh at capacity factor 1.0, one device and (2, 4) also at 0.5 and 2.0.
`./launch/test --all` tries each mesh at each capacity factor.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch
from moe_jax.parallel.mesh import make_mesh
from tests import oracle
from tests.layers import small_layer

CAPACITY_FACTORS = (0.5, 1.0, 2.0)
MESHES = [(1, 4), (2, 2), (4, 1), (2, 4), (4, 2), (1, 8), (8, 1)]
RUNS = [
  pytest.param(*mesh, factor, marks=() if factor == 1.0 or mesh == (2, 4) else pytest.mark.all)
  for mesh in MESHES
  for factor in CAPACITY_FACTORS
]
# 16 sequences: 16 groups of one or 8 groups of two; 16 scopes are the sequences.
POLICIES = {
  'token': {'jitter': 0.1, 'group_size': 2, 'balance_scopes': 1, 'renormalize': 'before_drop'},
  'choice': {'jitter': 0.0, 'group_size': 1, 'balance_scopes': 16, 'renormalize': 'after_drop'},
  'priority': {'jitter': 0.1, 'group_size': 1, 'balance_scopes': 2, 'renormalize': 'none'},
  'random': {'jitter': 0.0, 'group_size': 2, 'balance_scopes': 16, 'softmax_order': 'after'},
}
# `dropless` does not look at who has which slot: one policy that keeps by position, one by chance.
CASES = [
  (priority, name)
  for priority in POLICIES
  for name in dispatch.DISPATCHERS
  if name != 'dropless' or priority in ('token', 'random')
]


def options_of(case, capacity_factor):
  priority, name = case
  return small_layer.make_options(
    priority=priority, dispatch=name, capacity_factor=capacity_factor, **POLICIES[priority]
  )


def loss_of(x, params, valid, mesh, options):
  y, sums = small_layer.apply(small_layer.Inputs(x, valid, params), mesh, options)
  cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  task = jnp.sum(y * cotangent) / 16 + jnp.mean(jnp.square(y))
  return task + small_layer.auxiliary(sums, options), (y, sums)


def compute(data, expert, capacity_factor, fetch=np.asarray):
  """Returns loss, y, sums, gradients and keep-mask of every case, from one program."""
  mesh = make_mesh(data, expert)

  @jax.jit
  def program(x, params, valid):
    return {
      case: jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
        x, params, valid, mesh, options_of(case, capacity_factor)
      )
      for case in CASES
    }

  x, valid, params = small_layer.draw(small_layer.OPTIONS)
  results = program(x, params, valid)
  probed = program(x, small_layer.probes(params, 8), valid)
  outcome = {}
  for case, ((loss, (y, sums)), gradients) in results.items():
    whole = (loss, y, sums._asdict(), gradients, probed[case][0][1][0])
    *rest, probe = jax.tree.map(fetch, whole)
    outcome[case] = (*rest, probe != 0)
  return outcome


def compute_all(data, expert):
  """Returns what `compute` does by capacity factor, programs compiled side by side."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    run = functools.partial(compute, data, expert)
    return dict(zip(CAPACITY_FACTORS, pool.map(run, CAPACITY_FACTORS), strict=True))


@pytest.fixture(scope='module')
def one_device():
  return compute_all(1, 1)


def assert_close(actual, wanted, name):
  """At most 1e-5 of the largest element apart."""
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * scale, err_msg=name)


def check_same(actual, wanted):
  loss, y, sums, gradients, keep = actual
  wanted_loss, wanted_y, wanted_sums, wanted_gradients, wanted_keep = wanted
  np.testing.assert_array_equal(keep, wanted_keep)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  assert_close(y, wanted_y, 'y')
  for name, value in wanted_sums.items():
    if name != 'own':
      assert_close(sums[name], value, name)
  names = ['x', 'router', 'w_in', 'w_out']
  for name, gradient, value in zip(
    names, jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
  ):
    assert np.abs(value).max() > 1e-3, name
    assert_close(gradient, value, f'gradient of {name}')


@pytest.mark.parametrize(('data', 'expert', 'capacity_factor'), RUNS)
def test_every_mesh_gives_the_result_of_one_device(data, expert, capacity_factor, one_device):
  for case, result in compute(data, expert, capacity_factor).items():
    check_same(result, one_device[capacity_factor][case])


@pytest.mark.parametrize('capacity_factor', CAPACITY_FACTORS)
@pytest.mark.parametrize('priority', POLICIES)
def test_one_device_gives_the_result_of_the_oracle(priority, capacity_factor, one_device):
  inputs = small_layer.draw(small_layer.OPTIONS)
  for name in [name for case, name in CASES if case == priority]:
    options = options_of((priority, name), capacity_factor)
    _, y, sums, _, keep = one_device[capacity_factor][priority, name]
    layer = small_layer.expected(inputs, options)
    np.testing.assert_array_equal(keep, small_layer.kept_by_expert(layer, 8))
    np.testing.assert_allclose(y, layer.y, rtol=1e-4, atol=1e-5)
    for field, value in layer.sums.items():
      np.testing.assert_allclose(sums[field], value, rtol=1e-5, err_msg=field)


@pytest.mark.parametrize('capacity_factor', CAPACITY_FACTORS)
@pytest.mark.parametrize('priority', POLICIES)
def test_every_dispatcher_gives_the_same_result(priority, capacity_factor, one_device):
  outcome = one_device[capacity_factor]
  for name in [name for case, name in CASES if case == priority]:
    check_same(outcome[priority, name], outcome[priority, 'einsum'])


def test_drops_are_many_at_half_capacity_and_few_at_double(one_device):
  # The comparison above would be empty if nothing, or everything, were dropped.
  valid = small_layer.draw(small_layer.OPTIONS).valid
  for priority in POLICIES:
    shares = [
      one_device[factor][priority, 'gather'][4].sum() / (2 * valid.sum())
      for factor in CAPACITY_FACTORS
    ]
    assert 0.2 < shares[0] < 0.6 < shares[1] < 0.95 < shares[2] + 0.1, shares


@pytest.mark.parametrize('priority', POLICIES)
def test_gradients_match_finite_differences(priority, one_device):
  # The oracle's y and sums, and with them the loss, in float64 along one direction at a time.
  inputs = small_layer.draw(small_layer.OPTIONS)
  options = options_of((priority, 'gather'), 1.0)
  gradients = one_device[1.0][priority, 'gather'][3]
  point = [np.asarray(a, np.float64) for a in jax.tree.leaves((inputs.x, inputs.params))]
  rng = np.random.default_rng(11)

  def loss(x, *params):
    layer = small_layer.expected(
      small_layer.Inputs(x, inputs.valid, small_layer.make_params(*params)), options
    )
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)
    return (
      np.sum(layer.y * cotangent) / 16
      + np.mean(layer.y**2)
      + oracle.load_balancing_loss(layer.sums, 2)
      + 0.1 * oracle.router_z_loss(layer.sums)
      + oracle.importance_loss(layer.sums)
    )

  for i, gradient in enumerate(jax.tree.leaves(gradients)):
    direction = rng.normal(size=gradient.shape)

    def along(value, i=i):
      return loss(*point[:i], value, *point[i + 1 :])

    slope = oracle.central_difference(along, point[i], direction)
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-3, atol=2e-4)
