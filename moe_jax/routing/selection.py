"""The k-th largest of each column without sorting it.

Numbers are compared as `jax.lax.top_k` compares them, in the total order of IEEE 754: -NaN < -inf <
... < -0 < +0 < ... < inf < NaN. Floats in that order are integers in theirs. The k-th largest
integer is found bit by bit: for each of the 32 it is counted how many are at least that large. So
the result is exact, and the cost 32 S E comparisons whatever k is: on CPUs a fraction of a sort.

One-letter dimensions: G routing groups, S rows, E columns.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing import router as router_lib

SMALLEST = int(np.iinfo(np.int32).min)
LARGEST = int(np.iinfo(np.int32).max)


def to_key(values: Float[Array, '*shape']) -> Int[Array, '*shape']:
  """Returns integers in the order of `jax.lax.top_k`: equal only where the bits are. No gradient.

  Raises:
    ValueError: if the values are not float32.
  """
  if values.dtype != jnp.float32:
    raise ValueError(f'values.dtype={values.dtype}: must be float32')
  # The bits of floats that are not negative are in their order already. Those of negative ones are
  # in the reverse order: all bits but the sign are flipped.
  return _flip_negative(jax.lax.bitcast_convert_type(values, jnp.int32))


def from_key(key: Int[Array, '*shape']) -> Float[Array, '*shape']:
  """The inverse of `to_key`."""
  return jax.lax.bitcast_convert_type(_flip_negative(key), jnp.float32)


def _flip_negative(bits: Int[Array, '*shape']) -> Int[Array, '*shape']:
  """Reverses the order of the negative numbers; its own inverse."""
  return jnp.where(bits < 0, bits ^ LARGEST, bits)


def kth_largest(
  values: Float[Array, 'G S E'], k: int | Int[Array, 'G 1 #E']
) -> Float[Array, 'G 1 E']:
  """Returns the k-th largest of each column, 1 <= k <= S; k may depend on the data. No gradient."""
  return from_key(_kth_largest(to_key(values), k, SMALLEST, 32))


def k_largest(
  values: Float[Array, 'G S E'], k: int
) -> tuple[Bool[Array, 'G S E'], Float[Array, 'G 1 E']]:
  """Returns which are the k largest of each column, 1 <= k <= S, and the k-th. No gradient.

  Of equals the upper ones: exactly k of a column, those that `jax.lax.top_k` would return.
  """
  key = to_key(values)
  kth = _kth_largest(key, k, SMALLEST, 32)
  # Fewer than k are above the k-th; equal ones make up for the rest.
  above, equal = key > kth, key == kth
  # How many of the equal ones: the uppermost, whose positions from the end are the largest.
  wanted = k - jnp.sum(above, axis=1, keepdims=True, dtype=jnp.int32)
  num_rows = values.shape[1]
  from_end = jnp.where(equal, jnp.arange(num_rows, 0, -1, dtype=jnp.int32)[None, :, None], 0)
  last = _kth_largest(from_end, wanted, 0, num_rows.bit_length())
  return above | (equal & (from_end >= last)), from_key(kth)


def _kth_largest(
  key: Int[Array, 'G S E'], k: int | Int[Array, 'G 1 #E'], start: int, num_bits: int
) -> Int[Array, 'G 1 E']:
  """Returns the k-th largest of each column; all keys are in start..start + 2**num_bits - 1."""

  def set_bit(i: Int[Array, ''], kth: Int[Array, 'G 1 E']) -> Int[Array, 'G 1 E']:
    # The largest number in steps of this bit that k keys reach. Wraps from SMALLEST to 0, rightly.
    higher = kth + jax.lax.shift_left(jnp.int32(1), num_bits - 1 - i)
    reach = jnp.sum(key >= higher, axis=1, keepdims=True, dtype=jnp.int32)
    return jnp.where(reach >= k, higher, kth)

  # Bisection: a step decides one bit of the answer, the highest first, for all columns at once.
  shape = (key.shape[0], 1, key.shape[2])
  kth = router_lib.varying_like(jnp.full(shape, start, jnp.int32), key)
  return jax.lax.fori_loop(0, num_bits, set_bit, kth)


def smallest_selected(
  values: Float[Array, 'G S E'], expert_index: Int[Array, 'G S K']
) -> Float[Array, 'G S 1']:
  """Returns the smallest of the values that a token selected: the K-th largest.

  Never as a slice of the top-k, here or in a router: XLA on CPUs then no longer recognises the
  top-k and sorts whole rows instead.
  """
  selected = jnp.take_along_axis(values, expert_index, axis=-1)
  return jnp.min(selected, axis=-1, keepdims=True)
