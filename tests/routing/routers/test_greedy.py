"""Deferred acceptance against the serial definition, pair by pair."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import greedy
from moe_jax.routing.routers.greedy import Options
from tests import oracle

# (S, E, K, C): scarce and ample, K = E, one token, more places than tokens.
SHAPES = ((8, 4, 1, 2), (8, 5, 2, 2), (6, 3, 2, 4), (5, 3, 3, 2), (1, 4, 2, 3))

assign = jax.jit(greedy.greedy_assignment, static_argnames=('num_selected_experts', 'capacity'))


@functools.partial(jax.jit, static_argnums=2)
def choose(logits, valid, options):
  """The router matrix is the identity, so that the tokens are the logits."""
  group, size, num_experts = logits.shape
  index = jnp.zeros((group, size), jnp.int32)
  keys = jax.random.split(jax.random.key(0), group)
  inputs = RouterInputs(tokens=logits, valid=valid, token_ids=index, positions=index, keys=keys)
  return greedy.ROUTER.choose({'router': jnp.eye(num_experts)}, {}, inputs, options)


def serial(scores, valid, k, capacity):
  """Returns the experts of each token in the order in which it got them; NaN is below -inf."""
  size, num_experts = scores.shape
  pairs = [
    (bool(np.isnan(scores[s, e])), 0 if np.isnan(scores[s, e]) else -scores[s, e], s, e)
    for s in range(size)
    if valid[s]
    for e in range(num_experts)
  ]
  experts, count = [[] for _ in range(size)], [0] * num_experts
  for _, _, s, e in sorted(pairs):
    if len(experts[s]) < k and count[e] < capacity:
      experts[s].append(e)
      count[e] += 1
  return experts


def expected_gates(row, experts, renormalize):
  gates = oracle.softmax(row)[experts]
  return gates / gates.sum() if renormalize == 'before_drop' and len(experts) else gates


def taken(expert_index, chosen):
  return [list(row[ok]) for row, ok in zip(expert_index, chosen, strict=True)]


def without_padding(experts, valid):
  return [row if ok else [] for row, ok in zip(experts, valid, strict=True)]


@st.composite
def groups(draw):
  shape = draw(st.sampled_from(SHAPES))
  size, num_experts = shape[:2]
  row = st.lists(st.integers(-2, 2), min_size=num_experts, max_size=num_experts)
  scores = [[draw(row) for _ in range(size)] for _ in range(2)]
  valid = [draw(st.lists(st.booleans(), min_size=size, max_size=size)), [True] * size]
  return np.array(scores, np.float32), np.array(valid), shape[2], shape[3]


@hypothesis.given(groups())
def test_matches_the_oracle(drawn):
  scores, valid, k, capacity = drawn
  expert_index, chosen = assign(scores, valid, num_selected_experts=k, capacity=capacity)
  assert not np.any(chosen[~valid])
  for g in range(2):
    expected = serial(scores[g], valid[g], k, capacity)
    assert taken(np.asarray(expert_index[g]), np.asarray(chosen[g])) == expected


def test_matches_the_oracle_over_many_rounds():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(2, 40, 8)).astype(np.float32)
  # All tokens rank the experts alike: rejections run through them one after the other.
  scores[1] = rng.normal(size=(40, 1)) * 0.01 - np.arange(8)
  valid = np.ones((2, 40), bool)
  expert_index, chosen = assign(scores, valid, num_selected_experts=2, capacity=10)
  for g in range(2):
    expected = serial(scores[g], valid[g], 2, 10)
    assert taken(np.asarray(expert_index[g]), np.asarray(chosen[g])) == expected


@hypothesis.given(groups(), st.integers(0, 50))
def test_scores_that_are_not_finite(drawn, seed):
  scores, valid, k, capacity = drawn
  rng = np.random.default_rng(seed)
  odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0], np.float32)
  scores = np.where(rng.random(scores.shape) < 0.6, rng.choice(odd, scores.shape), scores)
  expert_index, chosen = assign(scores, valid, num_selected_experts=k, capacity=capacity)
  for g in range(2):
    expected = serial(scores[g], valid[g], k, capacity)
    assert taken(np.asarray(expert_index[g]), np.asarray(chosen[g])) == expected
  # Also what is not chosen is a different expert each.
  assert np.all(np.diff(np.sort(expert_index, axis=-1), axis=-1) > 0)


def test_by_hand():
  # Places: 1 per expert, K = 1. Pairs by probability: token 1 at expert 0 (.8), token 0 at expert 0
  # (.6, full), token 2 at expert 1 (.5), token 0 at expert 1 (.3, full), token 2 has one already,
  # token 0 at expert 2 (.1).
  probs = np.array([[[0.6, 0.3, 0.1], [0.8, 0.15, 0.05], [0.3, 0.5, 0.2]]])
  options = Options(3, 1, capacity=1, renormalize='none', gate_scale=2.0)
  choice = choose(np.log(probs).astype(np.float32), np.ones((1, 3), bool), options)
  np.testing.assert_array_equal(choice.expert_index[0, :, 0], [2, 0, 1])
  np.testing.assert_allclose(choice.gates[0, :, 0], [0.2, 1.6, 1.0], rtol=1e-5)
  evaluation = choose(
    np.log(probs).astype(np.float32),
    np.ones((1, 3), bool),
    Options(3, 1, capacity=1, renormalize='none', training=False),
  )
  np.testing.assert_array_equal(evaluation.expert_index[0, :, 0], [0, 0, 1])
  assert np.all(evaluation.chosen)


@pytest.mark.parametrize('renormalize', ['none', 'before_drop'])
def test_gates_and_their_gradient(renormalize):
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(1, 8, 5)).astype(np.float32)
  cotangent, direction = rng.normal(size=(8, 5)), rng.normal(size=logits.shape)
  valid = np.array([[True] * 3 + [False] + [True] * 4])
  options = Options(5, 2, capacity=2, renormalize=renormalize)
  choice = choose(logits, valid, options)
  experts = serial(np.log(oracle.softmax(logits[0])), valid[0], 2, 2)
  # Ten places for fourteen: some tokens have one expert, or none.
  assert {len(row) for row in experts} >= {1, 2}
  got = taken(np.asarray(choice.expert_index[0]), np.asarray(choice.chosen[0]))
  assert without_padding(got, valid[0]) == experts
  for s, row in enumerate(experts):
    expected = expected_gates(logits[0, s], row, renormalize)
    np.testing.assert_allclose(choice.gates[0, s, : len(row)], expected, rtol=1e-5)
    np.testing.assert_array_equal(choice.gates[0, s, len(row) :], 0)
  np.testing.assert_allclose(choice.router_probs, oracle.softmax(logits), rtol=1e-5)
  assert choice.sums == {}

  def gates(z):
    made = choose(z, valid, options)
    weights = jnp.take_along_axis(jnp.asarray(cotangent)[None], made.expert_index, axis=-1)
    return jnp.sum(jnp.where(valid[..., None], made.gates * weights, 0))

  def expected_sum(z):
    return sum(
      float(expected_gates(z[0, s], row, renormalize) @ cotangent[s, row])
      for s, row in enumerate(experts)
      if row
    )

  slope = np.sum(np.asarray(jax.grad(gates)(logits), np.float64) * direction)
  np.testing.assert_allclose(
    slope, oracle.central_difference(expected_sum, logits, direction), rtol=1e-3
  )


def test_takes_at_least_half_of_the_optimum():
  rng = np.random.default_rng(2)
  # Greedy at its worst in group 0: it takes 1 + 0 where .999 + .999 were to be had.
  scores = rng.random(size=(8, 6, 3)).astype(np.float32)
  scores[0] = 0
  scores[0, :2] = [[1, 0.999, 0], [0.999, 0, 0]]
  valid = np.ones((8, 6), bool)
  valid[0, 2:] = False
  for capacity in (1, 2):
    expert_index, chosen = assign(scores, valid, num_selected_experts=1, capacity=capacity)
    shares = []
    for g in range(8):
      places = np.repeat(scores[g][valid[g]], capacity, axis=1)
      best = places[scipy.optimize.linear_sum_assignment(places, maximize=True)].sum()
      got = np.take_along_axis(scores[g], np.asarray(expert_index[g]), axis=1)
      shares.append(got[np.asarray(chosen[g])].sum() / best)
    assert min(shares) >= 0.5
    assert max(shares) <= 1 + 1e-6
    if capacity == 1:
      # The bound is nearly met.
      assert shares[0] < 0.51


def test_everyone_gets_k_experts_with_enough_places():
  rng = np.random.default_rng(3)
  # (E - K + 1) C > K (T - 1): K = 1 needs no more than T = E C.
  for size, num_experts, k, capacity in ((8, 4, 1, 2), (6, 3, 2, 6), (5, 5, 2, 3)):
    assert capacity >= size or (num_experts - k + 1) * capacity > k * (size - 1)
    # The same ranking for all is the worst there is.
    scores = rng.normal(size=(2, size, num_experts)).astype(np.float32)
    scores[1] = -np.arange(num_experts)
    valid = np.ones((2, size), bool)
    _, chosen = assign(scores, valid, num_selected_experts=k, capacity=capacity)
    assert np.all(chosen)


def test_as_many_places_as_assignments_is_not_enough():
  # K T = E C = 6, but tokens 0 and 1 fill experts 0 and 1, and token 2 has only expert 2 left.
  scores = np.broadcast_to(np.array([2.0, 1.0, 0.0], np.float32), (1, 3, 3))
  expert_index, chosen = assign(scores, np.ones((1, 3), bool), num_selected_experts=2, capacity=2)
  np.testing.assert_array_equal(chosen[0], [[True, True], [True, True], [True, False]])
  assert expert_index[0, 2, 0] == 2


@pytest.mark.parametrize('renormalize', ['none', 'before_drop'])
@pytest.mark.parametrize(
  ('logits', 'valid', 'k'),
  [
    (np.zeros((1, 8, 5)), np.ones((1, 8)), 2),
    (np.broadcast_to([90.0, 0, -90, -95, -99], (1, 8, 5)), np.ones((1, 8)), 2),
    (np.zeros((1, 8, 5)), np.zeros((1, 8)), 2),
    (np.zeros((1, 1, 3)), np.ones((1, 1)), 3),
  ],
  ids=['equal', 'collapsed', 'padding', 'one_token_all_experts'],
)
def test_degenerate(logits, valid, k, renormalize):
  logits, valid = logits.astype(np.float32), valid.astype(bool)
  options = Options(logits.shape[-1], k, capacity=2, renormalize=renormalize)

  def gates(z):
    choice = choose(z, valid, options)
    return jnp.sum(choice.gates[..., 0]), choice

  (_, choice), grads = jax.value_and_grad(gates, has_aux=True)(logits)
  assert np.all(np.isfinite(grads))
  assert np.all(np.isfinite(choice.gates))
  if renormalize == 'before_drop':
    has_expert = np.any(choice.chosen, axis=-1)
    np.testing.assert_allclose(np.sum(choice.gates, axis=-1)[has_expert], 1, rtol=1e-6)


def test_ends_on_logits_that_are_not_finite():
  logits = np.random.default_rng(0).normal(size=(1, 8, 5)).astype(np.float32)
  logits[0, 1, 2], logits[0, 3], logits[0, 5, 0] = np.nan, np.inf, -np.inf
  choice = choose(logits, np.ones((1, 8), bool), Options(5, 2, capacity=2))
  counts = np.bincount(np.asarray(choice.expert_index)[np.asarray(choice.chosen)], minlength=5)
  assert counts.size == 5
  assert counts.max() <= 2


def test_padding_changes_nothing():
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(2, 8, 5)).astype(np.float32)
  valid = rng.random((2, 8)) < 0.6
  other = np.where(valid[..., None], logits, 9 * rng.normal(size=logits.shape)).astype(np.float32)
  options = Options(5, 2, capacity=2)
  one, two = (choose(z, valid, options) for z in (logits, other))
  np.testing.assert_array_equal(one.expert_index[valid], two.expert_index[valid])
  np.testing.assert_array_equal(one.gates[valid], two.gates[valid])


def test_a_later_token_takes_the_place_of_an_earlier_one():
  options = Options(2, 1, capacity=1, renormalize='none')
  valid = np.ones((1, 2), bool)
  logits = np.array([[[1.0, 0.0], [0.0, 0.0]]], np.float32)
  later = np.array([[[1.0, 0.0], [9.0, 0.0]]], np.float32)
  assert not greedy.ROUTER.causal
  assert choose(logits, valid, options).expert_index[0, 0, 0] == 0
  assert choose(later, valid, options).expert_index[0, 0, 0] == 1


def test_allowed():
  assert greedy.allowed(Options(4, 2)) is None
  assert greedy.allowed(Options(4, 1))[0] == 'renormalize'
  assert greedy.allowed(Options(4, 1, renormalize='none')) is None
