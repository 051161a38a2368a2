"""Spill-over against a loop over tokens, and that it is causal."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import spill
from moe_jax.routing.routers.spill import Options
from tests import oracle

# (S, E, K, C): scarce and ample, K = E, one token, as many places as tokens.
SHAPES = ((8, 4, 1, 2), (8, 5, 2, 2), (5, 3, 3, 2), (1, 4, 2, 1), (6, 3, 2, 6))


@functools.partial(jax.jit, static_argnums=2)
def choose(logits, valid, options):
  """The router matrix is the identity, so that the tokens are the logits."""
  group, size, num_experts = logits.shape
  index = jnp.zeros((group, size), jnp.int32)
  keys = jax.random.split(jax.random.key(0), group)
  inputs = RouterInputs(tokens=logits, valid=valid, token_ids=index, positions=index, keys=keys)
  return spill.ROUTER.choose({'router': jnp.eye(num_experts)}, {}, inputs, options)


def one_by_one(logits, valid, k, capacity):
  """Returns the experts of each token; none for padding."""
  experts, count = [], [0] * logits.shape[1]
  for row, ok in zip(logits, valid, strict=True):
    order = oracle.top_k(row, len(row)) if ok else []
    mine = [int(e) for e in order if count[e] < capacity][:k]
    for e in mine:
      count[e] += 1
    experts.append(mine)
  return experts


def expected_gates(row, experts, renormalize):
  gates = oracle.softmax(row)[experts]
  return gates / gates.sum() if renormalize == 'before_drop' and len(experts) else gates


def taken(choice, g, valid):
  """Returns the experts of each valid token of group g, best first."""
  rows = zip(np.asarray(choice.expert_index[g]), np.asarray(choice.chosen[g]), valid, strict=True)
  return [list(row[chosen]) if ok else [] for row, chosen, ok in rows]


@st.composite
def groups(draw):
  shape = draw(st.sampled_from(SHAPES))
  size, num_experts = shape[:2]
  row = st.lists(st.integers(-2, 2), min_size=num_experts, max_size=num_experts)
  logits = [[draw(row) for _ in range(size)] for _ in range(2)]
  valid = [draw(st.lists(st.booleans(), min_size=size, max_size=size)), [True] * size]
  return np.array(logits, np.float32), np.array(valid), shape[2], shape[3]


@hypothesis.given(groups(), st.sampled_from(['none', 'before_drop']), st.booleans())
def test_matches_the_oracle(drawn, renormalize, training):
  logits, valid, k, capacity = drawn
  options = Options(
    logits.shape[-1], k, capacity=capacity, renormalize=renormalize, training=training
  )
  choice = choose(logits, valid, options)
  np.testing.assert_allclose(choice.router_probs, oracle.softmax(logits), rtol=2e-6)
  assert choice.sums == {}
  for g in range(2):
    experts = one_by_one(logits[g], valid[g], k, capacity)
    assert taken(choice, g, valid[g]) == experts
    for s in np.flatnonzero(valid[g]):
      expected = expected_gates(logits[g, s], experts[s], renormalize)
      np.testing.assert_allclose(choice.gates[g, s, : len(experts[s])], expected, rtol=5e-6)
      np.testing.assert_array_equal(choice.gates[g, s, len(experts[s]) :], 0)


def test_by_hand():
  # One place per expert, K = 2, softmax(ln 5, ln 3, ln 2) = .5, .3, .2. Token 0 takes experts 0 and
  # 1; token 1 finds only expert 2; token 2 none.
  logits = np.log(np.full((1, 3, 3), [5.0, 3.0, 2.0])).astype(np.float32)
  options = Options(3, 2, capacity=1, renormalize='none', gate_scale=2.0)
  choice = choose(logits, np.ones((1, 3), bool), options)
  assert taken(choice, 0, [True] * 3) == [[0, 1], [2], []]
  np.testing.assert_allclose(choice.gates[0], [[1.0, 0.6], [0.4, 0], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize('renormalize', ['none', 'before_drop'])
def test_gradient_of_the_gates(renormalize):
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(1, 8, 5)).astype(np.float32)
  cotangent, direction = rng.normal(size=(8, 5)), rng.normal(size=logits.shape)
  valid = np.ones((1, 8), bool)
  options = Options(5, 2, capacity=2, renormalize=renormalize)
  experts = one_by_one(logits[0], valid[0], 2, 2)
  # Ten places for sixteen: some tokens have none.
  assert [] in experts

  def gates(z):
    choice = choose(z, valid, options)
    weights = jnp.take_along_axis(jnp.asarray(cotangent)[None], choice.expert_index, axis=-1)
    return jnp.sum(choice.gates * weights)

  def expected(z):
    return sum(
      float(expected_gates(z[0, s], row, renormalize) @ cotangent[s, row])
      for s, row in enumerate(experts)
      if row
    )

  slope = np.sum(np.asarray(jax.grad(gates)(logits), np.float64) * direction)
  np.testing.assert_allclose(
    slope, oracle.central_difference(expected, logits, direction), rtol=1e-3
  )


def test_is_top_k_while_there_is_room():
  logits = np.random.default_rng(2).normal(size=(2, 6, 3)).astype(np.float32)
  choice = choose(logits, np.ones((2, 6), bool), Options(3, 2, capacity=6))
  np.testing.assert_array_equal(choice.expert_index, np.argsort(-logits, axis=-1)[..., :2])
  assert np.all(choice.chosen)


def test_fills_every_place_with_enough_tokens():
  logits = np.random.default_rng(3).normal(size=(1, 8, 4)).astype(np.float32)
  logits[..., 0] += 50
  options = Options(4, 1, capacity=2, renormalize='none')
  choice = choose(logits, np.ones((1, 8), bool), options)
  assert np.all(choice.chosen)
  np.testing.assert_array_equal(np.bincount(choice.expert_index.ravel()), [2] * 4)


@pytest.mark.parametrize('place', range(8))
def test_is_causal(place):
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(1, 8, 5)).astype(np.float32)
  later = logits.copy()
  later[:, place:] = rng.normal(size=(1, 8 - place, 5)) * 5
  valid, other_valid = np.ones((1, 8), bool), np.ones((1, 8), bool)
  other_valid[:, place + 1 :] = False
  options = Options(5, 2, capacity=2)
  assert spill.ROUTER.causal
  one, two = choose(logits, valid, options), choose(later, other_valid, options)
  np.testing.assert_array_equal(one.expert_index[:, :place], two.expert_index[:, :place])
  np.testing.assert_array_equal(one.chosen[:, :place], two.chosen[:, :place])
  np.testing.assert_array_equal(one.gates[:, :place], two.gates[:, :place])


def test_an_earlier_token_takes_the_place_of_a_later_one():
  # The counterpart of the test above: the rule does look back.
  options = Options(2, 1, capacity=1, renormalize='none')
  valid = np.ones((1, 2), bool)
  logits = np.array([[[1.0, 0.0], [1.0, 0.0]]], np.float32)
  earlier = np.array([[[0.0, 1.0], [1.0, 0.0]]], np.float32)
  assert choose(logits, valid, options).expert_index[0, 1, 0] == 1
  assert choose(earlier, valid, options).expert_index[0, 1, 0] == 0


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


def test_ends_on_logits_that_are_not_finite():
  logits = np.random.default_rng(0).normal(size=(1, 8, 5)).astype(np.float32)
  logits[0, 1, 2], logits[0, 3], logits[0, 5, 0] = np.nan, np.inf, -np.inf
  choice = choose(logits, np.ones((1, 8), bool), Options(5, 2, capacity=2))
  counts = np.bincount(np.asarray(choice.expert_index)[np.asarray(choice.chosen)], minlength=5)
  assert counts.size == 5
  assert counts.max() <= 2


def test_content_of_padding_changes_nothing():
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(2, 8, 5)).astype(np.float32)
  valid = rng.random((2, 8)) < 0.6
  other = np.where(valid[..., None], logits, 9 * rng.normal(size=logits.shape)).astype(np.float32)
  options = Options(5, 2, capacity=2)
  one, two = (choose(z, valid, options) for z in (logits, other))
  np.testing.assert_array_equal(one.expert_index[valid], two.expert_index[valid])
  np.testing.assert_array_equal(one.gates[valid], two.gates[valid])


def test_allowed():
  assert spill.allowed(Options(4, 2)) is None
  assert spill.allowed(Options(4, 1))[0] == 'renormalize'
  assert spill.allowed(Options(4, 1, renormalize='none')) is None
