"""Gradients of experts' weights from few rows each, of which each expert has its own number.

One batched product writes each gradient once, where a loop over the experts writes zeros, then each
gradient into the cache, and from there to its place. But a batched product has equally many rows
for all. So as many rows are multiplied for all experts as most of them have, and what the fullest
have beyond is added in a loop over these. How many is chosen when the program runs, by least cost.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.blocks import add_at

# What the numbers of rows that are chosen from are multiples of, and their steps from half of all
# rows on: more take longer to compile, and the least cost is flat.
MULTIPLE = 4
STEPS = 6
# Adding to an expert's gradient takes as long as multiplying so many rows more: measured, 1 to 40
# are level, 85 and 160 as good or worse.
ROWS_TO_ADD = 20

Pair = tuple[Float[Array, 'E C _'], Float[Array, 'E C _']]


def batched_gradient(
  rows: Float[Array, 'E C D'], grad: Float[Array, 'E C F']
) -> Float[Array, 'E D F']:
  """Returns rows.T @ grad of each expert, of all rows in one product."""
  return jnp.einsum('ecd,ecf->edf', rows, grad)


def filled_gradients(
  filled: Int[Array, 'E'], pairs: tuple[Pair, ...]
) -> tuple[Float[Array, 'E _ _'], ...]:
  """Returns, for each pair of rows and gradients, rows.T @ gradients of each expert.

  Args:
    filled: how many rows of each expert count; the others are zero.
    pairs: what went into the experts' matrices, and the gradients of what came out.
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
  """Returns what each size costs, in rows: for all experts, and for those that have more."""
  size = jnp.array(sizes)
  have_more = jnp.stack([jnp.sum(filled > n) for n in sizes])
  return filled.size * size + have_more * (ROWS_TO_ADD + sizes[-1] - size)


def _gradients(size, filled, pairs):
  """Multiplies `size` rows of all experts, and the rest of those that have more."""
  totals = tuple(batched_gradient(rows[:, :size], grad[:, :size]) for rows, grad in pairs)
  if size == pairs[0][0].shape[1]:
    return totals
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
