"""The balanced plan against the published iteration in float64, and the selection from it."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import sinkhorn
from moe_jax.routing.routers.sinkhorn import Options
from tests import oracle

# (S, E, K): one expert, K = E, one token.
SHAPES = ((8, 4, 1), (8, 4, 2), (5, 3, 3), (1, 4, 1))
TOLERANCE = 1e-5


@functools.partial(jax.jit, static_argnums=2)
def choose(logits, valid, options):
  """The router matrix is the identity, so that the tokens are the logits."""
  group, size, num_experts = logits.shape
  index = jnp.zeros((group, size), jnp.int32)
  keys = jax.random.split(jax.random.key(0), group)
  inputs = RouterInputs(tokens=logits, valid=valid, token_ids=index, positions=index, keys=keys)
  return sinkhorn.ROUTER.choose({'router': jnp.eye(num_experts)}, {}, inputs, options)


@jax.jit
def plan_of(logits, valid):
  """Returns rows * cost * columns of one group."""
  cost = sinkhorn.normalized_cost(logits, valid)
  scales = sinkhorn.sinkhorn(cost, valid, tolerance=TOLERANCE)
  return scales.rows[:, None] * cost * scales.columns[None, :]


def options_for(num_experts, k, **changes):
  renormalize = 'none' if k == 1 else 'before_drop'
  settings = {'renormalize': renormalize, 'assignment_tolerance': TOLERANCE, **changes}
  return Options(num_experts, k, **settings)


def published(logits, tolerance=TOLERANCE):
  """The iteration as published, on exp(logits) as it is; all tokens valid."""
  cost = np.exp(np.asarray(logits, np.float64))
  size, num_experts = cost.shape
  d1 = np.ones(num_experts)
  while True:
    d0 = 1 / (size * (cost @ d1 + 1e-8))
    scaled = 1 / (num_experts * (d0 @ cost + 1e-8))
    change, d1 = np.abs(scaled - d1).mean(), scaled
    if change <= tolerance:
      return d0[:, None] * cost * d1


def gates_of(row, experts, renormalize):
  if len(experts) == 1:
    return 1 / (1 + np.exp(-np.asarray(row, np.float64)[experts]))
  gates = oracle.softmax(row)[experts]
  return gates / gates.sum() if renormalize == 'before_drop' else gates


@st.composite
def groups(draw):
  size, num_experts, k = draw(st.sampled_from(SHAPES))
  row = st.lists(st.integers(-2, 2), min_size=num_experts, max_size=num_experts)
  logits = [[draw(row) for _ in range(size)] for _ in range(2)]
  valid = [draw(st.lists(st.booleans(), min_size=size, max_size=size)), [True] * size]
  return np.array(logits, np.float32), np.array(valid), k


@hypothesis.given(groups())
def test_matches_the_oracle(drawn):
  logits, valid, k = drawn
  num_experts = logits.shape[-1]
  choice = choose(logits, valid, options_for(num_experts, k))
  assert np.all(choice.chosen)
  assert choice.sums == {}
  np.testing.assert_allclose(choice.router_probs, oracle.softmax(logits), rtol=2e-6)
  for g in range(2):
    rows = np.flatnonzero(valid[g])
    if not rows.size:
      continue
    expected = published(logits[g, rows])
    plan = plan_of(logits[g], valid[g])
    np.testing.assert_allclose(plan[rows], expected, rtol=2e-3)
    np.testing.assert_array_equal(plan[~valid[g]], 0)
    for s, row in zip(rows, expected, strict=True):
      experts = np.asarray(choice.expert_index[g, s])
      assert len(set(experts)) == k
      # As large as the largest ones; equal ones can differ by rounding here or there.
      np.testing.assert_allclose(row[experts], np.sort(row)[::-1][:k], rtol=4e-3)
      gates = gates_of(logits[g, s], experts, 'before_drop')
      np.testing.assert_allclose(choice.gates[g, s], gates, rtol=5e-6)


def test_the_plan_has_its_marginals():
  rng = np.random.default_rng(0)
  valid = np.ones(8, bool)
  valid[2:4] = False
  plan = plan_of(rng.normal(size=(8, 4)).astype(np.float32) * 2, valid)
  np.testing.assert_allclose(np.sum(plan, axis=1), np.where(valid, 1 / 6, 0), rtol=1e-4)
  np.testing.assert_allclose(np.sum(plan, axis=0), 1 / 4, rtol=1e-5)


def test_ends_when_experts_are_far_from_balanced():
  rng = np.random.default_rng(6)
  logits = (rng.normal(size=(64, 4)) + np.array([9.0, 3.0, 0.0, -9.0])).astype(np.float32)
  valid = np.ones(64, bool)
  cost = sinkhorn.normalized_cost(jnp.asarray(logits), jnp.asarray(valid))
  run = jax.jit(functools.partial(sinkhorn.sinkhorn, tolerance=1e-4), static_argnames='max_rounds')
  first, all_rounds = (run(cost, valid, max_rounds=n) for n in (60, 500))
  # Columns in the thousands: their rounding alone is above 1e-4.
  assert all_rounds.columns.max() > 1000
  np.testing.assert_array_equal(first.columns, all_rounds.columns)
  plan = all_rounds.rows[:, None] * cost * all_rounds.columns[None, :]
  np.testing.assert_allclose(np.sum(plan, axis=1), 1 / 64, rtol=1e-2)
  np.testing.assert_allclose(np.sum(plan, axis=0), 1 / 4, rtol=1e-3)


def test_a_constant_added_to_a_row_leaves_the_plan():
  rng = np.random.default_rng(1)
  logits, valid = rng.normal(size=(8, 4)).astype(np.float32), np.ones(8, bool)
  moved = (logits + np.linspace(-300, 300, 8)[:, None]).astype(np.float32)
  np.testing.assert_allclose(plan_of(moved, valid), plan_of(logits, valid), rtol=2e-3)
  # The published iteration, without the division, agrees as far as exp goes.
  np.testing.assert_allclose(
    published(logits + np.linspace(-3, 3, 8)[:, None]), published(logits), rtol=2e-3
  )


def test_by_hand():
  # cost = [[1, 1], [1, 1/3]] after dividing row 0 by its largest. Try rows (a, b), columns (c, d) =
  # (1, sqrt 3) up to scale: row 0 is proportional to (1, sqrt 3), row 1 to (1, sqrt 3 / 3) =
  # (sqrt 3, 1). Both sum to 1/2 with weights 1 / (2 (1 + sqrt 3)), and then so do the columns.
  # So token 0, whose logits are equal, goes to expert 1, and token 1 to expert 0.
  logits = np.log(np.array([[2.0, 2.0], [3.0, 1.0]], np.float32))
  valid = np.ones(2, bool)
  root = np.sqrt(3)
  expected = np.array([[1, root], [root, 1]]) / (2 * (1 + root))
  np.testing.assert_allclose(plan_of(logits, valid), expected, rtol=1e-4)
  choice = choose(logits[None], valid[None], options_for(2, 1, gate_scale=2.0))
  np.testing.assert_array_equal(choice.expert_index[0, :, 0], [1, 0])
  # sigmoid(ln 2) = 2/3, sigmoid(ln 3) = 3/4.
  np.testing.assert_allclose(choice.gates[0, :, 0], [4 / 3, 3 / 2], rtol=1e-6)
  evaluation = choose(logits[None], valid[None], options_for(2, 1, training=False))
  np.testing.assert_array_equal(evaluation.expert_index[0, :, 0], [0, 0])
  np.testing.assert_allclose(evaluation.gates[0, :, 0], [2 / 3, 3 / 4], rtol=1e-6)


def test_balances_better_than_top_k():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(1, 64, 8)).astype(np.float32)
  logits += (2 * rng.normal(size=8)).astype(np.float32)
  valid = np.ones((1, 64), bool)

  def largest(training):
    choice = choose(logits, valid, options_for(8, 1, training=training))
    return np.bincount(choice.expert_index.ravel(), minlength=8).max()

  assert largest(training=False) > 24
  assert largest(training=True) < 16


@pytest.mark.parametrize(('k', 'renormalize'), [(1, 'none'), (2, 'none'), (2, 'before_drop')])
def test_gradient_of_the_gates(k, renormalize):
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(1, 8, 4)).astype(np.float32)
  cotangent, direction = rng.normal(size=(8, k)), rng.normal(size=logits.shape)
  valid, options = np.ones((1, 8), bool), options_for(4, k, renormalize=renormalize)
  experts = np.argsort(-published(logits[0]), axis=-1)[:, :k]
  np.testing.assert_array_equal(choose(logits, valid, options).expert_index[0], experts)

  def gates(z):
    return jnp.sum(choose(z, valid, options).gates[0] * cotangent)

  def expected(z):
    return sum(gates_of(z[0, s], experts[s], renormalize) @ cotangent[s] for s in range(8))

  slope = np.sum(np.asarray(jax.grad(gates)(logits), np.float64) * direction)
  np.testing.assert_allclose(
    slope, oracle.central_difference(expected, logits, direction), rtol=1e-3
  )


@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize(
  ('logits', 'valid'),
  [
    (np.zeros((1, 8, 4)), np.ones((1, 8))),
    (np.broadcast_to([95.0, 0, 0, -95], (1, 8, 4)), np.ones((1, 8))),
    (np.zeros((1, 8, 4)), np.zeros((1, 8))),
    (np.zeros((1, 1, 4)), np.ones((1, 1))),
  ],
  ids=['equal', 'collapsed', 'padding', 'one_token'],
)
def test_degenerate(logits, valid, k):
  logits, valid = logits.astype(np.float32), valid.astype(bool)
  options = options_for(4, k)

  def gates(z):
    choice = choose(z, valid, options)
    return jnp.sum(choice.gates[..., 0]), choice

  (_, choice), grads = jax.value_and_grad(gates, has_aux=True)(logits)
  assert np.all(np.isfinite(grads))
  assert np.all(np.isfinite(choice.gates))
  if not np.any(logits):
    np.testing.assert_array_equal(
      choice.expert_index, np.broadcast_to(np.arange(k), (1, *choice.gates.shape[1:]))
    )


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_ends_on_logits_that_are_not_finite(bad):
  logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  logits[0, 2, 1] = bad
  logits[0, 5] = bad
  expert_index = np.asarray(choose(logits, np.ones((1, 8), bool), options_for(4, 2)).expert_index)
  assert expert_index.min() >= 0
  assert expert_index.max() < 4


def test_content_of_padding_changes_nothing():
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(2, 8, 4)).astype(np.float32)
  valid = rng.random((2, 8)) < 0.6
  other = np.where(valid[..., None], logits, 9 * rng.normal(size=logits.shape)).astype(np.float32)
  one, two = (choose(z, valid, options_for(4, 2)) for z in (logits, other))
  np.testing.assert_array_equal(one.expert_index[valid], two.expert_index[valid])
  np.testing.assert_array_equal(one.gates[valid], two.gates[valid])


def test_a_later_token_takes_the_place_of_an_earlier_one():
  valid = np.ones((1, 2), bool)
  logits = np.array([[[1.0, 0.0], [0.0, 1.0]]], np.float32)
  later = np.array([[[1.0, 0.0], [5.0, 0.0]]], np.float32)
  assert not sinkhorn.ROUTER.causal
  assert choose(logits, valid, options_for(2, 1)).expert_index[0, 0, 0] == 0
  assert choose(later, valid, options_for(2, 1)).expert_index[0, 0, 0] == 1


def test_allowed():
  assert sinkhorn.allowed(options_for(4, 1)) is None
  assert sinkhorn.allowed(options_for(4, 2)) is None
  assert sinkhorn.allowed(options_for(4, 1, renormalize='before_drop'))[0] == 'renormalize'
