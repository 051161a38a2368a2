"""Random experts: distinct, uniform, by the group's key in training and by position otherwise."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moe_jax.router_options import RouterOptions
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import random_choice

choose = jax.jit(random_choice.choose, static_argnums=3)

SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (2, 6, 5, 5), (2, 8, 6, 1)]


def inputs_at(positions, seed=0, tokens=None, valid=None):
  positions = np.asarray(positions, np.int32)
  return RouterInputs(
    tokens=jnp.zeros((*positions.shape, 3)) if tokens is None else tokens,
    valid=jnp.ones(positions.shape, bool) if valid is None else jnp.asarray(valid),
    token_ids=jnp.zeros(positions.shape, jnp.int32),
    positions=jnp.asarray(positions),
    keys=jax.random.split(jax.random.key(seed), positions.shape[0]),
  )


def rows(groups, size):
  return np.tile(np.arange(size), (groups, 1))


@hypothesis.given(st.sampled_from(SHAPES), st.booleans(), st.integers(0, 1000))
def test_distinct_experts_of_equal_weight(shape, training, seed):
  groups, size, num_experts, k = shape
  options = RouterOptions(num_experts, k, training=training)
  choice = choose({}, {}, inputs_at(rows(groups, size), seed), options)
  for g in range(groups):
    for s in range(size):
      chosen = [int(e) for e in choice.expert_index[g, s]]
      assert len(set(chosen)) == k
      assert set(chosen) <= set(range(num_experts))
      probs = [(e in chosen) / k for e in range(num_experts)]
      np.testing.assert_allclose(choice.router_probs[g, s], probs, rtol=1e-6)
  np.testing.assert_allclose(choice.gates, 1 / k, rtol=1e-6)
  np.testing.assert_array_equal(choice.router_logits, np.zeros((groups, size, num_experts)))
  assert choice.chosen.all()


def test_every_ordered_pair_is_equally_likely():
  for training in (True, False):
    options = RouterOptions(3, 2, training=training)
    # In evaluation the positions differ, or all tokens would be one draw.
    choice = choose({}, {}, inputs_at(np.arange(6000).reshape(2, 3000)), options)
    first, second = np.asarray(choice.expert_index).reshape(-1, 2).T
    counts = np.bincount(first * 3 + second, minlength=9).reshape(3, 3)
    np.testing.assert_array_equal(np.diag(counts), 0)
    others = counts[~np.eye(3, dtype=bool)]
    # Six pairs at 1/6 of 6000 each: standard deviation sqrt(6000 * 1/6 * 5/6) = 29.
    np.testing.assert_allclose(others, 1000, atol=4.5 * 29)


def test_training_draws_from_the_groups_own_key():
  options = RouterOptions(6, 2)
  inputs = inputs_at(rows(2, 8))
  choice = choose({}, {}, inputs, options)
  swapped = choose({}, {}, inputs._replace(keys=inputs.keys[::-1]), options)
  np.testing.assert_array_equal(swapped.expert_index, choice.expert_index[::-1])
  assert not np.array_equal(choice.expert_index[0], choice.expert_index[1])


def test_evaluation_draws_nothing():
  options = RouterOptions(6, 2, training=False)
  choice = choose({}, {}, inputs_at(rows(2, 8), seed=0), options)
  again = choose({}, {}, inputs_at(rows(2, 8), seed=1), options)
  np.testing.assert_array_equal(choice.expert_index, again.expert_index)
  # A token's experts are those of its position, in whatever group and company.
  np.testing.assert_array_equal(choice.expert_index[0], choice.expert_index[1])
  alone = choose({}, {}, inputs_at([[5]]), options)
  np.testing.assert_array_equal(alone.expert_index[0, 0], choice.expert_index[0, 5])
  assert len(np.unique(choice.expert_index[0], axis=0)) > 1


def test_reads_no_token_and_no_padding():
  for training in (True, False):
    options = RouterOptions(6, 2, training=training)
    choice = choose({}, {}, inputs_at(rows(2, 8)), options)
    tokens, valid = jnp.full((2, 8, 3), jnp.nan), np.zeros((2, 8), bool)
    other = choose({}, {}, inputs_at(rows(2, 8), tokens=tokens, valid=valid), options)
    jax.tree.map(np.testing.assert_array_equal, choice, other)


def test_carries_no_gradient():
  def total(tokens):
    inputs = inputs_at([[0, 1]], tokens=tokens)
    choice = random_choice.choose({}, {}, inputs, RouterOptions(3, 2))
    return jnp.sum(choice.gates) + jnp.sum(choice.router_probs) + jnp.sum(choice.router_logits)

  np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 2, 3))), np.zeros((1, 2, 3)))


def test_by_hand(monkeypatch):
  # Drawn 0.2, 0.9, 0.5 and 0.7, 0.1, 0.6 for two tokens: the two largest are of experts 1, 2 and of
  # 0, 2, in this order. Gates 1 / 2, so probabilities 0, 1/2, 1/2 and 1/2, 0, 1/2.
  drawn = jnp.array([[0.2, 0.9, 0.5], [0.7, 0.1, 0.6]])
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: drawn)
  options = RouterOptions(3, 2, training=True)
  choice = random_choice.choose({}, {}, inputs_at([[0, 1]]), options)
  np.testing.assert_array_equal(choice.expert_index, [[[1, 2], [0, 2]]])
  np.testing.assert_array_equal(choice.gates, np.full((1, 2, 2), 0.5))
  np.testing.assert_allclose(choice.router_probs, [[[0, 0.5, 0.5], [0.5, 0, 0.5]]])
