"""Quantile balancing against the oracle: choices, thresholds, and where the bias goes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from moe_jax.routing.routers import quantile
from tests import oracle
from tests.routing.routers import biased

SHAPES = [(1, 1, 1), (1, 3, 2), (2, 4, 4), (1, 7, 5)]
OPTIONS = biased.options('quantile', bias_rate=0.5)
choose = functools.partial(biased.choose, 'quantile')


def expected_choice(logits, bias, options):
  index, gates = [], []
  for row in logits.reshape(-1, logits.shape[-1]):
    scores = biased.scores_of(row, options.score)
    chosen = oracle.top_k(scores + np.asarray(bias, np.float64), options.num_selected_experts)
    index.append(chosen)
    gates.append(biased.gates_of(scores, chosen, options.renormalize, options.gate_scale))
  return np.array(index), np.array(gates)


def expected_threshold(logits, valid, bias, options):
  """Returns n * beta_e of each group."""
  k, num_experts = options.num_selected_experts, options.num_experts
  result = np.zeros((len(logits), num_experts))
  for g, rows in enumerate(logits):
    margins = []
    for row in rows[valid[g]]:
      selection = biased.scores_of(row, options.score) + np.asarray(bias, np.float64)
      best_first = sorted(selection, reverse=True)
      margins.append(selection - best_first[min(k, num_experts - 1)])
    n = len(margins)
    if n == 0:
      continue
    place = min(k * n // num_experts, n - 1)
    for e in range(num_experts):
      result[g, e] = n * sorted((margin[e] for margin in margins), reverse=True)[place]
  return result


@hypothesis.given(
  biased.cases(SHAPES),
  st.sampled_from([1, 2, 5]),
  st.sampled_from([('sigmoid', 'before_drop'), ('softmax', 'none')]),
)
def test_matches_the_oracle(case, k, names):
  logits, valid, bias = case
  num_experts = logits.shape[-1]
  options = biased.options(
    'quantile',
    num_experts=num_experts,
    num_selected_experts=min(k, num_experts),
    score=names[0],
    renormalize=names[1],
    gate_scale=1.5,
  )
  choice = choose(logits, valid, bias, options)
  index, gates = expected_choice(logits, bias, options)
  np.testing.assert_array_equal(choice.expert_index.reshape(index.shape), index)
  np.testing.assert_allclose(choice.gates.reshape(gates.shape), gates, rtol=3e-6)
  assert choice.chosen.all()
  expected = expected_threshold(logits, valid, bias, options)
  np.testing.assert_allclose(choice.sums['threshold'], expected, atol=1e-5)


def test_by_hand():
  # Four tokens, two experts, K = 1: q = 2. Scores of expert 0 less those of expert 1, which is the
  # second best wherever they are positive:
  #   s   (9/10, 5/10) (8/10, 5/10) (7/10, 5/10) (4/10, 5/10)
  #   a     5/10         5/10         5/10         4/10
  #   s_0 - a: 4/10, 3/10, 2/10, 0, third largest 2/10
  #   s_1 - a: 0, 0, 0, 1/10, third largest 0
  # With r = 1 the bias becomes (-2/10, 0). Expert 0 then wins the first two tokens, ties on the
  # third, where it keeps its lower index but for rounding, and loses the fourth.
  odds = jnp.array([[[9.0, 1.0], [4.0, 1.0], [7 / 3, 1.0], [2 / 3, 1.0]]])
  options = biased.options(
    'quantile', num_experts=2, num_selected_experts=1, renormalize='none', bias_rate=1.0
  )
  valid = jnp.ones((1, 4), bool)
  choice = choose(jnp.log(odds), valid, jnp.zeros(2), options)
  np.testing.assert_array_equal(choice.expert_index[0, :, 0], [0, 0, 0, 1])
  np.testing.assert_allclose(choice.gates[0, :, 0], [0.9, 0.8, 0.7, 0.5], rtol=1e-6)
  np.testing.assert_allclose(choice.sums['threshold'], [[4 * 0.2, 0]], atol=1e-6)
  after = quantile.update({'bias': jnp.zeros(2)}, biased.sums_of(choice, valid), options)
  np.testing.assert_allclose(after['bias'], [-0.2, 0], atol=1e-6)
  index = choose(jnp.log(odds), valid, after['bias'], options).expert_index[0, :, 0]
  np.testing.assert_array_equal(index[jnp.array([0, 1, 3])], [0, 0, 1])


@pytest.mark.parametrize('k', [1, 3, 5])
def test_what_must_be_beaten(k):
  rng = np.random.default_rng(0)
  # Few values, so that the K-th is often equal to the (K+1)-th.
  biased_scores = rng.integers(-2, 2, size=(2, 40, 5)).astype(np.float32)
  biased_scores[0, :3, 1:3] = -np.inf
  index = jax.lax.top_k(biased_scores, k)[1]
  expected = -np.sort(-biased_scores, axis=-1)[..., min(k, 4), None]
  np.testing.assert_array_equal(quantile.to_beat(jnp.asarray(biased_scores), index), expected)


def test_groups_count_by_their_valid_tokens():
  logits, valid, bias = biased.random_case()
  valid[0], valid[1] = [True] * 6, [True] + [False] * 5
  sums = biased.sums_of(choose(logits, valid, bias, OPTIONS), valid, num_scopes=2)
  after = quantile.update({'bias': jnp.asarray(bias)}, sums, OPTIONS)['bias']
  one, two = expected_threshold(logits, valid, bias, OPTIONS) / np.array([[6.0], [1.0]])
  np.testing.assert_allclose(after, bias - 0.5 * (6 * one + two) / 7, atol=1e-6)


def test_bias_over_forty_steps():
  logits = biased.skewed_logits(num_tokens=24, num_experts=6, seed=1)
  valid = np.ones((1, 24), bool)
  valid[0, ::5] = False
  options = biased.options('quantile', num_experts=6, bias_rate=0.3)
  biases, counts = biased.trajectory('quantile', logits, valid, options, 40)
  bias = np.zeros(6)
  for step in range(40):
    index, _ = expected_choice(logits, biases[step - 1] if step else bias, options)
    np.testing.assert_array_equal(counts[step], biased.count(index, valid[0], 6))
    bias = bias - 0.3 * expected_threshold(logits, valid, bias, options)[0] / valid.sum()
    np.testing.assert_allclose(biases[step], bias, atol=5e-6)
  assert np.abs(bias - bias.mean()).max() > 0.05


@pytest.mark.parametrize(('bias_rate', 'num_steps'), [(1.0, 20), (0.3, 40)])
def test_skewed_load_becomes_balanced(bias_rate, num_steps):
  options = biased.options('quantile', num_experts=8, bias_rate=bias_rate)
  valid = np.ones((1, 512), bool)
  _, counts = biased.trajectory('quantile', biased.skewed_logits(), valid, options, num_steps)
  assert biased.max_violation(counts[0]) > 1
  assert max(biased.max_violation(c) for c in counts[-5:]) < 0.1


def test_evaluation_measures_nothing():
  logits, valid, bias = biased.random_case()
  one = choose(logits, valid, bias, OPTIONS)
  two = choose(logits, valid, bias, biased.replace(OPTIONS, training=False))
  np.testing.assert_array_equal(one.expert_index, two.expert_index)
  np.testing.assert_array_equal(one.gates, two.gates)
  assert (one.sums['threshold'] != 0).any()
  assert two.sums['threshold'].shape == one.sums['threshold'].shape
  np.testing.assert_array_equal(two.sums['threshold'], 0)


def test_padding_alone_moves_nothing():
  logits, valid, bias = biased.random_case()
  valid = np.zeros_like(valid)
  sums = biased.sums_of(choose(logits, valid, bias, OPTIONS), valid)
  after = quantile.update({'bias': jnp.asarray(bias)}, sums, OPTIONS)['bias']
  np.testing.assert_array_equal(after, bias)


def test_gradient_of_the_gates():
  logits, valid, bias = biased.random_case()
  cotangent, direction = np.random.default_rng(1).normal(size=(2, 2, 6, 4))
  cotangent = cotangent[..., :2]

  def value(z, b):
    choice = choose(z, valid, b, OPTIONS)
    return jnp.sum(choice.gates * cotangent) + jnp.sum(choice.sums['threshold'])

  def expected(z):
    return np.sum(expected_choice(z, bias, OPTIONS)[1].reshape(cotangent.shape) * cotangent)

  # The thresholds are part of the value, and of no gradient.
  gradient, to_bias = jax.jit(jax.grad(value, argnums=(0, 1)))(logits, bias)
  slope = oracle.central_difference(expected, logits, direction)
  np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4)
  np.testing.assert_array_equal(to_bias, 0)


def test_degenerate_inputs():
  for score in ('sigmoid', 'softmax'):
    for logits, valid in biased.DEGENERATE.values():
      biased.assert_finite('quantile', logits, valid, biased.options('quantile', score=score))
  every = biased.options('quantile', num_selected_experts=4)
  biased.assert_finite('quantile', *biased.DEGENERATE['collapse'], every)
  biased.assert_finite('quantile', np.zeros((1, 1, 4)), np.ones((1, 1), bool), OPTIONS)
  biased.assert_indices_in_range_of_non_finite_logits('quantile', OPTIONS)


def test_padding_changes_nothing():
  biased.assert_blind_to_padding('quantile', OPTIONS, *biased.random_case())


def test_causal():
  assert registry.ROUTERS['quantile'].causal
  biased.assert_causal('quantile', OPTIONS)


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({}, None),
    ({'bias_rate': 1.0}, None),
    ({'num_selected_experts': 1}, 'renormalize'),
  ],
)
def test_allowed(changes, field):
  wrong = registry.ROUTERS['quantile'].allowed(biased.options('quantile', **changes))
  assert (wrong and wrong[0]) == field
