"""The tokens taken, against a sort per expert; the thresholds over several steps, and the leak."""

import functools
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import expert_choice
from moe_jax.routing.routers.expert_choice import Options
from tests import oracle

# (S, E, C): scarce, ample, all tokens, more places than tokens, one token, one expert.
SHAPES = ((8, 4, 2), (6, 3, 4), (5, 2, 5), (3, 2, 4), (1, 4, 1), (4, 1, 2))

take = jax.jit(expert_choice.take_best, static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def choose(logits, valid, options, threshold=None):
  """The router matrix is the identity, so that the tokens are the logits."""
  group, size, num_experts = logits.shape
  index = jnp.zeros((group, size), jnp.int32)
  keys = jax.random.split(jax.random.key(0), group)
  inputs = RouterInputs(tokens=logits, valid=valid, token_ids=index, positions=index, keys=keys)
  state = expert_choice.ROUTER.state(options, num_experts, 10)
  if threshold is not None:
    state = {**state, 'threshold': threshold}
  return expert_choice.ROUTER.choose({'router': jnp.eye(num_experts)}, state, inputs, options)


def options_for(num_experts, k=1, **changes):
  return Options(num_experts, k, **{'renormalize': 'none', **changes})


def best_tokens(scores, valid, capacity):
  """Returns who is taken [S E] and the C-th largest score [E] of one group."""
  size, num_experts = scores.shape
  taken, threshold = np.zeros((size, num_experts), bool), np.zeros(num_experts)
  tokens = [s for s in range(size) if valid[s]]
  for e in range(num_experts):
    best = sorted(tokens, key=lambda s: (-scores[s, e], s))[:capacity]
    taken[best, e] = True
    if len(best) == min(capacity, size):
      threshold[e] = scores[best[-1], e]
  return taken, threshold


@st.composite
def groups(draw):
  size, num_experts, capacity = draw(st.sampled_from(SHAPES))
  row = st.lists(st.integers(0, 4), min_size=num_experts, max_size=num_experts)
  scores = [[draw(row) for _ in range(size)] for _ in range(2)]
  valid = [draw(st.lists(st.booleans(), min_size=size, max_size=size)), [True] * size]
  return np.array(scores, np.float32), np.array(valid), capacity


@hypothesis.given(groups())
def test_takes_the_best_tokens(drawn):
  scores, valid, capacity = drawn
  taken, threshold = take(scores, valid, capacity)
  for g in range(2):
    expected, expected_threshold = best_tokens(scores[g], valid[g], capacity)
    np.testing.assert_array_equal(taken[g], expected)
    np.testing.assert_array_equal(threshold[g], expected_threshold)
  # Each expert is full, or has everyone.
  counts = np.minimum(capacity, valid.sum(axis=1))
  np.testing.assert_array_equal(
    np.sum(taken, axis=1), np.broadcast_to(counts[:, None], threshold.shape)
  )


@pytest.mark.parametrize('capacity', [2, 5])
def test_choice_and_sums(capacity):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 8, 4)).astype(np.float32)
  # Fewer valid tokens than places in group 1 for 5 of them; none in group 2.
  valid = np.array([[True] * 8, [True] * 3 + [False] * 5, [False] * 8])
  choice = choose(logits, valid, options_for(4, capacity=capacity, gate_scale=2.0))
  scores = oracle.softmax(logits)
  np.testing.assert_array_equal(choice.expert_index, np.broadcast_to(np.arange(4), (3, 8, 4)))
  np.testing.assert_allclose(choice.gates, 2 * scores, rtol=2e-6)
  np.testing.assert_allclose(choice.router_probs, scores, rtol=2e-6)
  for g in range(3):
    taken, threshold = best_tokens(scores[g], valid[g], capacity)
    np.testing.assert_array_equal(choice.chosen[g], taken)
    np.testing.assert_allclose(choice.sums['threshold'][g], threshold, rtol=2e-6)
  np.testing.assert_array_equal(choice.sums['groups'], [1, 1, 0])


def test_by_hand():
  # Two places each. Expert 0 takes tokens 0 and 1 (.7 and .6), expert 1 tokens 2 and 1 (.8, .4),
  # equal to token 3's but earlier. Nobody takes token 3 for expert 0 (.6): also later than token 1.
  probs = np.array([[[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.6, 0.4]]])
  logits = np.log(probs).astype(np.float32)
  valid = np.ones((1, 4), bool)
  choice = choose(logits, valid, options_for(2, capacity=2))
  np.testing.assert_array_equal(choice.chosen[0], [[1, 0], [1, 1], [0, 1], [0, 0]])
  np.testing.assert_allclose(choice.gates[0], probs[0], rtol=1e-6)
  np.testing.assert_allclose(choice.sums['threshold'][0], [0.6, 0.4], rtol=1e-6)
  # With token 0 as padding the places go to tokens 1 and 3.
  valid[0, 0] = False
  choice = choose(logits, valid, options_for(2, capacity=2))
  np.testing.assert_array_equal(choice.chosen[0], [[0, 0], [1, 1], [0, 1], [1, 0]])


def test_evaluations():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(1, 8, 4)).astype(np.float32)
  valid, threshold = np.ones((1, 8), bool), np.array([0.1, 0.3, 0.5, 0.0], np.float32)
  scores = oracle.softmax(logits)

  def chosen(evaluation, training=False):
    options = options_for(4, 2, capacity=3, training=training, evaluation=evaluation)
    return choose(logits, valid, options, threshold).chosen[0]

  same = best_tokens(scores[0], valid[0], 3)[0]
  by_token = np.zeros((8, 4), bool)
  for s in range(8):
    by_token[s, oracle.top_k(logits[0, s], 2)] = True
  np.testing.assert_array_equal(chosen('same'), same)
  np.testing.assert_array_equal(chosen('token_choice'), by_token)
  np.testing.assert_array_equal(chosen('threshold'), scores[0] > threshold)
  for evaluation in expert_choice.EVALUATIONS:
    np.testing.assert_array_equal(chosen(evaluation, training=True), same)


@pytest.mark.parametrize('training', [True, False])
def test_leaks_in_training_but_not_by_threshold_or_token(training):
  # Token 1's rise for expert 0 takes the place from token 0.
  logits = np.array([[[1.0, 0.0], [0.0, 0.0]]], np.float32)
  later = np.array([[[1.0, 0.0], [9.0, 0.0]]], np.float32)
  valid, threshold = np.ones((1, 2), bool), np.array([0.6, 0.6], np.float32)
  assert not expert_choice.ROUTER.causal
  for evaluation in expert_choice.EVALUATIONS:
    options = options_for(2, capacity=1, training=training, evaluation=evaluation)
    one, two = (choose(z, valid, options, threshold).chosen[0, 0] for z in (logits, later))
    leaks = training or evaluation == 'same'
    np.testing.assert_array_equal(one[0], True)
    np.testing.assert_array_equal(two[0], not leaks)


def test_thresholds_over_several_steps():
  options = options_for(3, capacity=2, threshold_decay=0.75)
  state = expert_choice.ROUTER.state(options, 3, 10)
  rng = np.random.default_rng(2)
  expected, steps = np.zeros(3), 0
  for step in range(5):
    logits = rng.normal(size=(4, 6, 3)).astype(np.float32)
    # Group 3 is padding in all steps, and so is everything in steps 0 and 3.
    valid = np.ones((4, 6), bool)
    valid[3] = False
    valid &= step not in (0, 3)
    own = {k: jnp.sum(v, axis=0) for k, v in choose(logits, valid, options).sums.items()}
    state = expert_choice.ROUTER.update(state, types.SimpleNamespace(own=own), options)
    if step not in (0, 3):
      scores = oracle.softmax(logits)
      mean = np.mean([best_tokens(scores[g], valid[g], 2)[1] for g in range(3)], axis=0)
      expected = 0.75 * expected + 0.25 * mean if steps else mean
      steps += 1
    np.testing.assert_allclose(state['threshold'], expected, rtol=1e-5)
    assert state['steps'] == steps
    assert state['threshold'].dtype == state['steps'].dtype == jnp.float32


def test_threshold_of_training_lets_pass_about_as_many():
  options = options_for(4, 1, capacity=16)
  logits = np.random.default_rng(3).normal(size=(2, 64, 4)).astype(np.float32)
  valid = np.ones((2, 64), bool)
  own = {k: jnp.sum(v, axis=0) for k, v in choose(logits, valid, options).sums.items()}
  state = expert_choice.ROUTER.state(options, 4, 10)
  state = expert_choice.ROUTER.update(state, types.SimpleNamespace(own=own), options)
  options = options_for(4, 1, capacity=16, training=False, evaluation='threshold')
  counts = np.sum(choose(logits, valid, options, state['threshold']).chosen, axis=(0, 1))
  np.testing.assert_allclose(counts, 32, atol=6)


def test_gradient_of_the_gates():
  rng = np.random.default_rng(4)
  logits = rng.normal(size=(1, 8, 4)).astype(np.float32)
  cotangent, direction = rng.normal(size=(8, 4)), rng.normal(size=logits.shape)
  valid, options = np.ones((1, 8), bool), options_for(4, capacity=2)
  taken, _ = best_tokens(oracle.softmax(logits[0]), valid[0], 2)

  def gates(z):
    choice = choose(z, valid, options)
    # The sums carry none.
    count = jnp.sum(choice.sums['threshold'])
    return jnp.sum(jnp.where(choice.chosen[0], choice.gates[0], 0) * cotangent) + count

  def expected(z):
    return np.sum(oracle.softmax(z[0]) * taken * cotangent)

  slope = np.sum(np.asarray(jax.grad(gates)(logits), np.float64) * direction)
  np.testing.assert_allclose(
    slope, oracle.central_difference(expected, logits, direction), rtol=1e-3
  )


@pytest.mark.parametrize(
  ('logits', 'valid', 'taken'),
  [
    (np.zeros((1, 8, 4)), np.ones((1, 8)), 8),
    (np.broadcast_to([200.0, 0, 0, 0], (1, 8, 4)), np.ones((1, 8)), 8),
    (np.zeros((1, 8, 4)), np.zeros((1, 8)), 0),
    (np.zeros((1, 1, 4)), np.ones((1, 1)), 4),
  ],
  ids=['equal', 'collapsed', 'padding', 'one_token'],
)
def test_degenerate(logits, valid, taken):
  logits, valid = logits.astype(np.float32), valid.astype(bool)

  def gates(z):
    choice = choose(z, valid, options_for(4, 4, capacity=2))
    return jnp.sum(jnp.where(choice.chosen, choice.gates, 0)), choice

  (_, choice), grads = jax.value_and_grad(gates, has_aux=True)(logits)
  assert np.all(np.isfinite(grads))
  assert np.sum(choice.chosen) == taken
  # Of equals the lower token.
  assert np.all(np.asarray(choice.chosen)[:, :2] == (taken > 0))


def test_ends_on_logits_that_are_not_finite():
  logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  logits[0, 1, 2], logits[0, 3], logits[0, 5, 0] = np.nan, np.inf, -np.inf
  choice = choose(logits, np.ones((1, 8), bool), options_for(4, capacity=2))
  np.testing.assert_array_equal(np.sum(choice.chosen, axis=1), 2)


def test_content_of_padding_changes_nothing():
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(2, 8, 4)).astype(np.float32)
  valid = rng.random((2, 8)) < 0.6
  other = np.where(valid[..., None], logits, 9 * rng.normal(size=logits.shape)).astype(np.float32)
  one, two = (choose(z, valid, options_for(4, capacity=3)) for z in (logits, other))
  np.testing.assert_array_equal(one.chosen, two.chosen)
  np.testing.assert_array_equal(one.gates[valid], two.gates[valid])
  for name, value in one.sums.items():
    np.testing.assert_array_equal(value, two.sums[name])


def test_allowed():
  assert expert_choice.allowed(options_for(4)) is None
  assert expert_choice.allowed(Options(4, 2))[0] == 'renormalize'
  assert expert_choice.allowed(options_for(4, evaluation='other'))[0] == 'evaluation'
