"""Experts by turns: the formula, and what it promises of balance."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moe_jax.router_options import RouterOptions
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import round_robin

choose = jax.jit(round_robin.choose, static_argnums=3)

SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (2, 6, 5, 5), (2, 8, 6, 1)]


def inputs_at(positions, valid=None, tokens=None):
  positions = np.asarray(positions, np.int32)
  return RouterInputs(
    tokens=jnp.zeros((*positions.shape, 3)) if tokens is None else tokens,
    valid=jnp.ones(positions.shape, bool) if valid is None else jnp.asarray(valid),
    token_ids=jnp.zeros(positions.shape, jnp.int32),
    positions=jnp.asarray(positions),
    keys=jax.random.split(jax.random.key(3), positions.shape[0]),
  )


@hypothesis.given(st.data(), st.sampled_from(SHAPES))
def test_matches_the_oracle(data, shape):
  groups, size, num_experts, k = shape
  positions = np.array(
    [[data.draw(st.integers(0, 40)) for _ in range(size)] for _ in range(groups)]
  )
  choice = choose({}, {}, inputs_at(positions), RouterOptions(num_experts, k))
  for g in range(groups):
    for s in range(size):
      expected = [(int(positions[g, s]) * k + i) % num_experts for i in range(k)]
      np.testing.assert_array_equal(choice.expert_index[g, s], expected)
      probs = [expected.count(e) / k for e in range(num_experts)]
      np.testing.assert_allclose(choice.router_probs[g, s], probs, rtol=1e-6)
  np.testing.assert_allclose(choice.gates, 1 / k, rtol=1e-6)
  np.testing.assert_array_equal(choice.router_logits, np.zeros((groups, size, num_experts)))
  assert choice.chosen.all()
  assert choice.sums == {}


def test_by_hand():
  # E = 5, K = 2. Position 3: 6 mod 5 = 1 and 7 mod 5 = 2. Position 7: 14 mod 5 = 4, 15 mod 5 = 0.
  choice = choose({}, {}, inputs_at([[3, 7]]), RouterOptions(5, 2))
  np.testing.assert_array_equal(choice.expert_index[0], [[1, 2], [4, 0]])
  np.testing.assert_allclose(choice.router_probs[0], [[0, 0.5, 0.5, 0, 0], [0.5, 0, 0, 0, 0.5]])


def test_a_round_gives_every_expert_k_tokens():
  choice = choose({}, {}, inputs_at([np.arange(100, 106)]), RouterOptions(6, 4))
  np.testing.assert_array_equal(np.bincount(np.ravel(choice.expert_index)), 6 * [4])
  # No token asks twice for an expert.
  assert choice.router_probs.max() == 0.25


def test_a_very_long_text_stays_in_int32():
  last = 2**31 - 1
  choice = choose({}, {}, inputs_at([[last]]), RouterOptions(7, 3))
  np.testing.assert_array_equal(choice.expert_index[0, 0], [(last * 3 + i) % 7 for i in range(3)])


def test_reads_nothing_but_the_position():
  options = RouterOptions(5, 2)
  positions = [[0, 1, 2, 3]]
  choice = choose({}, {}, inputs_at(positions), options)
  other = choose(
    {},
    {},
    inputs_at(positions, [[True, True, False, False]], jnp.full((1, 4, 3), jnp.nan)),
    options,
  )
  jax.tree.map(np.testing.assert_array_equal, choice, other)
  # A token alone, as in decoding, takes what it took in its text.
  alone = choose({}, {}, inputs_at([[2]]), options)
  np.testing.assert_array_equal(alone.expert_index[0, 0], choice.expert_index[0, 2])


def test_carries_no_gradient():
  def total(tokens):
    choice = round_robin.choose({}, {}, inputs_at([[0, 1]], tokens=tokens), RouterOptions(3, 2))
    return jnp.sum(choice.gates) + jnp.sum(choice.router_probs) + jnp.sum(choice.router_logits)

  np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 2, 3))), np.zeros((1, 2, 3)))
