"""Tables from token id to experts: random, and balanced by frequency."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import hash as hash_router
from moe_jax.routing.routers.hash import Options

choose = jax.jit(hash_router.choose, static_argnums=3)

SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (2, 6, 5, 5), (2, 8, 6, 1)]
VOCAB_SIZE = 9


def inputs_of(token_ids, valid=None, tokens=None):
  token_ids = np.asarray(token_ids, np.int32)
  return RouterInputs(
    tokens=jnp.zeros((*token_ids.shape, 3)) if tokens is None else tokens,
    valid=jnp.ones(token_ids.shape, bool) if valid is None else jnp.asarray(valid),
    token_ids=jnp.asarray(token_ids),
    positions=jnp.zeros(token_ids.shape, jnp.int32),
    keys=jax.random.split(jax.random.key(3), token_ids.shape[0]),
  )


def balanced_oracle(start, counts, num_experts, k):
  """Serves the most frequent id left, one by one; looks through all experts each time."""
  table, load, left = [list(row) for row in start], [0] * num_experts, list(range(len(counts)))
  while left:
    token_id = min(left, key=lambda i: (-counts[i], i))
    left.remove(token_id)
    if counts[token_id] > 0:
      table[token_id] = sorted(range(num_experts), key=lambda e: (load[e], e))[:k]
      for e in table[token_id]:
        load[e] += counts[token_id]
  return np.array(table), load


@hypothesis.given(st.data(), st.sampled_from(SHAPES))
def test_choice_matches_the_oracle(data, shape):
  groups, size, num_experts, k = shape
  rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
  table = np.array([rng.permutation(num_experts)[:k] for _ in range(VOCAB_SIZE)])
  token_ids = rng.integers(0, VOCAB_SIZE, (groups, size))
  state = {'table': jnp.asarray(table, jnp.float32)}
  choice = choose({}, state, inputs_of(token_ids), Options(num_experts, k))
  for g in range(groups):
    for s in range(size):
      chosen = list(table[token_ids[g, s]])
      np.testing.assert_array_equal(choice.expert_index[g, s], chosen)
      probs = [(e in chosen) / k for e in range(num_experts)]
      np.testing.assert_allclose(choice.router_probs[g, s], probs, rtol=1e-6)
  np.testing.assert_allclose(choice.gates, 1 / k, rtol=1e-6)
  np.testing.assert_array_equal(choice.router_logits, np.zeros((groups, size, num_experts)))
  assert choice.chosen.all()


@hypothesis.given(st.data(), st.integers(1, 6), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_balanced_table_matches_the_oracle(data, num_experts, counts):
  k = data.draw(st.integers(1, num_experts))
  start = np.tile(np.arange(num_experts)[::-1][:k], (len(counts), 1))
  state = {'table': jnp.asarray(start, jnp.float32)}
  options = Options(num_experts, k, hash_table='balanced')
  state = hash_router.from_counts(state, np.array(counts), options)
  expected, load = balanced_oracle(start, counts, num_experts, k)
  np.testing.assert_array_equal(state['table'], expected)
  assert state['table'].dtype == jnp.float32
  if k == 1:
    # List scheduling: the heaviest is ahead of the lightest by one id at most.
    assert max(load) - min(load) <= max(counts)


def test_balanced_table_by_hand():
  # Counts 2, 9, 4, 0, 4, two experts. In order: id 1 (9) to expert 0; id 2 (4) and id 4 (4), the
  # lower id first, to expert 1, now at 8; id 0 (2) to expert 1, 8 < 9. Id 3 never occurs.
  options = Options(2, 1, hash_table='balanced')
  state = {'table': jnp.array([[0.0], [1.0], [0.0], [1.0], [0.0]])}
  table = hash_router.from_counts(state, np.array([2, 9, 4, 0, 4]), options)['table']
  np.testing.assert_array_equal(table[:, 0], [1, 0, 1, 1, 1])


def test_random_table_needs_no_counts():
  options = Options(4, 2)
  state = hash_router.new_state(options, 3, VOCAB_SIZE)
  after = hash_router.from_counts(state, np.arange(VOCAB_SIZE), options)
  np.testing.assert_array_equal(after['table'], state['table'])


def test_random_table_is_uniform_distinct_and_of_its_seed():
  options = Options(4, 2, hash_seed=5)
  table = np.asarray(hash_router.new_state(options, 3, 6000)['table'])
  assert (table[:, 0] != table[:, 1]).all()
  for column in table.T:
    # Standard deviation of a count: sqrt(6000 * 1/4 * 3/4) = 34.
    np.testing.assert_allclose(np.bincount(column.astype(int)), 1500, atol=4 * 34)
  np.testing.assert_array_equal(hash_router.new_state(options, 3, 6000)['table'], table)
  other = hash_router.new_state(Options(4, 2, hash_seed=6), 3, 6000)['table']
  assert not np.array_equal(other, table)


def test_balanced_is_flatter_than_random_on_a_skewed_text():
  counts = 10000 // np.arange(1, 201)
  options = Options(4, 1, hash_table='balanced')
  random = hash_router.new_state(options, 3, 200)
  balanced = hash_router.from_counts(random, counts, options)

  def heaviest(state):
    return max(counts[np.asarray(state['table'])[:, 0] == e].sum() for e in range(4))

  # The rarest id has 50 tokens; the ids fill the gaps of those before them up to that.
  assert heaviest(balanced) <= counts.sum() / 4 + 50
  assert heaviest(random) > 1.1 * counts.sum() / 4


def test_counts_beyond_float32_are_exact():
  # In float32 2**24 + 1 is 2**24: expert 1 would look as light as expert 0 and id 2 go to 0.
  options = Options(2, 1, hash_table='balanced')
  state = {'table': jnp.zeros((3, 1))}
  counts = np.array([2**24 + 1, 2**24, 1])
  table = hash_router.from_counts(state, counts, options)['table']
  np.testing.assert_array_equal(table[:, 0], [0, 1, 1])


def test_choice_of_an_id_depends_on_nothing_else():
  options = Options(5, 2)
  state = hash_router.new_state(options, 3, VOCAB_SIZE)
  choice = choose({}, state, inputs_of([[4, 2, 4, 7]]), options)
  np.testing.assert_array_equal(choice.expert_index[0, 0], choice.expert_index[0, 2])
  # Later ids, padding and the tokens themselves change nothing before.
  valid, tokens = [[True, True, False, False]], jnp.full((1, 4, 3), jnp.nan)
  other = choose({}, state, inputs_of([[4, 2, 0, 0]], valid, tokens), options)
  np.testing.assert_array_equal(other.expert_index[0, :2], choice.expert_index[0, :2])
  np.testing.assert_array_equal(other.router_probs[0, :2], choice.router_probs[0, :2])


@pytest.mark.parametrize(('token_id', 'nearest'), [(-3, 0), (VOCAB_SIZE + 5, VOCAB_SIZE - 1)])
def test_an_id_outside_the_vocabulary_takes_the_nearest_row(token_id, nearest):
  options = Options(5, 2)
  state = hash_router.new_state(options, 3, VOCAB_SIZE)
  choice = choose({}, state, inputs_of([[token_id, nearest]]), options)
  np.testing.assert_array_equal(choice.expert_index[0, 0], choice.expert_index[0, 1])


def test_carries_no_gradient():
  state = {'table': jnp.array([[0.0, 1.0], [1.0, 2.0]])}

  def total(tokens):
    choice = hash_router.choose({}, state, inputs_of([[0, 1]], tokens=tokens), Options(3, 2))
    return jnp.sum(choice.gates) + jnp.sum(choice.router_probs) + jnp.sum(choice.router_logits)

  np.testing.assert_array_equal(jax.grad(total)(jnp.ones((1, 2, 3))), np.zeros((1, 2, 3)))


def test_names_the_tables_there_are():
  field, message = hash_router.ROUTER.allowed(Options(2, 1, hash_table='sorted'))
  assert field == 'hash_table'
  assert 'balanced' in message
  assert hash_router.ROUTER.allowed(Options(2, 1, hash_table='balanced')) is None
