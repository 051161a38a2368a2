"""Group-limited selection and its sequence-wise loss against the oracle."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from moe_jax.routing.routers import group_limited
from tests import oracle
from tests.routing.routers import biased

choose = functools.partial(biased.choose, 'group_limited')
# Two groups of two, of which one is kept.
OPTIONS = biased.options(
  'group_limited', num_expert_groups=2, num_selected_groups=1, gate_scale=2.5
)


def select(selection, k, num_groups, num_kept):
  """Returns the K best experts of the best groups of one token."""
  size = len(selection) // num_groups
  groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
  ratings = [sum(sorted((selection[e] for e in group), reverse=True)[:2]) for group in groups]
  candidates = sorted(e for g in oracle.top_k(ratings, num_kept) for e in groups[g])
  return np.array(sorted(candidates, key=lambda e: (-selection[e], e))[:k])


def expected_choice(logits, bias, options):
  index, gates = [], []
  for row in logits.reshape(-1, logits.shape[-1]):
    scores = biased.scores_of(row, options.score)
    chosen = select(
      scores + np.asarray(bias, np.float64),
      options.num_selected_experts,
      options.num_expert_groups,
      options.num_selected_groups,
    )
    index.append(chosen)
    gates.append(biased.gates_of(scores, chosen, options.renormalize, options.gate_scale))
  return np.array(index), np.array(gates)


def expected_balance(logits, valid, options):
  """Returns sum of n * sum_e f_e P_e over the sequences of each group."""
  k, num_experts = options.num_selected_experts, options.num_experts
  totals = []
  for rows, ok in zip(np.asarray(logits, np.float64), valid, strict=True):
    total = 0.0
    for sequence in range(options.group_size):
      tokens = [s for s in range(len(rows)) if s % options.group_size == sequence and ok[s]]
      n, f, mean_prob = len(tokens), np.zeros(num_experts), np.zeros(num_experts)
      for s in tokens:
        scores = biased.scores_of(rows[s], options.score)
        mean_prob += scores / scores.sum() / n
        for e in oracle.top_k(scores, k):
          f[e] += num_experts / (k * n)
      total += n * float(f @ mean_prob)
    totals.append(total)
  return np.array(totals)


@hypothesis.given(
  st.data(),
  # Experts, groups, groups kept, K.
  st.sampled_from(
    [(1, 1, 1, 1), (4, 2, 1, 2), (6, 3, 2, 3), (4, 4, 2, 1), (6, 2, 1, 2), (3, 3, 3, 3)]
  ),
  st.sampled_from([1, 2, 3]),
  st.sampled_from(
    [('sigmoid', 'before_drop'), ('softmax', 'none'), ('sqrt_softplus', 'before_drop')]
  ),
)
def test_matches_the_oracle(data, sizes, group_size, names):
  num_experts, num_groups, num_kept, k = sizes
  score, renormalize = names
  logits, valid, bias = data.draw(biased.cases([(2, 6, num_experts)]))
  options = biased.options(
    'group_limited',
    num_experts=num_experts,
    num_selected_experts=k,
    num_expert_groups=num_groups,
    num_selected_groups=num_kept,
    group_size=group_size,
    score=score,
    renormalize=renormalize,
    gate_scale=2.5,
  )
  choice = choose(logits, valid, bias, options)
  index, gates = expected_choice(logits, bias, options)
  np.testing.assert_array_equal(choice.expert_index.reshape(index.shape), index)
  np.testing.assert_allclose(choice.gates.reshape(gates.shape), gates, rtol=3e-6)
  assert choice.chosen.all()
  expected = expected_balance(logits, valid, options)
  np.testing.assert_allclose(choice.sums['sequence_balance'], expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
  # Scores 9/10, 1/10 | 3/5, 3/5: ratings 1 and 6/5, so the second group wins although expert 0 is
  # the best of all. With the bias 3/10 on expert 1 the ratings are 13/10 and 6/5: experts 0 and 1,
  # gates 5/2 (9/10, 1/10).
  logits = jnp.log(jnp.array([[[9.0, 1 / 9, 1.5, 1.5]]]))
  valid = np.ones((1, 1), bool)
  plain = choose(logits, valid, jnp.zeros(4), OPTIONS)
  np.testing.assert_array_equal(plain.expert_index[0, 0], [2, 3])
  np.testing.assert_allclose(plain.gates[0, 0], [1.25, 1.25], rtol=1e-6)
  other = choose(logits, valid, jnp.array([0.0, 0.3, 0.0, 0.0]), OPTIONS)
  np.testing.assert_array_equal(other.expert_index[0, 0], [0, 1])
  np.testing.assert_allclose(other.gates[0, 0], [2.25, 0.25], rtol=1e-6)
  # The loss knows neither bias nor groups: top-2 of s is 0 and 2, f = 4/2 (1, 0, 1, 0), and P is
  # s / (11/5): 2 (9/10 + 3/5) / (11/5) = 15/11.
  for choice in (plain, other):
    np.testing.assert_allclose(choice.sums['sequence_balance'], [15 / 11], rtol=1e-6)


def test_other_groups_are_out_where_biased_scores_are_negative():
  # A masked score of 0 would beat them all.
  logits, valid, _ = biased.random_case()
  index = choose(logits, valid, jnp.full(4, -3.0), OPTIONS).expert_index
  assert (index // 2 == index[..., :1] // 2).all()
  np.testing.assert_array_equal(index, choose(logits, valid, jnp.zeros(4), OPTIONS).expert_index)


@pytest.mark.parametrize('score', ['sigmoid', 'softmax'])
def test_one_group_is_no_limit(score):
  logits, valid, bias = biased.random_case()
  options = biased.options('group_limited', score=score)
  one = choose(logits, valid, bias, options)
  plain = biased.options('loss_free', score=score)
  two = biased.choose('loss_free', logits, valid, bias, plain)
  np.testing.assert_array_equal(one.expert_index, two.expert_index)
  np.testing.assert_array_equal(one.gates, two.gates)


@functools.partial(jax.jit, static_argnames='options')
def loss_of(logits, valid, options):
  choice = choose(logits, valid, jnp.zeros(options.num_experts), options)
  sums = biased.sums_of(choice, valid, num_scopes=len(valid))
  return group_limited.loss(sums, {}, options)


def test_loss_is_one_at_balance_and_E_over_K_at_collapse():
  # Each token likes another pair of neighbours best: every expert is in the top 2 of two tokens.
  balanced = np.array([[np.roll([2.0, 1.0, 0.0, 0.0], s) for s in range(4)]], np.float32)
  valid = np.ones((1, 4), bool)
  np.testing.assert_allclose(loss_of(balanced, valid, OPTIONS), 1, rtol=1e-6)
  np.testing.assert_allclose(loss_of(np.zeros((1, 4, 4), np.float32), valid, OPTIONS), 1, rtol=1e-6)
  collapsed = np.tile(np.array([30, 30, -30, -30], np.float32), (1, 4, 1))
  np.testing.assert_allclose(loss_of(collapsed, valid, OPTIONS), 2, rtol=1e-6)
  np.testing.assert_array_equal(loss_of(balanced, ~valid, OPTIONS), 0)


def test_loss_sees_one_sequence_at_a_time():
  # Balanced together, collapsed each for itself: tokens 0 and 2 are of the one, 1 and 3 the other.
  logits = np.array([[[30, 30, -30, -30], [-30, -30, 30, 30]] * 2], np.float32)
  valid = np.ones((1, 4), bool)
  np.testing.assert_allclose(loss_of(logits, valid, OPTIONS), 1, rtol=1e-6)
  apart = biased.replace(OPTIONS, group_size=2)
  np.testing.assert_allclose(loss_of(logits, valid, apart), 2, rtol=1e-6)


def test_loss_and_its_gradient():
  logits, valid, _ = biased.random_case()
  options = biased.replace(OPTIONS, group_size=3)
  direction = np.random.default_rng(1).normal(size=logits.shape)

  def expected(z):
    return expected_balance(z, valid, options).sum() / valid.sum()

  value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(logits), valid, options)
  np.testing.assert_allclose(value, expected(logits), rtol=1e-5)
  slope = oracle.central_difference(expected, logits, direction)
  assert abs(slope) > 1e-3
  np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4)
  np.testing.assert_array_equal(gradient[~valid], 0)


def test_gradient_of_the_gates():
  logits, valid, bias = biased.random_case()
  cotangent, direction = np.random.default_rng(1).normal(size=(2, 2, 6, 4))
  cotangent = cotangent[..., :2]

  def value(z, b):
    return jnp.sum(choose(z, valid, b, OPTIONS).gates * cotangent)

  def expected(z):
    return np.sum(expected_choice(z, bias, OPTIONS)[1].reshape(cotangent.shape) * cotangent)

  gradient, to_bias = jax.jit(jax.grad(value, argnums=(0, 1)))(logits, bias)
  slope = oracle.central_difference(expected, logits, direction)
  np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4)
  np.testing.assert_array_equal(to_bias, 0)


def test_bias_over_a_hundred_steps():
  logits = biased.skewed_logits(num_tokens=24, num_experts=6, seed=1)
  valid = np.ones((1, 24), bool)
  valid[0, ::5] = False
  options = biased.options(
    'group_limited', num_experts=6, num_expert_groups=3, num_selected_groups=2, bias_rate=0.01
  )
  biases, counts = biased.trajectory('group_limited', logits, valid, options, 100)
  bias = np.zeros(6)
  for step in range(100):
    index, _ = expected_choice(logits, bias, options)
    expected_counts = biased.count(index, valid[0], 6)
    np.testing.assert_array_equal(counts[step], expected_counts)
    bias = biased.moved(bias, expected_counts, 'sign', 0.01)
    np.testing.assert_allclose(biases[step], bias, atol=2e-6)


def test_skewed_load_becomes_balanced():
  options = biased.options(
    'group_limited', num_experts=8, num_expert_groups=4, num_selected_groups=2, bias_rate=0.005
  )
  valid = np.ones((1, 512), bool)
  _, counts = biased.trajectory('group_limited', biased.skewed_logits(), valid, options, 300)
  assert biased.max_violation(counts[0]) > 1
  assert max(biased.max_violation(c) for c in counts[-10:]) < 0.1


def test_degenerate_inputs():
  for score in ('sigmoid', 'softmax'):
    for logits, valid in biased.DEGENERATE.values():
      biased.assert_finite('group_limited', logits, valid, biased.replace(OPTIONS, score=score))
  every = biased.options(
    'group_limited', num_selected_experts=4, num_expert_groups=2, num_selected_groups=2
  )
  biased.assert_finite('group_limited', *biased.DEGENERATE['collapse'], every)
  biased.assert_finite('group_limited', np.zeros((1, 1, 4)), np.ones((1, 1), bool), OPTIONS)
  biased.assert_indices_in_range_of_non_finite_logits('group_limited', OPTIONS)


def test_groups_of_any_number_of_tokens():
  # Five tokens of two sequences: tokens 0, 2, 4 and 1, 3.
  logits, valid, bias = biased.random_case((1, 5, 4))
  options = biased.replace(OPTIONS, group_size=2)
  sums = choose(logits, valid, bias, options).sums
  expected = expected_balance(logits, valid, options)
  np.testing.assert_allclose(sums['sequence_balance'], expected, rtol=1e-5)


def test_padding_changes_nothing():
  options = biased.replace(OPTIONS, group_size=2)
  biased.assert_blind_to_padding('group_limited', options, *biased.random_case())


def test_causal():
  assert registry.ROUTERS['group_limited'].causal
  biased.assert_causal('group_limited', OPTIONS)


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({}, None),
    ({'num_expert_groups': 3}, 'num_expert_groups'),
    ({'num_expert_groups': 8}, 'num_expert_groups'),
    ({'num_selected_groups': 3}, 'num_selected_groups'),
    ({'num_selected_experts': 3}, 'num_selected_experts'),
    ({'num_selected_experts': 1}, 'renormalize'),
  ],
)
def test_allowed(changes, field):
  wrong = group_limited.allowed(biased.replace(OPTIONS, **changes))
  assert (wrong and wrong[0]) == field
