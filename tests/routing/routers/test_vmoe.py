"""V-MoE's noisy selection, gates and load against loops, and what its load estimates."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from tests import oracle
from tests.routing.routers import token_choice

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 2), (1, 6, 4, 1), (1, 4, 3, 3)]
NAME = 'vmoe'


def normals(num_groups, size, num_experts):
  keys = token_choice.keys(num_groups)
  return np.array([jax.random.normal(key, (size, num_experts)) for key in keys], np.float64)


def phi(a):
  return (1 + math.erf(a / math.sqrt(2))) / 2


def expected_choice(params, tokens, valid, draws, options):
  num_experts, k = options.num_experts, options.num_selected_experts
  deviation = options.noise_scale / num_experts
  made = token_choice.empty(tokens, num_experts, k)
  load = made['sums']['load'] = np.zeros((len(tokens), num_experts))
  for g, s in np.ndindex(tokens.shape[:2]):
    z = np.asarray(tokens[g, s], np.float64) @ np.asarray(params['router'], np.float64)
    h = z + deviation * draws[g, s] if options.training else z
    selected = oracle.top_k(h, k)
    gates = oracle.gates(h, selected, options.softmax_order, options.renormalize)
    made['index'][g, s], made['gates'][g, s] = selected, options.gate_scale * gates
    made['probs'][g, s], made['logits'][g, s] = oracle.softmax(z), z
    for e in range(num_experts):
      if not options.training or deviation == 0:
        load[g, e] += valid[g, s] and e in selected
      elif valid[g, s]:
        load[g, e] += 1 - phi((h[selected[-1]] - z[e]) / deviation)
  return made


def expected_loss(made, valid):
  importance = made['probs'][valid].sum(0)
  load = made['sums']['load'].sum(0)
  both = token_choice.squared_variation(importance), token_choice.squared_variation(load)
  return 0.5 * sum(both)


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: num_experts),
  st.sampled_from([(True, 1.0, 'none'), (True, 3.0, 'before_drop'), (False, 1.0, 'none')]),
)
def test_matches_the_oracle(case, mode):
  tokens, valid, num_experts, num_selected = case
  options = token_choice.options(
    NAME,
    num_experts=num_experts,
    num_selected_experts=num_selected,
    training=mode[0],
    noise_scale=mode[1],
    renormalize=mode[2],
    gate_scale=1.5,
  )
  params, draws = {'router': np.eye(num_experts)}, normals(*valid.shape, num_experts)
  choice = token_choice.choose(NAME, options, params, tokens, valid)
  made = expected_choice(params, tokens, valid, draws, options)
  token_choice.compare(choice, made, valid, rtol=3e-5)
  loss = token_choice.objectives(NAME, options, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, expected_loss(made, valid), rtol=1e-4, atol=1e-5)


def test_by_hand():
  # Evaluation, logits ln 1, ln 2, ln 5: experts 2 and 1, gates 5/8 and 2/8 as they are.
  # CV^2 of the importance (1/8, 2/8, 5/8): mean 1/3, mean square 30/64 / 3 = 5/32, so
  # 45/32 - 1 = 13/32. CV^2 of the load (0, 1, 1): 2/3 * 9/4 - 1 = 1/2. Half of it all: 29/64.
  options = token_choice.options(NAME, num_experts=3, training=False, renormalize='none')
  params, tokens = {'router': np.eye(3)}, np.log([[[1.0, 2.0, 5.0]]])
  choice = token_choice.choose(NAME, options, params, tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 1])
  np.testing.assert_allclose(choice.gates[0, 0], [5 / 8, 2 / 8], rtol=1e-6)
  np.testing.assert_array_equal(choice.sums['load'][0], [0, 1, 1])
  loss = token_choice.objectives(NAME, options, params, tokens, np.ones((1, 1), bool))[2]
  np.testing.assert_allclose(loss, 29 / 64, rtol=1e-5)


def test_load_by_hand():
  # The K-th largest noisy logit itself: with E = K = 1 and noise n, eta - z = n, so the load is
  # 1 - Phi(n).
  options = token_choice.options(NAME, num_experts=1, num_selected_experts=1, renormalize='none')
  choice = token_choice.choose(NAME, options, {'router': np.ones((1, 1))}, np.ones((1, 1, 1)))
  np.testing.assert_allclose(choice.sums['load'][0, 0], phi(-normals(1, 1, 1)[0, 0, 0]), rtol=1e-5)


def test_what_the_load_estimates():
  # One token; the noise of one expert at a time is drawn again, that of the others stays. For an
  # expert that is not selected the load is the probability of being selected; for a selected one
  # that of exceeding the K-th largest as it stands, less than that of being selected.
  num_experts, rng, num_draws = 4, np.random.default_rng(0), 20000
  options = token_choice.options(NAME, num_experts=num_experts, renormalize='none', noise_scale=4.0)
  tokens = rng.normal(size=(6, 1, num_experts))
  choice = token_choice.choose(NAME, options, {'router': np.eye(num_experts)}, tokens)
  load, draws = np.asarray(choice.sums['load']), normals(6, 1, num_experts)
  for g in range(6):
    fixed = tokens[g, 0] + draws[g, 0]
    for e in range(num_experts):
      h = np.tile(fixed, (num_draws, 1))
      h[:, e] = tokens[g, 0, e] + rng.normal(size=num_draws)
      is_selected = np.sum(h > h[:, e : e + 1], axis=1) < 2
      share = np.mean(h[:, e] > np.sort(fixed)[-2])
      error = 4.5 * np.sqrt(load[g, e] * (1 - load[g, e]) / num_draws) + 1e-4
      np.testing.assert_allclose(load[g, e], share, atol=error)
      if e in choice.expert_index[g, 0]:
        assert load[g, e] < np.mean(is_selected)
      else:
        np.testing.assert_allclose(load[g, e], np.mean(is_selected), atol=error)


def test_gradients():
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  params = {'router': rng.normal(size=(3, 4)).astype(np.float32)}
  options = token_choice.options(NAME, renormalize='none', noise_scale=2.0)

  def expected(params):
    made = expected_choice(params, tokens, valid, normals(2, 4, 4), options)
    return token_choice.objective_values(made, valid, expected_loss(made, valid))

  for _, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    assert (np.abs(slope) > 1e-3).all()


def test_noise_has_the_declared_size():
  # All logits 0 and K = E: log gates are the noise, up to one number per token.
  options = token_choice.options(NAME, num_selected_experts=4, renormalize='none', noise_scale=2.0)
  choice = token_choice.choose(NAME, options, {'router': np.zeros((3, 4))}, np.ones((1, 3000, 3)))
  noise = np.log(choice.gates[0])
  # Variance within a token, unbiased: (2 / 4)^2.
  np.testing.assert_allclose(np.mean(np.var(noise, axis=-1, ddof=1)), 0.25, rtol=0.07)


@pytest.mark.parametrize(
  ('num_experts', 'k', 'training', 'noise_scale'),
  [(4, 2, True, 1.0), (2, 2, True, 1.0), (4, 1, False, 1.0), (4, 2, True, 0.0)],
)
def test_degenerate_inputs(num_experts, k, training, noise_scale):
  params = {'router': np.random.default_rng(1).normal(size=(3, num_experts))}
  options = token_choice.options(
    NAME,
    num_experts=num_experts,
    num_selected_experts=k,
    training=training,
    noise_scale=noise_scale,
    renormalize='none',
  )
  token_choice.check_degenerate(NAME, options, params, 3)


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params, tokens = {'router': rng.normal(size=(3, 4))}, rng.normal(size=(2, 4, 3))
  options = token_choice.options(NAME, renormalize='none')
  token_choice.check_padding(NAME, options, params, tokens)
  token_choice.check_causal(NAME, options, params, tokens)


def test_evaluation_draws_nothing():
  rng = np.random.default_rng(2)
  params, tokens = {'router': rng.normal(size=(3, 4))}, rng.normal(size=(2, 20, 3))
  for training in (True, False):
    options = token_choice.options(NAME, training=training, renormalize='none')
    gates = [token_choice.choose(NAME, options, params, tokens, seed=s).gates for s in (0, 1)]
    assert np.array_equal(*gates) != training


def test_allowed():
  router = registry.ROUTERS[NAME]
  assert router.allowed(token_choice.options(NAME, renormalize='none')) is None
  assert router.allowed(token_choice.options(NAME)) is None
  for changes, field in (
    ({'num_selected_experts': 1}, 'renormalize'),
    ({'noise_scale': -1.0}, 'noise_scale'),
  ):
    assert router.allowed(token_choice.options(NAME, **changes))[0] == field
