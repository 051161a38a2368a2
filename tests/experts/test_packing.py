"""Rows packed for each expert, and put back: by hand, and for any counts."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.experts import packing


def test_by_hand():
  # C = 4. Expert 0: two rows of part 0, one of part 1; expert 1: none and three.
  made = packing.packing_of(jnp.array([[2, 1], [0, 3]]), 4)
  np.testing.assert_array_equal(made.filled, [3, 3])
  np.testing.assert_array_equal(made.there, [[0, 1, 4, 8, 8, 8, 8, 8], [4, 5, 6, 8, 8, 8, 8, 8]])
  np.testing.assert_array_equal(made.back, [[0, 1, 8, 8, 2, 8, 8, 8], [8, 8, 8, 8, 0, 1, 2, 8]])


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.integers(0, 99)
)
def test_filled_rows_come_first_and_go_back(experts, parts, capacity, seed):
  rng = np.random.default_rng(seed)
  counts = rng.integers(0, capacity + 1, (experts, parts))
  filled = np.arange(capacity) < counts[..., None]
  rows = np.where(filled[..., None], rng.normal(size=(*filled.shape, 2)), 0)
  flat = jnp.asarray(rows.reshape(experts, -1, 2), jnp.float32)
  made = packing.packing_of(jnp.asarray(counts), capacity)
  packed, pull = jax.vjp(lambda x: packing.pack(x, made), flat)
  for e in range(experts):
    own = rows[e][filled[e]]
    assert made.filled[e] == len(own)
    np.testing.assert_allclose(packed[e, : len(own)], own, rtol=1e-6)
    assert not packed[e, len(own) :].any()
  np.testing.assert_array_equal(packing.unpack(packed, made), flat)
  # Its gradient sends what belongs to a row back to it, and nothing to an empty one.
  cotangent = jnp.asarray(rng.normal(size=packed.shape), jnp.float32)
  (grad,) = pull(cotangent)
  wanted = np.zeros((experts, parts * capacity, 2))
  for e in range(experts):
    wanted[e][filled[e].ravel()] = cotangent[e, : filled[e].sum()]
  np.testing.assert_allclose(grad, wanted, rtol=1e-6)
