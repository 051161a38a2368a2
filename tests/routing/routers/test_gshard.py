"""GShard: gates, the draw of the second choice, and its loss on first choices, against loops."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from moe_jax.routing.routers import gshard
from tests import oracle
from tests.routing.routers import token_choice

SHAPES = [(1, 1, 2, 2), (2, 3, 5, 2), (1, 6, 4, 2)]
NAME = 'gshard'


def uniforms(num_groups, size):
  return np.array([jax.random.uniform(key, (size,)) for key in token_choice.keys(num_groups)])


def expected_choice(params, tokens, valid, draws, options):
  made = token_choice.empty(tokens, options.num_experts, 2)
  first = made['sums']['first_choices'] = np.zeros((len(tokens), options.num_experts))
  for g, s in np.ndindex(tokens.shape[:2]):
    z = np.asarray(tokens[g, s], np.float64) @ np.asarray(params['router'], np.float64)
    p = oracle.softmax(z)
    best, next_best = oracle.top_k(z, 2)
    g1, g2 = p[best] / (p[best] + p[next_best]), p[next_best] / (p[best] + p[next_best])
    made['index'][g, s] = best, next_best
    made['gates'][g, s] = options.gate_scale * g1, options.gate_scale * g2
    made['probs'][g, s], made['logits'][g, s] = p, z
    if options.training and options.second_choice != 'all':
      share = {'random': 2 * g2, 'threshold': min(1, g2 / 0.2)}[options.second_choice]
      made['chosen'][g, s, 1] = draws[g, s] < share
    if valid[g, s]:
      first[g, best] += 1
  return made


def expected_loss(made, valid):
  num_experts = made['probs'].shape[-1]
  tokens = max(1, valid.sum())
  first = made['sums']['first_choices'].sum(0) / tokens
  return num_experts * sum(first * made['probs'][valid].sum(0) / tokens)


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: num_experts),
  st.sampled_from([('random', True), ('threshold', True), ('all', True), ('random', False)]),
)
def test_matches_the_oracle(case, mode):
  tokens, valid, num_experts, _ = case
  second_choice, training = mode
  options = token_choice.options(
    NAME, num_experts=num_experts, second_choice=second_choice, training=training, gate_scale=1.5
  )
  params = {'router': np.eye(num_experts)}
  draws = uniforms(*valid.shape)
  choice = token_choice.choose(NAME, options, params, tokens, valid)
  made = expected_choice(params, tokens, valid, draws, options)
  token_choice.compare(choice, made, valid)
  loss = token_choice.objectives(NAME, options, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, expected_loss(made, valid), rtol=1e-5)


def test_by_hand():
  # Softmax 1/8, 2/8, 5/8: first expert 2, second expert 1, gates 5/7 and 2/7.
  # Twice the second gate is 4/7; (2/7) / 0.2 > 1, so `threshold` always takes it.
  tokens = np.log(np.tile([1.0, 2.0, 5.0], (1, 4000, 1)))
  options = token_choice.options(NAME, num_experts=3)
  choice = token_choice.choose(NAME, options, {'router': np.eye(3)}, tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 1])
  np.testing.assert_allclose(choice.gates[0, 0], [5 / 7, 2 / 7], rtol=1e-6)
  assert choice.chosen[..., 0].all()
  # Four standard errors of a share of 4/7 in 4000 draws.
  error = 4 * np.sqrt(4 / 7 * 3 / 7 / 4000)
  np.testing.assert_allclose(np.mean(choice.chosen[..., 1]), 4 / 7, atol=error)
  options = dataclasses.replace(options, second_choice='threshold')
  assert token_choice.choose(NAME, options, {'router': np.eye(3)}, tokens).chosen.all()
  # The loss: all first choices are expert 2's: 3 * (1 * 5/8).
  loss = token_choice.objectives(
    NAME, options, {'router': np.eye(3)}, tokens, np.ones((1, 4000), bool)
  )
  np.testing.assert_allclose(loss[2], 15 / 8, rtol=1e-5)


def test_threshold_is_a_probability_below_it():
  # Softmax 0.9 and 0.1: the second choice is taken with probability 0.1 / 0.2.
  tokens = np.log(np.tile([0.1, 0.9], (1, 4000, 1)))
  options = token_choice.options(NAME, num_experts=2, second_choice='threshold')
  choice = token_choice.choose(NAME, options, {'router': np.eye(2)}, tokens)
  np.testing.assert_allclose(np.mean(choice.chosen[..., 1]), 0.5, atol=4 * 0.5 / np.sqrt(4000))


def test_equal_gates_always_take_the_second_choice():
  # 2 g_2 = 1 and U(0, 1) < 1.
  options = token_choice.options(NAME, num_experts=4)
  choice = token_choice.choose(NAME, options, {'router': np.zeros((3, 4))}, np.ones((1, 500, 3)))
  assert choice.chosen.all()
  np.testing.assert_array_equal(choice.expert_index[0, 0], [0, 1])


def test_gradients():
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  params = {'router': rng.normal(size=(3, 4)).astype(np.float32)}
  options = token_choice.options(NAME, gate_scale=2.0)

  def expected(params):
    made = expected_choice(params, tokens, valid, uniforms(2, 4), options)
    return token_choice.objective_values(made, valid, expected_loss(made, valid))

  for _, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    assert (np.abs(slope) > 1e-3).all()


def test_loss_is_one_at_balance_and_e_at_collapse():
  options = token_choice.options(NAME)
  # Each of four tokens is sure of its own expert; then all of expert 0.
  valid = np.ones((1, 4), bool)
  params = {'router': 200 * np.eye(4)}
  loss = token_choice.objectives(NAME, options, params, np.eye(4)[None], valid)[2]
  np.testing.assert_allclose(loss, 1, rtol=1e-6)
  loss = token_choice.objectives(NAME, options, params, np.eye(4)[None, [0, 0, 0, 0]], valid)[2]
  np.testing.assert_allclose(loss, 4, rtol=1e-6)


@pytest.mark.parametrize('num_experts', [2, 4])
def test_degenerate_inputs(num_experts):
  params = {'router': np.random.default_rng(1).normal(size=(3, num_experts))}
  options = token_choice.options(NAME, num_experts=num_experts)
  token_choice.check_degenerate(NAME, options, params, 3)


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params, tokens = {'router': rng.normal(size=(3, 4))}, rng.normal(size=(2, 4, 3))
  options = token_choice.options(NAME)
  token_choice.check_padding(NAME, options, params, tokens)
  token_choice.check_causal(NAME, options, params, tokens)


def test_evaluation_draws_nothing():
  rng = np.random.default_rng(2)
  params, tokens = {'router': rng.normal(size=(3, 4))}, 3 * rng.normal(size=(2, 20, 3))
  for training, drawn in ((True, True), (False, False)):
    options = token_choice.options(NAME, training=training)
    chosen = [
      np.asarray(token_choice.choose(NAME, options, params, tokens, seed=seed).chosen)
      for seed in (0, 1)
    ]
    assert np.array_equal(*chosen) != drawn
    assert chosen[0].all() != drawn


def test_allowed():
  router = registry.ROUTERS[NAME]
  assert router.allowed(token_choice.options(NAME)) is None
  for changes, field in (
    ({'num_selected_experts': 1, 'renormalize': 'none'}, 'num_selected_experts'),
    ({'renormalize': 'after_drop'}, 'renormalize'),
  ):
    assert router.allowed(token_choice.options(NAME, **changes))[0] == field
  with pytest.raises(ValueError, match="second_choice='never'"):
    options = token_choice.options(NAME, second_choice='never')
    token_choice.choose(NAME, options, {'router': np.eye(4)}, np.ones((1, 1, 4)))
  with pytest.raises(ValueError, match='num_selected_experts=3'):
    options = token_choice.options(NAME, num_selected_experts=3)
    token_choice.choose(NAME, options, {'router': np.eye(4)}, np.ones((1, 1, 4)))
  assert gshard.SECOND_CHOICES == ('random', 'threshold', 'all')
