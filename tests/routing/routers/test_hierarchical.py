"""Two levels of noisy top-k and their loss against loops, and what must hold between the levels."""

import dataclasses
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import registry
from tests import oracle
from tests.routing.routers import token_choice

# (groups, sequences' tokens, E, K), then expert groups and how many of them are selected. In turn:
# all experts of a group selected, both levels partly, all groups, all of all, several of each.
SHAPES = [(1, 1, 2, 1), (2, 3, 6, 2), (1, 5, 6, 4), (1, 4, 4, 4), (2, 3, 9, 4)]
LEVELS = {(2, 1): (2, 1), (6, 2): (3, 2), (6, 4): (2, 2), (4, 4): (2, 2), (9, 4): (3, 2)}
MODES = [('before', 'none'), ('before', 'before_drop'), ('after', 'none')]
NAME = 'hierarchical'


def normals(num_groups, size, options):
  """Returns the draws [G, S, group] of the primary level, [G, S, rank of group, expert in it]."""
  num_expert_groups, rows = options.num_expert_groups, size * options.num_selected_groups
  in_group = options.num_experts // num_expert_groups
  keys = [jax.random.split(key) for key in token_choice.keys(num_groups)]
  primary = [jax.random.normal(key, (size, num_expert_groups)) for key, _ in keys]
  secondary = [jax.random.normal(key, (rows, in_group)) for _, key in keys]
  shape = (num_groups, size, options.num_selected_groups, in_group)
  return np.array(primary, np.float64), np.array(secondary, np.float64).reshape(shape)


def phi(a):
  return (1 + math.erf(a / math.sqrt(2))) / 2


def softplus(a):
  return max(a, 0) + math.log1p(math.exp(-abs(a)))


def noisy_top_k(z, raw, draws, k, options):
  """Returns h, the k selected, and of each the probability of being selected."""
  deviation = [softplus(r) + options.noise_floor for r in raw]
  h = z + draws * deviation if options.training else z
  selected, probability = oracle.top_k(h, k), np.zeros(len(z))
  for e in range(len(z)):
    if options.training and k < len(z):
      # What h_e must exceed: the k-th largest of the others.
      others = sorted((h[i] for i in range(len(h)) if i != e), reverse=True)
      probability[e] = phi((z[e] - others[k - 1]) / deviation[e])
    else:
      probability[e] = e in selected
  return h, selected, probability


def expected_choice(params, tokens, valid, options):
  num_groups, kept = options.num_expert_groups, options.num_selected_groups
  size, per_group = options.num_experts // num_groups, options.num_selected_experts // kept
  draws_primary, draws = normals(*tokens.shape[:2], options)
  made = token_choice.empty(tokens, options.num_experts, options.num_selected_experts)
  importance = made['sums']['importance'] = np.zeros((len(tokens), options.num_experts))
  load_primary = made['sums']['load_primary'] = np.zeros((len(tokens), num_groups))
  load_secondary = made['sums']['load_secondary'] = np.zeros((len(tokens), num_groups, size))
  group_tokens = made['sums']['group_tokens'] = np.zeros((len(tokens), num_groups))
  for g, s in np.ndindex(tokens.shape[:2]):
    x = np.asarray(tokens[g, s], np.float64)
    x_w = {name: x @ np.asarray(value, np.float64) for name, value in params.items()}
    z_primary, z, raw = x_w['router_primary'], x_w['router'], x_w['noise']
    for i in range(num_groups):
      for j in range(size):
        within = oracle.softmax(z[i * size : (i + 1) * size])
        made['probs'][g, s, i * size + j] = oracle.softmax(z_primary)[i] * within[j]
        made['logits'][g, s, i * size + j] = z_primary[i] + z[i * size + j]
    h_primary, groups, probability = noisy_top_k(
      z_primary, x_w['noise_primary'], draws_primary[g, s], kept, options
    )
    load_primary[g] += valid[g, s] * probability
    selected, gates = [], []
    for rank, i in enumerate(groups):
      of_group = slice(i * size, (i + 1) * size)
      h, experts, probability = noisy_top_k(
        z[of_group], raw[of_group], draws[g, s, rank], per_group, options
      )
      load_secondary[g, i] += valid[g, s] * probability
      group_tokens[g, i] += valid[g, s]
      if options.softmax_order == 'after':
        among = oracle.softmax(h_primary[groups])[rank] * oracle.softmax(h[experts])
      else:
        among = oracle.softmax(h_primary)[i] * oracle.softmax(h)[experts]
      selected.extend(i * size + experts)
      gates.extend(among)
    gates = np.array(gates)
    if options.softmax_order == 'before' and options.renormalize == 'before_drop':
      gates = gates / gates.sum()
    made['index'][g, s], made['gates'][g, s] = selected, options.gate_scale * gates
    for e, gate in zip(selected, gates, strict=True):
      importance[g, e] += valid[g, s] * gate
  return made


def expected_load(made):
  """Returns the load of each expert, over all tokens."""
  total = {name: value.sum(0) for name, value in made['sums'].items()}
  load = []
  for i, within in enumerate(total['load_secondary']):
    for probability in within:
      count = total['group_tokens'][i]
      load.append(total['load_primary'][i] * probability / count if count else 0.0)
  return load


def expected_loss(made):
  importance = made['sums']['importance'].sum(0)
  variation = token_choice.squared_variation
  return variation(importance) + variation(expected_load(made))


def both(num_groups, num_experts):
  """Returns params for which a token is its two rows of logits and the two raw sizes of noise."""
  widths = {'router_primary': num_groups, 'router': num_experts}
  widths |= {'noise_primary': num_groups, 'noise': num_experts}
  ends = np.cumsum(list(widths.values()))
  return dict(zip(widths, np.split(np.eye(ends[-1]), ends[:-1], axis=1), strict=True))


def random_params(rng, num_groups, num_experts, embed_dim=3):
  widths = {'router_primary': num_groups, 'router': num_experts}
  widths |= {'noise_primary': num_groups, 'noise': num_experts}
  return {
    name: rng.normal(size=(embed_dim, width)).astype(np.float32) for name, width in widths.items()
  }


@hypothesis.given(
  token_choice.cases(SHAPES, lambda num_experts: 2 * (3 + num_experts)),
  st.sampled_from(MODES),
  st.sampled_from([(True, 0.0), (True, 0.01), (False, 0.0)]),
)
def test_matches_the_oracle(case, mode, noise):
  tokens, valid, num_experts, num_selected = case
  num_groups, kept = LEVELS[num_experts, num_selected]
  tokens = tokens[..., : 2 * (num_groups + num_experts)]
  options = token_choice.options(
    NAME,
    num_experts=num_experts,
    num_selected_experts=num_selected,
    num_expert_groups=num_groups,
    num_selected_groups=kept,
    softmax_order=mode[0],
    renormalize=mode[1],
    training=noise[0],
    noise_floor=noise[1],
    gate_scale=1.5,
  )
  params = both(num_groups, num_experts)
  choice = token_choice.choose(NAME, options, params, tokens, valid)
  made = expected_choice(params, tokens, valid, options)
  token_choice.compare(choice, made, valid, rtol=2e-5)
  loss = token_choice.objectives(NAME, options, params, tokens, valid)[2]
  np.testing.assert_allclose(loss, expected_loss(made), rtol=1e-4, atol=1e-5)


def test_by_hand():
  # Evaluation. Groups of experts {0, 1}, {2, 3}, {4, 5} with probabilities 1/10, 3/10, 6/10. The
  # best two are groups 2 and 1. In group 2 the experts have 1/4, 3/4: expert 5, gate 6/10 * 3/4 =
  # 18/40. In group 1 they have 4/5, 1/5: expert 2, gate 3/10 * 4/5 = 24/100. Group 0 is out, though
  # its expert 0 has all of it: its product is 1/10.
  tokens = np.log([[[1.0, 3.0, 6.0, 1e9, 1.0, 4.0, 1.0, 1.0, 3.0, *[1.0] * 9]]])
  options = token_choice.options(
    NAME,
    num_experts=6,
    num_expert_groups=3,
    num_selected_groups=2,
    renormalize='none',
    training=False,
    gate_scale=2.0,
  )
  choice = token_choice.choose(NAME, options, both(3, 6), tokens)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [5, 2])
  np.testing.assert_allclose(choice.gates[0, 0], [2 * 0.45, 2 * 0.24], rtol=1e-6)
  expected = [0.1, 1e-10, 0.24, 0.06, 0.15, 0.45]
  np.testing.assert_allclose(choice.router_probs[0, 0], expected, rtol=1e-5)
  np.testing.assert_allclose(choice.sums['importance'][0], [0, 0, 0.24, 0, 0, 0.45], rtol=1e-6)
  np.testing.assert_array_equal(choice.sums['load_primary'][0], [0, 1, 1])
  np.testing.assert_array_equal(choice.sums['load_secondary'][0], [[0, 0], [1, 0], [0, 1]])
  np.testing.assert_array_equal(choice.sums['group_tokens'][0], [0, 1, 1])
  # Importance 24/100 and 45/100, or 8 : 15 : CV^2 = 6 (64 + 225) / 23^2 - 1 = 1205/529. Load 1, 1
  # and four 0: CV^2 = 6 * 2 / 2^2 - 1 = 2. In all 2263/529.
  loss = token_choice.objectives(NAME, options, both(3, 6), tokens, np.ones((1, 1), bool))[2]
  np.testing.assert_allclose(loss, 2263 / 529, rtol=1e-5)


def loss_of(own):
  """Returns the router's loss of its own sums and the gradients by them."""
  options = token_choice.options(NAME, num_expert_groups=2, num_selected_groups=2)
  choice = token_choice.choose(NAME, options, both(2, 4), np.ones((1, 1, 12)))
  sums = token_choice.sums_of(choice, jnp.ones((1, 1), bool), token_choice.keys(1))
  assert set(sums.own) == set(own)

  def loss(own):
    return registry.ROUTERS[NAME].loss(sums._replace(own=own), {}, options)

  return jax.value_and_grad(loss)({name: jnp.float32(value) for name, value in own.items()})


def test_loss_by_hand():
  own = {
    'importance': [1, 1, 1, 1],
    'load_primary': [3, 1],
    'group_tokens': [4, 2],
    'load_secondary': [[2, 2], [1.5, 0.5]],
  }
  # Loads 3 * 2/4, 3 * 2/4, 1 * 1.5/2, 1 * 0.5/2 = 1.5, 1.5, 0.75, 0.25; mean 1, squared deviations
  # 1/4, 1/4, 1/16, 9/16, in all 18/16: CV^2 = 18/64. (Of load_secondary alone it is 1/6.)
  np.testing.assert_allclose(loss_of(own)[0], 18 / 64, rtol=1e-6)
  # Importance 3, 1, 1, 1: mean 3/2, squared deviations 9/4, 1/4, 1/4, 1/4: 3/4 / (9/4) = 1/3.
  own['importance'] = [3, 1, 1, 1]
  np.testing.assert_allclose(loss_of(own)[0], 18 / 64 + 1 / 3, rtol=1e-6)


def test_a_group_without_tokens_has_no_load():
  own = {
    'importance': [1, 1, 0, 0],
    'load_primary': [3, 1],
    'group_tokens': [4, 0],
    'load_secondary': [[2, 2], [0, 0]],
  }
  # Twice two of four equal, two 0: CV^2 = 1 each.
  loss, gradient = loss_of(own)
  np.testing.assert_allclose(loss, 2, rtol=1e-6)
  assert all(np.isfinite(value).all() for value in gradient.values())
  none = {name: np.zeros_like(value) for name, value in own.items()}
  loss, gradient = loss_of(none)
  assert loss == 0
  assert all(np.isfinite(value).all() for value in gradient.values())


def test_load_is_the_expected_number_of_tokens():
  # Equal tokens, each with noise of its own: the expected number of those that select an expert is
  # also what the load estimates. Within 5 standard deviations of a share of 20000.
  options = token_choice.options(
    NAME, num_experts=9, num_selected_experts=4, num_expert_groups=3, num_selected_groups=2
  )
  size = 20000
  token = np.random.default_rng(0).normal(size=24)
  choice = token_choice.choose(NAME, options, both(3, 9), np.tile(token, (1, size, 1)))
  load = np.array(expected_load({'sums': choice.sums})) / size
  share = np.bincount(np.ravel(choice.expert_index), minlength=9) / size
  np.testing.assert_allclose(load, share, atol=5 * np.sqrt(0.25 / size))
  assert np.ptp(share) > 0.2
  group_share = np.asarray(choice.sums['group_tokens'][0]) / size
  got = np.asarray(choice.sums['load_primary'][0]) / size
  np.testing.assert_allclose(got, group_share, atol=5 * np.sqrt(0.25 / size))


def gradient_case(mode):
  rng = np.random.default_rng(0)
  tokens, valid = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.random((2, 4)) < 0.8
  options = token_choice.options(
    NAME,
    num_experts=9,
    num_selected_experts=4,
    num_expert_groups=3,
    num_selected_groups=2,
    softmax_order=mode[0],
    renormalize=mode[1],
    noise_floor=0.01,
    gate_scale=2.0,
  )
  assert registry.ROUTERS[NAME].allowed(options) is None
  return options, random_params(rng, 3, 9), tokens, valid


@pytest.mark.parametrize('mode', MODES)
def test_gradients_reach_both_levels(mode):
  options, params, tokens, valid = gradient_case(mode)

  def expected(params):
    made = expected_choice(params, tokens, valid, options)
    return token_choice.objective_values(made, valid, expected_loss(made))

  for name, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    # The noise reaches the gates and the loss, not the probabilities.
    rows = [0, 2] if name.startswith('noise') else [0, 1, 2]
    assert (np.abs(slope[rows]) > 1e-3).all()


def test_control_gradients_of_a_load_without_its_primary_part_are_refused():
  """The secondary sums alone are the same in expectation, but do not reach the primary gate."""
  options, params, tokens, valid = gradient_case(('after', 'none'))

  def expected(params):
    made = expected_choice(params, tokens, valid, options)
    of_all = [made['sums'][name].sum(0).ravel() for name in ('importance', 'load_secondary')]
    loss = sum(token_choice.squared_variation(values) for values in of_all)
    return token_choice.objective_values(made, valid, loss)

  with pytest.raises(AssertionError, match='router_primary'):
    list(token_choice.check_gradients(NAME, options, params, tokens, valid, expected))


@pytest.mark.parametrize('mode', MODES)
def test_evaluation_gradients(mode):
  """Counts have none; importance has."""
  options, params, tokens, valid = gradient_case(mode)
  options = dataclasses.replace(options, training=False)

  def expected(params):
    made = expected_choice(params, tokens, valid, options)
    return token_choice.objective_values(made, valid, expected_loss(made))

  for name, slope in token_choice.check_gradients(NAME, options, params, tokens, valid, expected):
    if name.startswith('noise'):
      np.testing.assert_array_equal(slope, 0)


def test_invariants():
  rng = np.random.default_rng(0)
  tokens = 2 * rng.normal(size=(2, 5, 11))
  options = token_choice.options(
    NAME, num_experts=8, num_selected_experts=4, num_expert_groups=4, num_selected_groups=2
  )
  params = random_params(rng, 4, 8, embed_dim=11)
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


@pytest.mark.parametrize('mode', MODES)
def test_one_group_is_top_k_in_evaluation(mode):
  rng = np.random.default_rng(0)
  tokens, params = rng.normal(size=(2, 5, 3)), random_params(rng, 1, 4)
  params['router_primary'] = np.zeros((3, 1))
  how = {'softmax_order': mode[0], 'renormalize': mode[1], 'training': False}
  choice = token_choice.choose(NAME, token_choice.options(NAME, **how), params, tokens)
  options = token_choice.options('top_k', **how)
  plain = token_choice.choose('top_k', options, {'router': params['router']}, tokens)
  np.testing.assert_array_equal(choice.expert_index, plain.expert_index)
  for field in ('gates', 'router_probs', 'router_logits'):
    np.testing.assert_allclose(getattr(choice, field), getattr(plain, field), rtol=1e-6)


def test_noise_of_one_level_leaves_the_other():
  options = token_choice.options(
    NAME, num_experts=9, num_selected_experts=6, num_expert_groups=3, num_selected_groups=3
  )
  tokens = np.tile(np.random.default_rng(0).normal(size=24) / 4, (1, 50, 1))

  def selected(options, *silent):
    """Returns the groups of each token in order, and its experts out of order."""
    quiet = tokens.copy()
    for level in silent:
      # softplus(-300) is 0 in float32.
      quiet[..., {'primary': slice(12, 15), 'secondary': slice(15, 24)}[level]] = -300
    index = np.asarray(token_choice.choose(NAME, options, both(3, 9), quiet).expert_index)
    return index[0, :, ::2] // 3, np.sort(index[0], axis=-1)

  groups, experts = selected(dataclasses.replace(options, training=False))
  for silent, same in (
    (('primary', 'secondary'), (True, True)),
    (('secondary',), (False, True)),
    (('primary',), (True, False)),
  ):
    got = selected(options, *silent)
    assert (np.array_equal(got[0], groups), np.array_equal(got[1], experts)) == same, silent


def test_evaluation_draws_nothing():
  rng = np.random.default_rng(2)
  params, tokens = random_params(rng, 2, 4), rng.normal(size=(2, 20, 3))
  for training in (True, False):
    options = token_choice.options(
      NAME, num_expert_groups=2, num_selected_groups=2, training=training
    )
    chosen = [
      token_choice.choose(NAME, options, params, tokens, seed=seed).expert_index for seed in (0, 1)
    ]
    assert np.array_equal(*chosen) != training


def test_all_selected_leaves_the_load_without_gradient():
  options = token_choice.options(
    NAME, num_selected_experts=4, num_expert_groups=2, num_selected_groups=2
  )
  tokens = np.random.default_rng(0).normal(size=(2, 3, 12))
  choice = token_choice.choose(NAME, options, both(2, 4), tokens)
  for name in ('load_primary', 'load_secondary', 'group_tokens'):
    np.testing.assert_array_equal(choice.sums[name], 3)


def test_starts_with_noise_of_zero_matrices():
  weights = registry.ROUTERS[NAME].params(token_choice.options(NAME, num_expert_groups=2), 3)
  assert {name: (w.shape, w.init) for name, w in weights.items()} == {
    'router_primary': ((3, 2), 'scaled'),
    'router': ((3, 4), 'scaled'),
    'noise_primary': ((3, 2), 'zeros'),
    'noise': ((3, 4), 'zeros'),
  }


def test_no_noise_left_is_finite():
  options = token_choice.options(
    NAME, num_expert_groups=2, num_selected_groups=1, renormalize='none'
  )
  params = random_params(np.random.default_rng(0), 2, 4)
  params |= {'noise_primary': np.full((3, 2), -100.0), 'noise': np.full((3, 4), -100.0)}
  token_choice.check_finite(NAME, options, params, np.ones((1, 3, 3)), np.ones((1, 3), bool))


@pytest.mark.parametrize(('kept', 'k'), [(2, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize('softmax_order', ['before', 'after'])
@pytest.mark.parametrize('training', [True, False])
def test_degenerate_inputs(kept, k, softmax_order, training):
  params = random_params(np.random.default_rng(1), 2, 4)
  options = token_choice.options(
    NAME,
    num_selected_experts=k,
    num_expert_groups=2,
    num_selected_groups=kept,
    softmax_order=softmax_order,
    training=training,
  )
  token_choice.check_degenerate(NAME, options, params, 3)


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(2)
  params, tokens = random_params(rng, 2, 4), rng.normal(size=(2, 4, 3))
  options = token_choice.options(NAME, num_expert_groups=2, num_selected_groups=2)
  token_choice.check_padding(NAME, options, params, tokens)
  token_choice.check_causal(NAME, options, params, tokens)


def test_padding_that_is_not_a_number_stays_out_of_the_sums():
  rng = np.random.default_rng(2)
  params, tokens = random_params(rng, 2, 4), rng.normal(size=(1, 4, 3))
  options = token_choice.options(NAME, num_expert_groups=2, num_selected_groups=2)
  valid = np.array([[True, False, True, True]])
  expected = token_choice.choose(NAME, options, params, tokens, valid).sums
  tokens[0, 1] = np.nan
  for name, value in token_choice.choose(NAME, options, params, tokens, valid).sums.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_allowed():
  router = registry.ROUTERS[NAME]
  good = {'num_experts': 6, 'num_selected_experts': 4, 'num_expert_groups': 3}
  good |= {'num_selected_groups': 2}
  assert router.allowed(token_choice.options(NAME, **good)) is None
  assert router.allowed(token_choice.options(NAME, **good, softmax_order='after')) is None
  for changes, field in (
    ({'num_expert_groups': 1}, 'num_expert_groups'),
    ({'num_expert_groups': 4}, 'num_expert_groups'),
    ({'num_selected_groups': 0}, 'num_selected_groups'),
    ({'num_selected_groups': 4}, 'num_selected_groups'),
    ({'num_selected_experts': 3}, 'num_selected_groups'),
    ({'num_selected_experts': 6}, 'num_selected_experts'),
    ({'num_selected_groups': 1, 'num_selected_experts': 2}, 'renormalize'),
    ({'num_selected_experts': 2, 'softmax_order': 'after'}, 'softmax_order'),
  ):
    assert router.allowed(token_choice.options(NAME, **{**good, **changes}))[0] == field, changes


def test_one_selected_group_renormalised_would_not_learn_groups():
  # Why `allowed` rejects it: the probability of the group is in every gate and in their sum.
  rng = np.random.default_rng(2)
  params = random_params(rng, 2, 4)
  tokens, valid = rng.normal(size=(1, 4, 3)), np.ones((1, 4), bool)
  slopes = {}
  for renormalize in ('none', 'before_drop'):
    options = token_choice.options(NAME, num_expert_groups=2, renormalize=renormalize)
    gradient = token_choice.objectives(NAME, options, params, tokens, valid, jacobian=True)
    slopes[renormalize] = np.abs(gradient['router_primary'][0]).max()
  assert slopes['none'] > 1e-2
  assert slopes['before_drop'] < 1e-6
