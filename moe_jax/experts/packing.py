"""Rows that came from several devices, moved together for each expert.

Each device fills its own slots of an expert from the first on, so that at the expert filled and
empty rows alternate. Where experts leave out empty rows, which they do only on CPUs, these must
come last:

  slots at an expert, of devices 0 and 1     a b . .  c . . .
  packed                                     a b c .  . . . .

One-letter dimensions: E experts, P parts of its rows, one for each group of each device, C slots of
a part, N = P C rows, D embed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Packing(NamedTuple):
  """A permutation that packs rows; N, which is no row, where nothing goes.

  Attributes:
    there: the row at each index of the packed rows.
    back: the packed index of each row.
    filled: rows of each expert that count.
  """

  there: Int[Array, 'E N']
  back: Int[Array, 'E N']
  filled: Int[Array, 'E']


def packing_of(counts: Int[Array, 'E P'], capacity: int) -> Packing:
  """Returns the permutation that packs the filled rows.

  Args:
    counts: filled slots of each expert in each of P parts, from the first on.
    capacity: C, slots of a part; N = P C.
  """
  num_experts, parts = counts.shape
  num_rows = parts * capacity
  slot = jnp.arange(capacity, dtype=jnp.int32)[None, None, :]
  # Part p of an expert begins behind the filled rows of the parts before it.
  starts = jnp.cumsum(counts, axis=1) - counts
  # [E P C]: the packed index of each slot, N for an empty one.
  back = jnp.where(slot < counts[..., None], starts[..., None] + slot, num_rows)
  back = back.reshape(num_experts, num_rows).astype(jnp.int32)
  # The same the other way around. Empty slots all have index N, which is past the end: dropped.
  there = jnp.full_like(back, num_rows)
  expert = jnp.arange(num_experts)[:, None]
  there = there.at[expert, back].set(jnp.arange(num_rows, dtype=jnp.int32), mode='drop')
  return Packing(there, back, jnp.sum(counts, axis=1))


def pack(rows: Float[Array, 'E N D'], packing: Packing) -> Float[Array, 'E N D']:
  """Moves filled rows to the front of their expert's; the others are zero."""
  return _move(rows, packing.there, packing.back)


def unpack(rows: Float[Array, 'E N D'], packing: Packing) -> Float[Array, 'E N D']:
  """Moves rows back to where they were; those that were not filled are zero."""
  return _move(rows, packing.back, packing.there)


# JAX's own gradient of a gather is a scatter-add. Each index undoes the other here, so that a
# gather along the other one is the gradient.
@jax.custom_vjp
def _move(rows, index, inverse):
  """A gather, whose gradient is one, too."""
  del inverse
  # Clipped, then zeroed: an index in bounds is cheaper than a padded copy of the rows.
  taken = jnp.take_along_axis(rows, jnp.minimum(index, rows.shape[1] - 1)[..., None], axis=1)
  return jnp.where((index < rows.shape[1])[..., None], taken, 0)


def _move_fwd(rows, index, inverse):
  return _move(rows, index, inverse), (index, inverse)


def _move_bwd(residuals, grad):
  index, inverse = residuals
  return _move(grad, inverse, index), None, None


_move.defvjp(_move_fwd, _move_bwd)
