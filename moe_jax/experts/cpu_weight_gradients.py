"""Gradients of experts' weights from few rows each, of which each expert has its own number.

One batched matmul writes each gradient once, where a loop over the experts writes zeros, then each
gradient into the cache, and from there to memory. But a batched matmul has equally many rows
for all. So as many rows are multiplied for all experts as most of them have, and what the fullest
have beyond is added in a loop over these. How many is chosen when the program runs, by least cost.

One-letter dimensions: E experts, C rows of each, D columns that went into a matrix, n rows beyond
those of all experts, N sizes.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.experts import batched

# Sizes are multiples of the first, the second is the number of steps from half of all rows on: more
# take longer to compile, and the least cost is flat.
MULTIPLE = 4
STEPS = 2
# Adding to an expert's gradient takes as long as multiplying this many rows more; the optimum is
# flat.
ROWS_TO_ADD = 20

Pair = tuple[Float[Array, 'E C _'], Float[Array, 'E C _']]


def filled_gradients(
  filled: Int[Array, 'E'], pairs: tuple[Pair, ...]
) -> tuple[Float[Array, 'E _ _'], ...]:
  """Returns, for each pair of rows and gradients, rows.T @ gradients of each expert.

  Args:
    filled: how many rows of each expert count; the others are zero.
    pairs: inputs of the experts' matrices, and gradients of their outputs.
  """
  capacity = pairs[0][0].shape[1]
  sizes = sizes_of(capacity)
  branches = [functools.partial(_gradients, size) for size in sizes]
  return jax.lax.switch(jnp.argmin(costs(filled, sizes)), branches, filled, pairs)


def sizes_of(capacity: int) -> tuple[int, ...]:
  """Returns the numbers of rows that all experts may have: from half of all, and all."""
  half = MULTIPLE * math.ceil(capacity / 2 / MULTIPLE)
  step = MULTIPLE * math.ceil(capacity / 2 / STEPS / MULTIPLE)
  return (*range(half, capacity, step), capacity)


def costs(filled: Int[Array, 'E'], sizes: tuple[int, ...]) -> Int[Array, 'N']:
  """Returns the cost of each size, in rows: for all experts, and for those that have more."""
  size = jnp.array(sizes)
  have_more = jnp.stack([jnp.sum(filled > n) for n in sizes])
  return filled.size * size + have_more * (ROWS_TO_ADD + sizes[-1] - size)


def _gradients(size, filled, pairs):
  """Multiplies `size` rows of all experts, and the rest of those that have more."""
  totals = tuple(batched.weights_gradient(rows[:, :size], grad[:, :size]) for rows, grad in pairs)
  if size == pairs[0][0].shape[1]:
    return totals
  # Experts with more rows come first, and a loop goes through only these.
  has_more = filled > size
  order = jnp.argsort(~has_more).astype(jnp.int32)

  def add(j, totals):
    rest = functools.partial(_rest, order[j], size)
    return tuple(
      add_at(total, (rest(rows).T @ rest(grad))[None], order[j])
      for total, (rows, grad) in zip(totals, pairs, strict=True)
    )

  return jax.lax.fori_loop(0, jnp.sum(has_more), add, totals)


def _rest(expert: Int[Array, ''], size: int, values: Float[Array, 'E C D']) -> Float[Array, 'n D']:
  own = jax.lax.dynamic_index_in_dim(values, expert, keepdims=False)
  return own[size:]


def add_at(
  total: Float[Array, 'E *rest'], part: Float[Array, '1 *rest'], expert: Int[Array, '']
) -> Float[Array, 'E *rest']:
  """Adds to one expert's part, in place. A scatter-add would do the same, and slower."""
  old = jax.lax.dynamic_slice_in_dim(total, expert, 1)
  return jax.lax.dynamic_update_slice_in_dim(total, old + part, expert, 0)
