"""Sums and auxiliary losses against the oracle: values at balance and collapse, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from tests import oracle

LOSSES = {
  'load_balancing': (
    lambda sums: routing.load_balancing_loss(sums, 2),
    lambda sums: oracle.load_balancing_loss(sums, 2),
  ),
  'router_z': (routing.router_z_loss, oracle.router_z_loss),
  'importance': (routing.importance_loss, oracle.importance_loss),
  'entropy': (routing.entropy_loss, oracle.entropy_loss),
}


def draw(num_groups=4, size=6, num_experts=4, scale=2.0, seed=0):
  rng = np.random.default_rng(seed)
  logits = (rng.normal(size=(num_groups, size, num_experts)) * scale).astype(np.float32)
  valid = rng.random((num_groups, size)) < 0.7
  valid[0] = False  # a group, and with N = G a whole scope, of padding
  return logits, valid


@functools.partial(jax.jit, static_argnames=('num_scopes', 'capacity', 'k'))
def sums_of(logits, valid, num_scopes=1, capacity=2, k=2):
  num_groups = logits.shape[0]
  choice = routing.choose_top_k(logits, num_selected_experts=k)
  keys = jax.random.split(jax.random.key(0), num_groups)
  plan = routing.make_plan(choice, valid, keys, capacity=capacity)
  scope = jnp.arange(num_groups) // (num_groups // num_scopes)
  return routing.router_sums(choice, plan, valid, scope[:, None], num_scopes)


def expected_sums(logits, valid, num_scopes=1, capacity=2, k=2):
  num_groups, _, num_experts = logits.shape
  sums = oracle.empty_sums(num_scopes, num_experts)
  for g in range(num_groups):
    chosen = np.array([oracle.top_k(row, k) for row in logits[g]])
    probs = oracle.softmax(logits[g])
    order = oracle.queue('token', probs, k)
    gates = np.take_along_axis(probs, chosen, axis=-1)
    plan = oracle.plan(chosen, gates, valid[g], order, num_experts, capacity, 'none')
    scope = g * num_scopes // num_groups
    z = logits[g].astype(np.float64)
    oracle.add_to_sums(sums, scope, z, chosen, plan.keep, valid[g], capacity)
  return sums


@pytest.mark.parametrize('num_scopes', [1, 2, 4])
@pytest.mark.parametrize('capacity', [1, 2, 6])
def test_sums_and_losses_match_the_oracle(num_scopes, capacity):
  logits, valid = draw()
  sums = sums_of(logits, valid, num_scopes=num_scopes, capacity=capacity)
  expected = expected_sums(logits, valid, num_scopes, capacity)
  for name, value in expected.items():
    np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5, err_msg=name)
  for name, (loss, expected_loss) in LOSSES.items():
    np.testing.assert_allclose(loss(sums), expected_loss(expected), rtol=1e-5, err_msg=name)


def test_balance_is_counted_before_any_drop():
  logits, valid = draw()
  few, many = (sums_of(logits, valid, capacity=capacity) for capacity in (1, 6))
  assert few.kept_per_expert.sum() < many.kept_per_expert.sum()
  np.testing.assert_array_equal(few.tokens_per_expert, many.tokens_per_expert)
  np.testing.assert_array_equal(many.kept_per_expert, many.tokens_per_expert[0])
  np.testing.assert_array_equal(many.tokens_per_expert.sum(), 2 * valid.sum())
  assert few.tokens_all_dropped > 0
  assert many.tokens_all_dropped == 0


def test_padding_counts_nowhere():
  logits, valid = draw()
  other = np.where(valid[..., None], logits, 7.0 - 3 * logits)
  np.testing.assert_equal(
    jax.tree.map(np.asarray, sums_of(logits, valid)),
    jax.tree.map(np.asarray, sums_of(other, valid)),
  )


def test_all_padding_gives_zero_losses_and_gradients():
  logits = draw()[0]
  valid = np.zeros(logits.shape[:2], bool)
  for loss, _ in LOSSES.values():
    value, gradient = jax.value_and_grad(lambda z, loss=loss: loss(sums_of(z, valid)))(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_values_at_perfect_balance():
  # Four tokens, each sure of its own expert, K = 1: f = P = 1/4, 4 * 4 * (1/4)^2 = 1; CV = 0.
  logits = 30 * jnp.eye(4)[None]
  sums = sums_of(logits, jnp.ones((1, 4), bool), k=1)
  np.testing.assert_allclose(routing.load_balancing_loss(sums, 1), 1, rtol=1e-6)
  np.testing.assert_allclose(routing.importance_loss(sums), 0, atol=1e-10)
  # logsumexp = 30 + log(1 + 3 e^-30) for each token.
  np.testing.assert_allclose(routing.router_z_loss(sums), 900, rtol=1e-6)


@pytest.mark.parametrize('k', [1, 2, 4])
def test_uniform_probabilities_give_one_for_every_k(k):
  # P_e = 1/E, so that E sum_e f_e / E = sum_e f_e = 1 whatever was selected.
  sums = sums_of(jnp.zeros((2, 6, 4)), jnp.ones((2, 6), bool), k=k)
  np.testing.assert_allclose(routing.load_balancing_loss(sums, k), 1, rtol=1e-6)
  np.testing.assert_allclose(routing.importance_loss(sums), 0, atol=1e-10)
  np.testing.assert_allclose(routing.router_z_loss(sums), np.log(4) ** 2, rtol=1e-5)


def test_values_at_collapse():
  # All on expert 0: f = P = (1, 0, 0, 0), 4 * 1 = 4. CV^2 = mean(p^2)/mean^2 - 1 = 4 - 1 = 3.
  logits = jnp.zeros((2, 6, 4)).at[..., 0].set(40.0)
  sums = sums_of(logits, jnp.ones((2, 6), bool), k=1)
  np.testing.assert_allclose(routing.load_balancing_loss(sums, 1), 4, rtol=1e-6)
  np.testing.assert_allclose(routing.importance_loss(sums), 3, rtol=1e-6)


def test_global_scope_sees_what_group_scopes_do_not():
  # Group 0 all on expert 0, group 1 all on expert 1: balanced over two experts of two as a whole
  # (loss 1), collapsed in each group (loss 2).
  logits = jnp.array([[[40.0, 0.0]] * 3, [[0.0, 40.0]] * 3])
  valid = jnp.ones((2, 3), bool)
  for num_scopes, value in ((1, 1.0), (2, 2.0)):
    sums = sums_of(logits, valid, num_scopes=num_scopes, k=1)
    np.testing.assert_allclose(routing.load_balancing_loss(sums, 1), value, rtol=1e-6)


def test_scopes_are_weighted_by_their_tokens():
  # Scope 0: three tokens on expert 0 (loss 2). Scope 1: one token, logits 0 (loss 1).
  logits = jnp.array([[[40.0, 0.0]] * 3, [[0.0, 0.0]] * 3])
  valid = jnp.array([[True] * 3, [True, False, False]])
  sums = sums_of(logits, valid, num_scopes=2, k=1)
  np.testing.assert_allclose(routing.load_balancing_loss(sums, 1), (3 * 2 + 1) / 4, rtol=1e-6)


def test_layers_keep_their_own_losses():
  # Two layers collapsed on different experts would balance each other if they were pooled.
  logits = [jnp.zeros((1, 6, 2)).at[..., e].set(40.0) for e in (0, 1)]
  sums = [sums_of(z, jnp.ones((1, 6), bool), k=1) for z in logits]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sums)
  np.testing.assert_allclose(routing.load_balancing_loss(stacked, 1), [2, 2], rtol=1e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_match_finite_differences(name):
  loss, expected_loss = LOSSES[name]
  logits, valid = draw(scale=1.0)
  direction = np.random.default_rng(5).normal(size=logits.shape)
  for num_scopes in (1, 4):
    gradient = jax.grad(lambda z, n=num_scopes: loss(sums_of(z, valid, num_scopes=n)))(logits)
    slope = oracle.central_difference(
      lambda z, n=num_scopes: expected_loss(expected_sums(z, valid, n)), logits, direction
    )
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-4)
    np.testing.assert_array_equal(gradient[~valid], 0)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('collapsed', [False, True])
def test_gradients_are_finite_at_balance_and_at_collapse(name, collapsed):
  # With all logits equal, a coefficient of variation through a standard deviation gives NaN here.
  logits = jnp.zeros((2, 6, 4)).at[..., 0].set(500.0 if collapsed else 0.0)
  loss = LOSSES[name][0]
  gradient = jax.grad(lambda z: loss(sums_of(z, jnp.ones((2, 6), bool))))(logits)
  assert np.isfinite(gradient).all()


def test_counts_and_observations_carry_no_gradient():
  logits, valid = draw()
  silent = ['tokens', 'tokens_per_expert', 'kept_per_expert', 'tokens_all_dropped']
  for name in [*silent, 'top_prob', 'logsumexp_max', 'slots']:
    gradient = jax.grad(lambda z, name=name: getattr(sums_of(z, valid), name).sum())(logits)
    np.testing.assert_array_equal(gradient, 0, err_msg=name)
  for name in ('prob_sum', 'logsumexp_squared'):
    gradient = jax.grad(lambda z, name=name: jnp.sum(jnp.square(getattr(sums_of(z, valid), name))))(
      logits
    )
    assert np.abs(gradient).max() > 1e-3, name


def test_sequences_of_a_group_are_scopes():
  # One group of two sequences, token s of sequence s % 2: sequence 0 all on expert 0, sequence 1
  # all on expert 1. As one scope balanced (loss 1); each sequence collapsed (loss 2).
  logits = jnp.array([[[40.0, 0.0], [0.0, 40.0]] * 3])
  choice = routing.choose_top_k(logits, num_selected_experts=1)
  valid = jnp.ones((1, 6), bool)
  plan = routing.make_plan(choice, valid, jax.random.split(jax.random.key(0), 1), capacity=3)
  for scope, num_scopes, value in (([[0]], 1, 1.0), ([[0, 1]], 2, 2.0)):
    sums = routing.router_sums(choice, plan, valid, jnp.array(scope), num_scopes)
    np.testing.assert_allclose(routing.load_balancing_loss(sums, 1), value, rtol=1e-6)
  np.testing.assert_array_equal(sums.tokens_per_expert, [[3, 0], [0, 3]])


@pytest.mark.parametrize('first', [True, False])
def test_parts_of_a_batch_add_up_and_no_nan_is_lost(first):
  logits, valid = draw()
  parts = [sums_of(logits[rows], valid[rows]) for rows in (slice(0, 2), slice(2, 4))]
  total = routing.add_sums(*parts)
  np.testing.assert_allclose(total.tokens, valid.sum())
  largest = np.log(np.exp(logits.astype(np.float64)).sum(-1))[valid].max()
  np.testing.assert_allclose(total.logsumexp_max, largest, rtol=1e-6)
  broken = parts[1]._replace(logsumexp_max=jnp.full_like(parts[1].logsumexp_max, jnp.nan))
  pair = (broken, parts[0]) if first else (parts[0], broken)
  assert np.isnan(routing.add_sums(*pair).logsumexp_max)
