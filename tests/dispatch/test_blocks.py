"""Blocks of one expert each: what is in them, by the definition, in NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.dispatch import decode_blocks


def draw_plan(groups, size, k, num_experts, keep, seed):
  """A plan that keeps a share of its assignments; its slots are nonsense, as none should look."""
  rng = np.random.default_rng(seed)
  chosen = np.argsort(rng.random((groups, size, num_experts)), axis=-1)[..., :k].astype(np.int32)
  kept = rng.random(chosen.shape) < keep
  weights = np.where(kept, rng.normal(size=chosen.shape), 0).astype(np.float32)
  nonsense = jnp.full(chosen.shape, -(10**6), jnp.int32)
  arrays = (jnp.asarray(x) for x in (chosen, kept, kept, weights))
  chosen, kept, requested, weights = arrays
  source = jnp.full((groups, num_experts, 1), -(10**6), jnp.int32)
  return routing.Plan(chosen, nonsense, requested, kept, weights, source)


SHAPES = {
  'groups': st.integers(1, 3),
  'size': st.integers(1, 5),
  'k': st.integers(1, 3),
  'num_experts': st.sampled_from([3, 8]),
  'num_rows': st.sampled_from([1, 2, 4]),
  'keep': st.sampled_from([0.0, 0.5, 1.0]),
  'half': st.booleans(),
  'seed': st.integers(0, 99),
}


@hypothesis.settings(max_examples=15)
@hypothesis.given(**SHAPES)
def test_each_kept_assignment_has_a_row_of_its_own_at_its_expert(
  groups, size, k, num_experts, num_rows, keep, half, seed
):
  plan = draw_plan(groups, size, k, num_experts, keep, seed)
  tokens = np.random.default_rng(seed).normal(size=(groups, size, 3)).astype(np.float32)
  first, here = (num_experts // 2, num_experts - num_experts // 2) if half else (0, num_experts)
  how = {'num_rows': num_rows, 'num_experts': here, 'first_expert': first}
  blocks = jax.jit(functools.partial(decode_blocks.dispatch, **how))(jnp.asarray(tokens), plan)
  rows, place = np.asarray(blocks.rows), np.asarray(blocks.row_index)
  flat, seen, loads = rows.reshape(-1, 3), set(), np.zeros(here, int)
  for at in np.ndindex(groups, size, k):
    expert = int(plan.expert_index[at]) - first
    if not plan.keep[at] or not 0 <= expert < here:
      assert place[at] == flat.shape[0]
      continue
    loads[expert] += 1
    seen.add(int(place[at]))
    assert blocks.expert[place[at] // num_rows] == expert
    np.testing.assert_array_equal(flat[place[at]], tokens[at[:2]])
  assert len(seen) == loads.sum()
  assert blocks.num_filled == sum(-(-load // num_rows) for load in loads) <= rows.shape[0]
  empty = np.ones(flat.shape[0], bool)
  empty[list(seen)] = False
  assert not flat[empty].any() and empty[int(blocks.num_filled) * num_rows :].all()
  assert set(np.asarray(blocks.expert).tolist()) <= set(range(here))


def test_combine_sums_what_is_here_in_float32():
  # 256 + 1 + 1 in bfloat16, one by one, stays 256.
  plan = draw_plan(1, 1, 3, 3, 1.0, 0)
  plan = plan._replace(combine_weights=jnp.array([[[256.0, 1.0, 1.0]]]))
  tokens = jnp.ones((1, 1, 2), jnp.bfloat16)
  blocks = decode_blocks.dispatch(tokens, plan, num_rows=1, num_experts=3)
  y = decode_blocks.combine(blocks.rows, blocks, plan)
  assert y.dtype == jnp.float32
  np.testing.assert_array_equal(y, 258)
  of_one = decode_blocks.dispatch(
    tokens, plan, num_rows=1, num_experts=1, first_expert=plan.expert_index[0, 0, 1]
  )
  np.testing.assert_array_equal(decode_blocks.combine(of_one.rows, of_one, plan), 1)


@pytest.mark.parametrize(
  ('assignments', 'experts', 'rows'),
  [
    (31, 64, 1),
    (32, 64, 2),
    (64, 64, 2),
    # 65 / 64 is more than 1: twice 2 is 4. 512 / 64 = 8, twice that is 16.
    (65, 64, 4),
    (512, 64, 16),
    # 9 + 3 = 12, at least 16; 16 + 4 = 20; 36 + 6 = 42: a multiple of 4.
    (576, 64, 16),
    (1024, 64, 20),
    (36 * 8, 8, 44),
    # 128 + 11.3 = 139.3; and not more than 144.
    (1024, 8, 140),
    (10**6, 10, 144),
  ],
)
def test_rows_in_a_block_follow_the_mean_load(assignments, experts, rows):
  assert decode_blocks.rows_in_block(assignments, experts) == rows


def test_number_of_blocks_is_enough_for_the_worst_routing():
  # 7 assignments to 3 experts, blocks of 2: loads 3, 3, 1 need 2 + 2 + 1 blocks; 7 // 2 + 3 = 6.
  expert = jnp.array([[[0], [0], [0], [1], [1], [1], [2]]], jnp.int32)
  plan = draw_plan(1, 7, 1, 3, 1.0, 0)._replace(expert_index=expert)
  blocks = decode_blocks.dispatch(jnp.ones((1, 7, 2)), plan, num_rows=2, num_experts=3)
  assert blocks.rows.shape == (6, 2, 2)
  assert blocks.num_filled == 5
  np.testing.assert_array_equal(blocks.expert[:5], [0, 0, 1, 1, 2])
