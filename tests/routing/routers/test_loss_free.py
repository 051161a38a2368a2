"""The selection bias against the oracle: choices, gates, and the bias over many steps."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from moe_jax.routing.routers import loss_free
from tests import oracle
from tests.routing.routers import biased

SHAPES = [(1, 1, 1), (1, 3, 2), (2, 4, 4), (1, 7, 5)]
choose = functools.partial(biased.choose, 'loss_free')


def expected_choice(logits, bias, options):
  """Returns index and gates of all tokens, each by itself."""
  index, gates = [], []
  for row in logits.reshape(-1, logits.shape[-1]):
    scores = biased.scores_of(row, options.score)
    selection = biased.biased(scores, np.asarray(bias, np.float64), options.bias_update)
    chosen = oracle.top_k(selection, options.num_selected_experts)
    index.append(chosen)
    gates.append(biased.gates_of(scores, chosen, options.renormalize, options.gate_scale))
  return np.array(index), np.array(gates)


@hypothesis.given(
  biased.cases(SHAPES),
  st.sampled_from([1, 2, 5]),
  st.sampled_from(
    [
      ('sigmoid', 'before_drop', 'sign'),
      ('softmax', 'none', 'sign'),
      ('sqrt_softplus', 'before_drop', 'sign'),
      ('sigmoid', 'none', 'multiplicative'),
    ]
  ),
)
def test_matches_the_oracle(case, k, names):
  logits, valid, bias = case
  score, renormalize, bias_update = names
  num_experts = logits.shape[-1]
  options = biased.options(
    'loss_free',
    num_experts=num_experts,
    num_selected_experts=min(k, num_experts),
    score=score,
    renormalize=renormalize,
    bias_update=bias_update,
    gate_scale=1.5,
  )
  choice = choose(logits, valid, bias, options)
  index, gates = expected_choice(logits, bias, options)
  np.testing.assert_array_equal(choice.expert_index.reshape(index.shape), index)
  np.testing.assert_allclose(choice.gates.reshape(gates.shape), gates, rtol=3e-6)
  assert choice.chosen.all()
  assert choice.sums == {}
  np.testing.assert_array_equal(choice.router_logits, logits)
  for row, probs in zip(
    logits.reshape(-1, num_experts), choice.router_probs.reshape(-1, num_experts), strict=True
  ):
    scores = biased.scores_of(row, score)
    np.testing.assert_allclose(probs, scores / scores.sum(), rtol=3e-6)


def test_by_hand():
  # Scores 1/2, 3/4, 4/5, 9/10; biased 1/2, 3/4, 4/5, 9/10 - 3/10 = 6/10: experts 2 and 1. Gates
  # without the bias: (4/5, 3/4) / (31/20) = 16/31, 15/31, times 2.
  logits = jnp.log(jnp.array([[[1.0, 3.0, 4.0, 9.0]]]))
  bias = jnp.array([0.0, 0.0, 0.0, -0.3])
  choice = choose(logits, np.ones((1, 1), bool), bias, biased.options('loss_free', gate_scale=2.0))
  np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 1])
  np.testing.assert_allclose(choice.gates[0, 0], [32 / 31, 30 / 31], rtol=1e-6)


@pytest.mark.parametrize(
  ('bias_update', 'expected'),
  [
    # Counts 6, 4, 2, 4: the mean is 4, mean - count is -2, 0, 2, 0; u = 1/10.
    ('sign', [0.4, 0.5, 0.6, 0.5]),
    ('proportional', [0.45, 0.5, 0.55, 0.5]),
    ('multiplicative', [0.45, 0.5, 0.55, 0.5]),
    ('centred', [0.4, 0.5, 0.6, 0.5]),
  ],
)
def test_update_by_hand(bias_update, expected):
  options = biased.options('loss_free', bias_update=bias_update, bias_rate=0.1)
  sums = sums_with([6.0, 4.0, 2.0, 4.0])
  after = loss_free.update({'bias': jnp.full(4, 0.5)}, sums, options)
  np.testing.assert_allclose(after['bias'], expected, rtol=1e-6)


def sums_with(counts):
  """Returns sums with these assignments, half of them in each of two scopes."""
  choice = choose(np.zeros((2, 2, 4), np.float32), np.ones((2, 2), bool), jnp.zeros(4), OPTIONS)
  sums = biased.sums_of(choice, jnp.ones((2, 2), bool), num_scopes=2)
  halves = jnp.broadcast_to(jnp.array(counts) / 2, (2, 4))
  return sums._replace(tokens_per_expert=halves)


OPTIONS = biased.options('loss_free')


def test_centred_keeps_the_mean_where_sign_does_not():
  # Counts 13, 1, 1, 1: the mean is 4. Signs -1, 1, 1, 1 have mean 1/2.
  for bias_update, expected in (('sign', [-1, 1, 1, 1]), ('centred', [-1.5, 0.5, 0.5, 0.5])):
    options = biased.options('loss_free', bias_update=bias_update, bias_rate=1.0)
    after = loss_free.update({'bias': jnp.zeros(4)}, sums_with([13.0, 1.0, 1.0, 1.0]), options)
    np.testing.assert_allclose(after['bias'], expected, rtol=1e-6)


@pytest.mark.parametrize('bias_update', loss_free.BIAS_UPDATES)
def test_balance_and_no_tokens_move_nothing(bias_update):
  options = biased.options('loss_free', bias_update=bias_update)
  for counts in ([4.0] * 4, [0.0] * 4):
    start = {'bias': jnp.array([0.5, 1.0, 2.0, -3.0])}
    after = loss_free.update(start, sums_with(counts), options)
    np.testing.assert_array_equal(after['bias'], start['bias'])


@pytest.mark.parametrize('bias_update', loss_free.BIAS_UPDATES)
def test_bias_over_a_hundred_steps(bias_update):
  logits = biased.skewed_logits(num_tokens=24, num_experts=6, seed=1)
  valid = np.ones((1, 24), bool)
  valid[0, ::5] = False
  options = biased.options(
    'loss_free', num_experts=6, num_selected_experts=2, bias_update=bias_update, bias_rate=0.01
  )
  biases, counts = biased.trajectory('loss_free', logits, valid, options, 100)
  bias = np.ones(6) if bias_update == 'multiplicative' else np.zeros(6)
  for step in range(100):
    index, _ = expected_choice(logits, bias, options)
    expected_counts = biased.count(index, valid[0], 6)
    np.testing.assert_array_equal(counts[step], expected_counts)
    bias = biased.moved(bias, expected_counts, bias_update, 0.01)
    np.testing.assert_allclose(biases[step], bias, atol=2e-6)
  assert np.abs(bias - bias.mean()).max() > 0.05


@pytest.mark.parametrize('bias_update', loss_free.BIAS_UPDATES)
def test_skewed_load_becomes_balanced(bias_update):
  options = biased.options('loss_free', num_experts=8, bias_update=bias_update, bias_rate=0.005)
  valid = np.ones((1, 512), bool)
  _, counts = biased.trajectory('loss_free', biased.skewed_logits(), valid, options, 300)
  assert biased.max_violation(counts[0]) > 1
  assert max(biased.max_violation(c) for c in counts[-10:]) < 0.1


def test_gradient_of_the_gates():
  logits, valid, bias = biased.random_case()
  cotangent, direction = np.random.default_rng(1).normal(size=(2, 2, 6, 4))
  cotangent = cotangent[..., :2]
  options = biased.options('loss_free', gate_scale=2.5)

  def value(z, b):
    return jnp.sum(choose(z, valid, b, options).gates * cotangent)

  def expected(z):
    return np.sum(expected_choice(z, bias, options)[1].reshape(cotangent.shape) * cotangent)

  gradient, to_bias = jax.jit(jax.grad(value, argnums=(0, 1)))(logits, bias)
  slope = oracle.central_difference(expected, logits, direction)
  np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4)
  np.testing.assert_array_equal(to_bias, 0)


def test_degenerate_inputs():
  for score in ('sigmoid', 'softmax'):
    options = biased.options('loss_free', score=score)
    for logits, valid in biased.DEGENERATE.values():
      biased.assert_finite('loss_free', logits, valid, options)
  every = biased.options('loss_free', num_selected_experts=4)
  biased.assert_finite('loss_free', *biased.DEGENERATE['collapse'], every)
  biased.assert_finite('loss_free', np.zeros((1, 1, 4)), np.ones((1, 1), bool), OPTIONS)
  biased.assert_indices_in_range_of_non_finite_logits('loss_free', OPTIONS)


def test_padding_changes_nothing():
  biased.assert_blind_to_padding('loss_free', OPTIONS, *biased.random_case())


def test_causal():
  assert registry.ROUTERS['loss_free'].causal
  biased.assert_causal('loss_free', OPTIONS)


def test_evaluation_chooses_as_training_does():
  logits, valid, bias = biased.random_case()
  one = choose(logits, valid, bias, OPTIONS)
  two = choose(logits, valid, bias, biased.replace(OPTIONS, training=False))
  np.testing.assert_array_equal(one.expert_index, two.expert_index)
  np.testing.assert_array_equal(one.gates, two.gates)


@pytest.mark.parametrize(
  ('changes', 'field'),
  [
    ({}, None),
    ({'num_selected_experts': 1, 'renormalize': 'none'}, None),
    ({'num_selected_experts': 1}, 'renormalize'),
    ({'renormalize': 'after_drop'}, 'renormalize'),
    ({'bias_rate': 1.0}, None),
    ({'bias_rate': 1.0, 'bias_update': 'multiplicative'}, 'bias_rate'),
  ],
)
def test_allowed(changes, field):
  wrong = loss_free.allowed(biased.options('loss_free', **changes))
  assert (wrong and wrong[0]) == field


def test_names_the_bad_value():
  options = biased.options('loss_free', bias_update='never')
  with pytest.raises(ValueError, match="bias_update='never'"):
    loss_free.update({'bias': jnp.zeros(4)}, sums_with([1.0] * 4), options)
  with pytest.raises(ValueError, match="bias_update='never'"):
    choose(*biased.random_case(), options)
