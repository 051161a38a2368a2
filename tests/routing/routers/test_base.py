"""The auction against the exact optimum, and what else BASE routing promises."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import base
from moe_jax.routing.routers.base import Options
from tests import oracle

# (S, E): dividing and not, fewer tokens than experts, one token, one expert.
SHAPES = ((8, 4), (5, 3), (3, 6), (1, 3), (4, 1))


def options_for(num_experts, **changes):
  return Options(num_experts, 1, **{'renormalize': 'none', **changes})


@functools.partial(jax.jit, static_argnums=2)
def choose(logits, valid, options):
  """The router matrix is the identity, so that the tokens are the logits."""
  groups, size, num_experts = logits.shape
  index = jnp.zeros((groups, size), jnp.int32)
  keys = jax.random.split(jax.random.key(0), groups)
  inputs = RouterInputs(tokens=logits, valid=valid, token_ids=index, positions=index, keys=keys)
  return base.ROUTER.choose({'router': jnp.eye(num_experts)}, {}, inputs, options)


def optimum(scores, valid):
  """Returns the best experts of the valid tokens, at most ceil(S / E) tokens each, and the sum."""
  size, num_experts = scores.shape
  places = np.repeat(np.asarray(scores, np.float64)[valid], -(-size // num_experts), axis=1)
  token, place = scipy.optimize.linear_sum_assignment(places, maximize=True)
  return place // -(-size // num_experts), places[token, place].sum()


def value(scores, valid, expert_index):
  return sum(float(scores[s, expert_index[s]]) for s in np.flatnonzero(valid))


def assert_balanced(expert_index, valid, num_experts):
  size = len(valid)
  counts = np.bincount(expert_index[valid], minlength=num_experts)
  assert counts.size == num_experts
  assert counts.max(initial=0) <= -(-size // num_experts)


@st.composite
def groups(draw):
  size, num_experts = draw(st.sampled_from(SHAPES))
  values = st.lists(st.integers(-4, 4), min_size=num_experts, max_size=num_experts)
  logits = [[draw(values) for _ in range(size)] for _ in range(2)]
  valid = [draw(st.lists(st.booleans(), min_size=size, max_size=size)), [True] * size]
  return np.array(logits, np.float32), np.array(valid)


@hypothesis.given(groups())
def test_is_optimal_for_integers(drawn):
  logits, valid = drawn
  choice = choose(logits, valid, options_for(logits.shape[-1]))
  assert np.all(choice.chosen)
  assert choice.sums == {}
  np.testing.assert_array_equal(choice.router_logits, logits)
  np.testing.assert_allclose(choice.router_probs, oracle.softmax(logits), rtol=2e-6)
  for g in range(2):
    expert_index = np.asarray(choice.expert_index[g, :, 0])
    assert_balanced(expert_index, valid[g], logits.shape[-1])
    assert value(logits[g], valid[g], expert_index) == optimum(logits[g], valid[g])[1]
    selected = logits[g, np.arange(len(expert_index)), expert_index].astype(np.float64)
    np.testing.assert_allclose(choice.gates[g, :, 0], 1 / (1 + np.exp(-selected)), rtol=2e-6)


@pytest.mark.parametrize('spread', [1.0, 30.0])
def test_is_nearly_optimal_for_floats(spread):
  rng = np.random.default_rng(0)
  # The second group has collapsed: all tokens like the same experts, with small differences.
  logits = rng.normal(size=(2, 64, 8)) * spread
  logits[1] = logits[1] * 0.1 + rng.normal(size=8) * spread
  logits, valid = logits.astype(np.float32), np.ones((2, 64), bool)
  choice = choose(logits, valid, options_for(8))
  for g in range(2):
    expert_index = np.asarray(choice.expert_index[g, :, 0])
    np.testing.assert_array_equal(np.bincount(expert_index), [8] * 8)
    best = optimum(logits[g], valid[g])[1]
    assert best - 0.5 <= value(logits[g], valid[g], expert_index) <= best + 1e-3


def test_by_hand():
  # Two experts, two places each. All prefer expert 0, by 5, 1, 4 and 2. So the sum is largest when
  # those with the leads 5 and 4 have it: 5 + 0 + 4 + 1 = 10; the argmax would give all to expert 0.
  logits = jnp.array([[[5.0, 0.0], [1.0, 0.0], [4.0, 0.0], [3.0, 1.0]]])
  choice = choose(logits, jnp.ones((1, 4), bool), options_for(2, gate_scale=2.0))
  np.testing.assert_array_equal(choice.expert_index[0, :, 0], [0, 1, 0, 1])
  # 2 sigmoid(5), 2 sigmoid(0), 2 sigmoid(4), 2 sigmoid(1).
  expected = [1.9866143, 1.0, 1.9640276, 1.4621172]
  np.testing.assert_allclose(choice.gates[0, :, 0], expected, rtol=1e-6)


def test_evaluation_is_argmax():
  logits = jnp.array([[[5.0, 0.0], [1.0, 0.0], [4.0, 0.0], [1.0, 1.0]]])
  choice = choose(logits, jnp.ones((1, 4), bool), options_for(2, training=False))
  np.testing.assert_array_equal(choice.expert_index, 0)
  np.testing.assert_allclose(choice.gates, jax.nn.sigmoid(logits[..., :1]), rtol=1e-6)


def test_gradient_of_the_gates():
  rng = np.random.default_rng(1)
  # Far apart, so that no second-best assignment is within the auction's 1/2.
  logits = (10 * rng.normal(size=(1, 8, 4))).astype(np.float32)
  cotangent, valid = rng.normal(size=8), np.ones((1, 8), bool)
  direction = rng.normal(size=logits.shape)
  expert_index, _ = optimum(logits[0], valid[0])

  def gates(z):
    return jnp.sum(choose(z, valid, options_for(4)).gates[0, :, 0] * cotangent)

  def expected(z):
    return np.sum(cotangent / (1 + np.exp(-z[0, np.arange(8), expert_index])))

  slope = np.sum(np.asarray(jax.grad(gates)(logits), np.float64) * direction)
  np.testing.assert_allclose(
    slope, oracle.central_difference(expected, logits, direction), rtol=1e-4
  )


@pytest.mark.parametrize(
  ('logits', 'valid'),
  [
    (np.zeros((1, 8, 4)), np.ones((1, 8))),
    (np.broadcast_to([50.0, 0, 0, 0], (1, 8, 4)), np.ones((1, 8))),
    (np.zeros((1, 8, 4)), np.zeros((1, 8))),
    (np.full((1, 1, 3), 2.0), np.ones((1, 1))),
    (np.full((1, 4, 1), 2.0), np.ones((1, 4))),
  ],
  ids=['equal', 'collapsed', 'padding', 'one_token', 'one_expert'],
)
def test_degenerate(logits, valid):
  logits, valid = logits.astype(np.float32), valid.astype(bool)
  options = options_for(logits.shape[-1])
  expert_index = np.asarray(choose(logits, valid, options).expert_index[0, :, 0])
  assert_balanced(expert_index, np.ones_like(valid[0]), logits.shape[-1])
  grads = jax.grad(lambda z: jnp.sum(choose(z, valid, options).gates))(logits)
  assert np.all(np.isfinite(grads))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_ends_on_logits_that_are_not_finite(bad):
  logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  logits[0, 2, 1] = bad
  logits[0, 5] = bad
  expert_index = choose(logits, np.ones((1, 8), bool), options_for(4)).expert_index
  np.testing.assert_array_equal(np.bincount(expert_index.ravel()), [2] * 4)


@pytest.mark.parametrize('max_rounds', [0, 1, 8])
def test_is_complete_when_rounds_run_out(max_rounds):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 4)), jnp.float32)
  expert_index = base.balanced_assignment(logits, jnp.ones((1, 16), bool), max_rounds)
  np.testing.assert_array_equal(np.bincount(expert_index[0]), [4] * 4)
  if max_rounds == 0:
    # The places are given out in order.
    np.testing.assert_array_equal(expert_index[0], np.repeat(np.arange(4), 4))


def test_content_of_padding_changes_nothing():
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(2, 8, 4)).astype(np.float32)
  valid = rng.random((2, 8)) < 0.6
  other = np.where(valid[..., None], logits, 9 * rng.normal(size=logits.shape)).astype(np.float32)
  one, two = (choose(z, valid, options_for(4)) for z in (logits, other))
  np.testing.assert_array_equal(one.expert_index[valid], two.expert_index[valid])
  np.testing.assert_array_equal(one.gates[valid], two.gates[valid])


def test_a_later_token_takes_the_place_of_an_earlier_one():
  logits = np.array([[[1.0, 0.0], [0.0, 0.0]]], np.float32)
  later = np.array([[[1.0, 0.0], [9.0, 0.0]]], np.float32)
  valid = np.ones((1, 2), bool)
  assert not base.ROUTER.causal
  assert choose(logits, valid, options_for(2)).expert_index[0, 0, 0] == 0
  assert choose(later, valid, options_for(2)).expert_index[0, 0, 0] == 1


def test_allowed():
  assert base.allowed(options_for(4)) is None
  assert base.allowed(Options(4, 2, renormalize='none'))[0] == 'num_selected_experts'
  assert base.allowed(options_for(4, renormalize='after_drop'))[0] == 'renormalize'
