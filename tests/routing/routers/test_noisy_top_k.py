"""Noisy top-k gating: selection, gates and sums against loops, and what the load estimates."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from tests import oracle
from tests.routing.routers import token_choice

SHAPES = [(1, 1, 2, 2), (2, 3, 5, 2), (1, 6, 4, 3), (1, 4, 3, 3)]
NAME = 'noisy_top_k'


def normals(num_groups, size, num_experts):
  keys = token_choice.keys(num_groups)
  return np.array([jax.random.normal(key, (size, num_experts)) for key in keys], np.float64)


def phi(a):
  return (1 + math.erf(a / math.sqrt(2))) / 2


def softplus(a):
  return max(a, 0) + math.log1p(math.exp(-abs(a)))


def threshold(h, selected, e):
  """Returns what h_e must exceed to be among the selected, given the other h."""
  others = sorted((h[i] for i in range(len(h)) if i != e), reverse=True)
  return others[len(selected) - 1]


def expected_choice(params, tokens, valid, draws, options):
  num_experts, k = options.num_experts, options.num_selected_experts
  made = token_choice.empty(tokens, num_experts, k)
  importance = made['sums']['importance'] = np.zeros((len(tokens), num_experts))
  load = made['sums']['load'] = np.zeros((len(tokens), num_experts))
  for g, s in np.ndindex(tokens.shape[:2]):
    x = np.asarray(tokens[g, s], np.float64)
    z = x @ np.asarray(params['router'], np.float64)
    deviation = [softplus(r) + options.noise_floor for r in x @ np.asarray(params['noise'])]
    h = z + draws[g, s] * deviation if options.training else z
    selected = oracle.top_k(h, k)
    gates = oracle.softmax(h[selected])
    made['index'][g, s], made['gates'][g, s] = selected, options.gate_scale * gates
    made['probs'][g, s], made['logits'][g, s] = oracle.softmax(z), z
    if not valid[g, s]:
      continue
    for e, gate in zip(selected, gates, strict=True):
      importance[g, e] += gate
    for e in range(num_experts):
      if options.training and k < num_experts:
        load[g, e] += phi((z[e] - threshold(h, selected, e)) / deviation[e])
      else:
        load[g, e] += e in selected
  return made


def expected_loss(made):
  return sum(token_choice.squared_variation(total.sum(0)) for total in made['sums'].values())


def both(num_experts):
  """Returns params for which a token is its logits and the raw sizes of its noise."""
  return {
    'router': np.eye(2 * num_experts)[:, :num_experts],
    'noise': np.eye(2 * num_experts)[:, num_experts:],
  }


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: 2 * num_experts),
  st.sampled_from([(True, 0.0), (True, 0.01), (False, 0.0)]),
)
def test_matches_the_oracle(case, mode):
  tokens, valid, num_experts, num_selected = case
  options = token_choice.options(
    NAME,
    num_experts=num_experts,
    num_selected_experts=num_selected,
    training=mode[0],
    noise_floor=mode[1],
    gate_scale=1.5,
  )
  draws = normals(*valid.shape, num_experts)
  choice = token_choice.choose(NAME, options, both(num_experts), tokens, valid)
  made = expected_choice(both(num_experts), tokens, valid, draws, options)
  token_choice.compare(choice, made, valid, rtol=2e-5)
  loss = token_choice.objectives(NAME, options, both(num_experts), tokens, valid)[2]
  np.testing.assert_allclose(loss, expected_loss(made), rtol=1e-4, atol=1e-5)


def test_by_hand():
  # Evaluation, logits ln 1, ln 2, ln 6: experts 2 and 1, gates 6/8 and 2/8, counts 0, 1, 1.
  # CV^2 of the importance (0, 1/4, 3/4): mean 1/3, mean square (1/16 + 9/16) / 3 = 5/24, so
  # 5/24 * 9 - 1 = 7/8. CV^2 of the load (0, 1, 1): 2/3 * 9/4 - 1 = 1/2. In all 11/8.
  options = token_choice.options(NAME, num_experts=3, training=False)
  params = {'router': np.eye(3), 'noise': np.zeros((3, 3))}
  tokens = np.log([[[1.0, 2.0, 6.0]]])
  choice = token_choice.choose(NAME, options, params, tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 1])
  np.testing.assert_allclose(choice.gates[0, 0], [6 / 8, 2 / 8], rtol=1e-6)
  np.testing.assert_allclose(choice.router_probs[0, 0], [1 / 9, 2 / 9, 6 / 9], rtol=1e-6)
  np.testing.assert_array_equal(choice.sums['load'][0], [0, 1, 1])
  loss = token_choice.objectives(NAME, options, params, tokens, np.ones((1, 1), bool))[2]
  np.testing.assert_allclose(loss, 11 / 8, rtol=1e-5)


def test_load_is_the_probability_of_being_selected():
  # One token; the noise of one expert at a time is drawn again, that of the others stays.
  num_experts, rng = 4, np.random.default_rng(0)
  options = token_choice.options(NAME, num_experts=num_experts)
  tokens = rng.normal(size=(8, 1, 2 * num_experts))
  load = np.asarray(token_choice.choose(NAME, options, both(num_experts), tokens).sums['load'])
  draws = normals(8, 1, num_experts)
  num_draws = 20000
  for g in range(8):
    z, deviation = tokens[g, 0, :num_experts], np.logaddexp(0, tokens[g, 0, num_experts:])
    for e in range(num_experts):
      h = np.tile(z + draws[g, 0] * deviation, (num_draws, 1))
      h[:, e] = z[e] + rng.normal(size=num_draws) * deviation[e]
      share = np.mean(np.sum(h > h[:, e : e + 1], axis=1) < 2)
      error = 4.5 * np.sqrt(load[g, e] * (1 - load[g, e]) / num_draws) + 1e-4
      np.testing.assert_allclose(load[g, e], share, atol=error)


def test_gradients():
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  params = {name: rng.normal(size=(3, 4)).astype(np.float32) for name in ('router', 'noise')}
  options = token_choice.options(NAME, gate_scale=2.0, noise_floor=0.01)

  def expected(params):
    made = expected_choice(params, tokens, valid, normals(2, 4, 4), options)
    return token_choice.objective_values(made, valid, expected_loss(made))

  for _, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    # The noise reaches the gates and the loss, not the probabilities.
    assert (np.abs(slope[[0, 2]]) > 1e-3).all()


def test_all_experts_selected_leaves_the_load_without_gradient():
  options = token_choice.options(NAME, num_experts=2)
  tokens = np.random.default_rng(0).normal(size=(2, 3, 4))
  choice = token_choice.choose(NAME, options, both(2), tokens)
  np.testing.assert_array_equal(choice.sums['load'], 3)


def test_starts_at_zero_with_noise_that_balances():
  # Logits 0 and deviation ln 2 everywhere: only the noise chooses, so loads are alike.
  router = registry.ROUTERS[NAME]
  options = token_choice.options(NAME)
  weights = router.params(options, 3)
  assert {name: (w.shape, w.init) for name, w in weights.items()} == {
    'router': ((3, 4), 'zeros'),
    'noise': ((3, 4), 'zeros'),
  }
  params = {name: np.zeros(weight.shape) for name, weight in weights.items()}
  choice = token_choice.choose(NAME, options, params, np.ones((1, 2000, 3)))
  counts = np.bincount(np.ravel(choice.expert_index), minlength=4)
  np.testing.assert_allclose(counts, 1000, atol=4 * np.sqrt(2000 / 4))


@pytest.mark.parametrize(('num_experts', 'training'), [(2, True), (4, True), (4, False)])
def test_degenerate_inputs(num_experts, training):
  rng = np.random.default_rng(1)
  params = {name: rng.normal(size=(3, num_experts)) for name in ('router', 'noise')}
  options = token_choice.options(NAME, num_experts=num_experts, training=training)
  token_choice.check_degenerate(NAME, options, params, 3)


def test_no_noise_left_is_finite():
  # softplus(-300) is 0 in float32.
  options = token_choice.options(NAME)
  params = {'router': np.ones((3, 4)), 'noise': np.full((3, 4), -100.0)}
  token_choice.check_finite(NAME, options, params, np.ones((1, 3, 3)), np.ones((1, 3), bool))


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params = {name: rng.normal(size=(3, 4)) for name in ('router', 'noise')}
  tokens = rng.normal(size=(2, 4, 3))
  token_choice.check_padding(NAME, token_choice.options(NAME), params, tokens)
  token_choice.check_causal(NAME, token_choice.options(NAME), params, tokens)


def test_evaluation_draws_nothing():
  rng = np.random.default_rng(2)
  params = {name: rng.normal(size=(3, 4)) for name in ('router', 'noise')}
  tokens = rng.normal(size=(2, 20, 3))
  for training in (True, False):
    options = token_choice.options(NAME, training=training)
    chosen = [
      token_choice.choose(NAME, options, params, tokens, seed=seed).expert_index for seed in (0, 1)
    ]
    assert np.array_equal(*chosen) != training


def test_allowed():
  router = registry.ROUTERS[NAME]
  assert router.allowed(token_choice.options(NAME)) is None
  for changes, field in (
    ({'num_selected_experts': 1, 'renormalize': 'none'}, 'num_selected_experts'),
    ({'renormalize': 'none'}, 'softmax_order'),
  ):
    assert router.allowed(token_choice.options(NAME, **changes))[0] == field
  assert (
    router.allowed(token_choice.options(NAME, renormalize='none', softmax_order='after')) is None
  )
