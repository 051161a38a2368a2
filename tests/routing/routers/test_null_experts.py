"""Real and null experts against loops, and the loss that balances both."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from tests import oracle
from tests.routing.routers import token_choice

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 2), (1, 6, 3, 3)]
NUM_NULL = 2
NAME = 'null_experts'


def expected_choice(params, tokens, valid, options):
  num_experts, k = options.num_experts, options.num_selected_experts
  made = token_choice.empty(tokens, num_experts, k)
  null = made['sums']['null'] = np.zeros(len(tokens))
  for g, s in np.ndindex(tokens.shape[:2]):
    z = np.asarray(tokens[g, s], np.float64) @ np.asarray(params['router'], np.float64)
    selected = oracle.top_k(z, k)
    gates = oracle.gates(z, selected, options.softmax_order, options.renormalize)
    for i, e in enumerate(selected):
      if e < num_experts:
        made['index'][g, s, i], made['gates'][g, s, i] = e, options.gate_scale * gates[i]
      else:
        made['chosen'][g, s, i] = False
        null[g] += valid[g, s]
    made['probs'][g, s], made['logits'][g, s] = oracle.softmax(z)[:num_experts], z[:num_experts]
  return made


def expected_loss(made, valid, options):
  """With every null expert apart: each has an equal share of the null assignments, eta = tau."""
  num_experts, num_null = options.num_experts, options.num_null_experts
  tokens = max(1, valid.sum())
  counts = np.zeros(num_experts + num_null)
  for e, asked in zip(made['index'][valid].ravel(), made['chosen'][valid].ravel(), strict=True):
    counts[e] += asked
  counts[num_experts:] = made['sums']['null'].sum() / num_null
  share = counts / (options.num_selected_experts * tokens)
  prob = np.zeros(num_experts + num_null)
  for row in made['probs'][valid]:
    prob[:num_experts] += row / tokens
    prob[num_experts:] += (1 - row.sum()) / num_null / tokens
  eta = np.array([1.0] * num_experts + [options.null_balance_weight] * num_null)
  return sum(1 / eta) * sum(eta * share * prob)


def options_for(num_experts, num_selected, **changes):
  return token_choice.options(
    NAME,
    num_experts=num_experts,
    num_selected_experts=num_selected,
    num_null_experts=NUM_NULL,
    **changes,
  )


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: num_experts + NUM_NULL),
  st.sampled_from(
    [('before', 'none', 1.0), ('before', 'before_drop', 0.25), ('after', 'none', 2.0)]
  ),
)
def test_matches_the_oracle(case, mode):
  tokens, valid, num_experts, num_selected = case
  options = options_for(
    num_experts,
    num_selected,
    softmax_order=mode[0],
    renormalize=mode[1],
    gate_scale=1.5,
    null_balance_weight=mode[2],
  )
  params = {'router': np.eye(num_experts + NUM_NULL)}
  choice = token_choice.choose(NAME, options, params, tokens, valid)
  made = expected_choice(params, tokens, valid, options)
  token_choice.compare(choice, made, valid)
  loss = token_choice.objectives(NAME, options, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, expected_loss(made, valid, options), rtol=2e-5, atol=1e-6)


def test_by_hand():
  # Two real experts and two null ones, softmax 1/10, 4/10, 2/10, 3/10: expert 1 and the last null
  # one. Divided by 7/10, the null one included: gate 4/7, and 0 for nothing.
  # Loss: half of the assignments each to expert 1 and to null: 4 * (1/2 * 4/10 + 1/2 * 5/10 / 2).
  tokens = np.log([[[1.0, 4.0, 2.0, 3.0]]])
  params, valid = {'router': np.eye(4)}, np.ones((1, 1), bool)
  options = options_for(2, 2)
  choice = token_choice.choose(NAME, options, params, tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [1, 0])
  np.testing.assert_array_equal(choice.chosen[0, 0], [True, False])
  np.testing.assert_allclose(choice.gates[0, 0], [4 / 7, 0], rtol=1e-6)
  np.testing.assert_allclose(choice.router_probs[0, 0], [0.1, 0.4], rtol=1e-6)
  np.testing.assert_array_equal(choice.sums['null'], [1])
  loss = token_choice.objectives(NAME, options, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, 1.3, rtol=1e-5)
  # tau = 1/2: (2 + 2 * 2) * (1/2 * 4/10 + 1/2 * 1/2 * 5/10 / 2) = 6 * (0.2 + 0.0625).
  half = options_for(2, 2, null_balance_weight=0.5)
  loss = token_choice.objectives(NAME, half, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, 1.575, rtol=1e-5)


def test_gradients():
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  params = {'router': rng.normal(size=(3, 6)).astype(np.float32)}
  options = options_for(4, 3, null_balance_weight=0.75)

  def expected(params):
    made = expected_choice(params, tokens, valid, options)
    return token_choice.objective_values(made, valid, expected_loss(made, valid, options))

  assert 0 < expected_choice(params, tokens, valid, options)['sums']['null'].sum() < 3 * valid.sum()
  for _, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    assert (np.abs(slope) > 1e-3).all()


def test_the_loss_is_one_when_all_are_used_alike():
  # Six tokens, each sure of one of four real and two null experts.
  options = options_for(4, 1, renormalize='none')
  valid = np.ones((1, 6), bool)
  loss = token_choice.objectives(NAME, options, {'router': 200 * np.eye(6)}, np.eye(6)[None], valid)
  np.testing.assert_allclose(loss[2], 1, rtol=1e-6)
  # All null: worse than that, where the common load-balancing loss would be 0.
  all_null = np.eye(6)[None, [4, 5, 4, 5, 4, 5]]
  loss = token_choice.objectives(NAME, options, {'router': 200 * np.eye(6)}, all_null, valid)
  np.testing.assert_allclose(loss[2], 6 / 2, rtol=1e-6)


def test_the_loss_with_tau_is_one_where_null_experts_get_more():
  # Eight tokens, each sure: one for each of four real experts, two for each of two null ones.
  options = options_for(4, 1, renormalize='none', null_balance_weight=0.5)
  params, valid = {'router': 200 * np.eye(6)}, np.ones((1, 8), bool)

  def loss(chosen):
    return token_choice.objectives(NAME, options, params, np.eye(6)[None, chosen], valid)[2]

  np.testing.assert_allclose(loss([0, 1, 2, 3, 4, 4, 5, 5]), 1, rtol=1e-6)
  # One more or fewer for the null experts is worse.
  assert loss([0, 1, 2, 4, 4, 4, 5, 5]) > 1.01
  assert loss([0, 1, 2, 3, 0, 4, 5, 5]) > 1.01


def test_only_real_experts_get_slots_and_count_as_load():
  # Three tokens: two real, one real and one null, two null.
  tokens = 10.0 * np.array([[[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 1, 2]]])
  params, valid = {'router': np.eye(4)}, jnp.ones((1, 3), bool)
  choice = token_choice.choose(NAME, options_for(2, 2), params, tokens)
  sums = token_choice.sums_of(choice, valid, token_choice.keys(1))
  np.testing.assert_array_equal(sums.tokens_per_expert, [[1, 2]])
  np.testing.assert_array_equal(sums.own['null'], 3)
  np.testing.assert_array_equal(choice.gates[0, 2], 0)
  np.testing.assert_array_equal(choice.chosen[0, 2], False)


def test_equal_logits_go_to_real_experts_first():
  choice = token_choice.choose(
    NAME, options_for(2, 3), {'router': np.zeros((3, 4))}, np.ones((1, 1, 3))
  )
  np.testing.assert_array_equal(choice.expert_index[0, 0], [0, 1, 0])
  np.testing.assert_array_equal(choice.chosen[0, 0], [True, True, False])


def test_without_null_experts_it_is_top_k():
  rng = np.random.default_rng(0)
  tokens, params = rng.normal(size=(2, 5, 3)), {'router': rng.normal(size=(3, 4))}
  choice = token_choice.choose(NAME, token_choice.options(NAME), params, tokens)
  plain = token_choice.choose('top_k', token_choice.options('top_k'), params, tokens)
  for field in ('expert_index', 'gates', 'chosen', 'router_probs', 'router_logits'):
    np.testing.assert_array_equal(getattr(choice, field), getattr(plain, field))


@pytest.mark.parametrize('k', [2, 3])
@pytest.mark.parametrize('softmax_order', ['before', 'after'])
def test_degenerate_inputs(k, softmax_order):
  params = {'router': np.random.default_rng(1).normal(size=(3, 5))}
  token_choice.check_degenerate(NAME, options_for(3, k, softmax_order=softmax_order), params, 3)


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params, tokens = {'router': rng.normal(size=(3, 6))}, rng.normal(size=(2, 4, 3))
  token_choice.check_padding(NAME, options_for(4, 2), params, tokens)
  token_choice.check_causal(NAME, options_for(4, 2), params, tokens)


def test_params_and_allowed():
  router = registry.ROUTERS[NAME]
  assert router.params(options_for(4, 2), 3)['router'].shape == (3, 6)
  assert router.allowed(options_for(4, 2)) is None
  assert router.allowed(token_choice.options(NAME))[0] == 'num_null_experts'
  assert router.allowed(options_for(4, 1))[0] == 'renormalize'
  assert router.allowed(options_for(4, 2, null_balance_weight=0.0))[0] == 'null_balance_weight'
