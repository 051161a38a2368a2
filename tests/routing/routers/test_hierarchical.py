"""Two levels of top-k against loops, and what must hold between the levels."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from tests import oracle
from tests.routing.routers import token_choice

# (groups, sequences' tokens, E, K), then expert groups and how many of them are selected.
SHAPES = [(1, 1, 2, 1), (2, 3, 6, 2), (1, 5, 6, 4), (1, 4, 4, 4)]
LEVELS = {(2, 1): (2, 1), (6, 2): (3, 2), (6, 4): (2, 2), (4, 4): (2, 2)}
NAME = 'hierarchical'


def expected_choice(params, tokens, options):
  num_groups, kept = options.num_expert_groups, options.num_selected_groups
  size, per_group = options.num_experts // num_groups, options.num_selected_experts // kept
  made = token_choice.empty(tokens, options.num_experts, options.num_selected_experts)
  for g, s in np.ndindex(tokens.shape[:2]):
    x = np.asarray(tokens[g, s], np.float64)
    primary, z = x @ np.asarray(params['router_primary']), x @ np.asarray(params['router'])
    p_primary, groups = oracle.softmax(primary), oracle.top_k(primary, kept)
    selected, gates = [], []
    for i in range(num_groups):
      for j in range(size):
        within = oracle.softmax(z[i * size : (i + 1) * size])
        made['probs'][g, s, i * size + j] = p_primary[i] * within[j]
        made['logits'][g, s, i * size + j] = primary[i] + z[i * size + j]
    for rank, i in enumerate(groups):
      z_group = z[i * size : (i + 1) * size]
      experts = oracle.top_k(z_group, per_group)
      if options.softmax_order == 'after':
        among = oracle.softmax(primary[groups])[rank] * oracle.softmax(z_group[experts])
      else:
        among = p_primary[i] * oracle.softmax(z_group)[experts]
      selected.extend(i * size + experts)
      gates.extend(among)
    gates = np.array(gates)
    if options.softmax_order == 'before' and options.renormalize == 'before_drop':
      gates = gates / gates.sum()
    made['index'][g, s], made['gates'][g, s] = selected, options.gate_scale * gates
  return made


def both(num_groups, num_experts):
  """Returns params for which a token is its primary and its secondary logits."""
  eye = np.eye(num_groups + num_experts)
  return {'router_primary': eye[:, :num_groups], 'router': eye[:, num_groups:]}


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: 3 + num_experts),
  st.sampled_from([('before', 'none'), ('before', 'before_drop'), ('after', 'none')]),
)
def test_matches_the_oracle(case, mode):
  tokens, valid, num_experts, num_selected = case
  num_groups, kept = LEVELS[num_experts, num_selected]
  tokens = tokens[..., : num_groups + num_experts]
  options = token_choice.options(
    num_experts=num_experts,
    num_selected_experts=num_selected,
    num_expert_groups=num_groups,
    num_selected_groups=kept,
    softmax_order=mode[0],
    renormalize=mode[1],
    gate_scale=1.5,
  )
  params = both(num_groups, num_experts)
  choice = token_choice.choose(NAME, options, params, tokens, valid)
  token_choice.compare(choice, expected_choice(params, tokens, options), valid)


def test_by_hand():
  # Groups of experts {0, 1}, {2, 3}, {4, 5} with probabilities 1/10, 3/10, 6/10. The best two are
  # groups 2 and 1. In group 2 the experts have 1/4, 3/4: expert 5, gate 6/10 * 3/4 = 18/40. In
  # group 1 they have 4/5, 1/5: expert 2, gate 3/10 * 4/5 = 24/100. Group 0 is out, though its
  # expert 0 has all of it: its product is 1/10.
  tokens = np.log([[[1.0, 3.0, 6.0, 1e9, 1.0, 4.0, 1.0, 1.0, 3.0]]])
  options = token_choice.options(
    num_experts=6, num_expert_groups=3, num_selected_groups=2, renormalize='none'
  )
  choice = token_choice.choose(NAME, options, both(3, 6), tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [5, 2])
  np.testing.assert_allclose(choice.gates[0, 0], [0.45, 0.24], rtol=1e-6)
  expected = [0.1, 1e-10, 0.24, 0.06, 0.15, 0.45]
  np.testing.assert_allclose(choice.router_probs[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize('mode', [('before', 'none'), ('before', 'before_drop'), ('after', 'none')])
def test_gradients_reach_both_levels(mode):
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  params = {
    'router_primary': rng.normal(size=(3, 3)).astype(np.float32),
    'router': rng.normal(size=(3, 6)).astype(np.float32),
  }
  options = token_choice.options(
    num_experts=6,
    num_selected_experts=4,
    num_expert_groups=3,
    num_selected_groups=2,
    softmax_order=mode[0],
    renormalize=mode[1],
  )
  assert registry.ROUTERS[NAME].allowed(options) is None

  def expected(params):
    made = expected_choice(params, tokens, options)
    return token_choice.objective_values(made, valid, 0)

  for _, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    assert (np.abs(slope[:2]) > 1e-3).all()


def test_invariants():
  rng = np.random.default_rng(0)
  tokens = 2 * rng.normal(size=(2, 5, 11))
  options = token_choice.options(
    num_experts=8, num_selected_experts=4, num_expert_groups=4, num_selected_groups=2
  )
  params = {'router_primary': rng.normal(size=(11, 4)), 'router': rng.normal(size=(11, 8))}
  choice = token_choice.choose(NAME, options, params, tokens)
  np.testing.assert_allclose(np.sum(choice.router_probs, axis=-1), 1, rtol=1e-6)
  np.testing.assert_allclose(np.sum(choice.gates, axis=-1), 1, rtol=1e-6)
  # Two experts in each of two groups.
  group = np.asarray(choice.expert_index) // 2
  np.testing.assert_array_equal(group[..., 0::2], group[..., 1::2])
  assert (group[..., 0] != group[..., 2]).all()
  # A number added to all secondary logits of a group changes no choice and no probability.
  shifted = {**params, 'router': params['router'] + np.repeat(rng.normal(size=(11, 4)), 2, axis=1)}
  other = token_choice.choose(NAME, options, shifted, tokens)
  np.testing.assert_array_equal(other.expert_index, choice.expert_index)
  np.testing.assert_allclose(other.router_probs, choice.router_probs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('mode', [('before', 'none'), ('before', 'before_drop'), ('after', 'none')])
def test_one_group_is_top_k(mode):
  rng = np.random.default_rng(0)
  tokens, matrix = rng.normal(size=(2, 5, 3)), rng.normal(size=(3, 4))
  options = token_choice.options(softmax_order=mode[0], renormalize=mode[1])
  params = {'router_primary': np.zeros((3, 1)), 'router': matrix}
  choice = token_choice.choose(NAME, options, params, tokens)
  plain = token_choice.choose('top_k', options, {'router': matrix}, tokens)
  np.testing.assert_array_equal(choice.expert_index, plain.expert_index)
  for field in ('gates', 'router_probs', 'router_logits'):
    np.testing.assert_allclose(getattr(choice, field), getattr(plain, field), rtol=1e-6)


@pytest.mark.parametrize('k', [2, 4])
@pytest.mark.parametrize('softmax_order', ['before', 'after'])
def test_degenerate_inputs(k, softmax_order):
  rng = np.random.default_rng(1)
  params = {'router_primary': rng.normal(size=(3, 2)), 'router': rng.normal(size=(3, 4))}
  options = token_choice.options(
    num_selected_experts=k,
    num_expert_groups=2,
    num_selected_groups=2,
    softmax_order=softmax_order,
  )
  token_choice.check_degenerate(NAME, options, params, 3)


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params = {'router_primary': rng.normal(size=(3, 2)), 'router': rng.normal(size=(3, 4))}
  tokens = rng.normal(size=(2, 4, 3))
  options = token_choice.options(num_expert_groups=2, num_selected_groups=2)
  token_choice.check_padding(NAME, options, params, tokens)
  token_choice.check_causal(NAME, options, params, tokens)


def test_allowed():
  router = registry.ROUTERS[NAME]
  good = {'num_experts': 6, 'num_selected_experts': 4, 'num_expert_groups': 3}
  good |= {'num_selected_groups': 2}
  assert router.allowed(token_choice.options(**good)) is None
  assert router.allowed(token_choice.options(**good, softmax_order='after')) is None
  for changes, field in (
    ({'num_expert_groups': 1}, 'num_expert_groups'),
    ({'num_expert_groups': 4}, 'num_expert_groups'),
    ({'num_selected_groups': 0}, 'num_selected_groups'),
    ({'num_selected_groups': 4}, 'num_selected_groups'),
    ({'num_selected_experts': 3}, 'num_selected_groups'),
    ({'num_selected_experts': 6}, 'num_selected_experts'),
    ({'score': 'sigmoid'}, 'score'),
    ({'num_selected_groups': 1, 'num_selected_experts': 2}, 'renormalize'),
    ({'num_selected_experts': 2, 'softmax_order': 'after'}, 'softmax_order'),
  ):
    assert router.allowed(token_choice.options(**{**good, **changes}))[0] == field, changes


def test_one_selected_group_renormalised_would_not_learn_groups():
  # Why `allowed` rejects it: the probability of the group is in every gate and in their sum.
  rng = np.random.default_rng(2)
  params = {'router_primary': rng.normal(size=(3, 2)), 'router': rng.normal(size=(3, 4))}
  tokens, valid = rng.normal(size=(1, 4, 3)), np.ones((1, 4), bool)
  slopes = {}
  for renormalize in ('none', 'before_drop'):
    options = token_choice.options(num_expert_groups=2, renormalize=renormalize)
    gradient = token_choice.objectives(NAME, options, params, tokens, valid, jacobian=True)
    slopes[renormalize] = np.abs(gradient['router_primary'][0]).max()
  assert slopes['none'] > 1e-2
  assert slopes['before_drop'] < 1e-6
