"""Matmuls of rows with the weights of their experts, block by block, one expert per block.

The number of blocks is found when the program runs: a loop over ceil(n_e / b) blocks of b rows for
an expert with n_e rows, so that work is that of the rows and at most one block more per expert.
Memory is that of one block. Backward passes add to the experts' gradients in place.

One-letter dimensions: N blocks, B rows of a block, M rows, T tokens, D embed, E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.experts.cpu_weight_gradients import add_at

# The weights of all experts, E first in each; and (rows [E C D], weights, filled=None) -> [E C D].
Weights = Any
Experts = Callable[..., Array]


class Blocks(NamedTuple):
  """Assignment of rows to blocks.

  Attributes:
    items: the row at each position of each block; M where there is none.
    ends: the number of blocks up to and with those of each expert; the last is how many there are.
    position: of each row, among all N * B; N * B or more for a row that goes to no expert.
  """

  items: Int[Array, 'N B']
  ends: Int[Array, 'E']
  position: Int[Array, 'M']


class Gradients(NamedTuple):
  """Of one pass over all blocks; each is what came in plus what the blocks add."""

  tokens: Float[Array, 'T D']
  scales: Float[Array, 'M']
  weights: Weights


def make_blocks(
  expert_index: Int[Array, 'M'],
  rank: Int[Array, 'M'],
  counts: Int[Array, 'E'],
  block_size: int,
) -> Blocks:
  """Puts the rows of each expert into blocks of their own.

  Args:
    expert_index: of each row; E or more for a row that goes to none.
    rank: position of the row among its expert's, from 0.
    counts: rows of each expert.
    block_size: B, rows in a block.
  """
  num_rows, num_experts = expert_index.size, counts.size
  # ceil(n_e / b) blocks for each expert, and the block after its last.
  blocks = -(-counts // block_size)
  ends = jnp.cumsum(blocks).astype(jnp.int32)
  # Each expert has at most one block that is not full; each block has a row.
  most = min(num_rows, num_rows // block_size + num_experts)
  first = jnp.append((ends - blocks) * block_size, most * block_size)
  # Row r of expert e stands at (first block of e) * b + r. One that goes to no expert is past the
  # end.
  position = first[jnp.minimum(expert_index, num_experts)] + rank
  items = jnp.full((most * block_size,), num_rows, jnp.int32)
  items = items.at[position].set(jnp.arange(num_rows, dtype=jnp.int32), mode='drop')
  return Blocks(items.reshape(most, block_size), ends, position)


def sort_into_blocks(expert_index: Int[Array, 'M'], num_experts: int, block_size: int) -> Blocks:
  """Returns the same for rows whose ranks among their expert's are not known: in order.

  Args:
    expert_index: of each row; E for a row that goes to none.
    num_experts: E.
    block_size: B.
  """
  numbers = jnp.arange(expert_index.size, dtype=jnp.int32)
  in_order, row = jax.lax.sort((expert_index, numbers), num_keys=1, is_stable=True)
  # After a stable sort by expert, rank = position - where the expert's rows begin.
  first = jnp.searchsorted(in_order, jnp.arange(num_experts + 1)).astype(jnp.int32)
  rank = jnp.zeros_like(numbers).at[row].set(numbers - first[in_order], unique_indices=True)
  return make_blocks(expert_index, rank, jnp.diff(first), block_size)


def forward(
  y: Float[Array, 'T D'],
  tokens: Float[Array, 'T D'],
  scales: Float[Array, 'M'],
  weights: Weights,
  blocks: Blocks,
  experts: Experts,
) -> Float[Array, 'T D']:
  """Adds scale * expert(token) of every row to `y`, in float32; row m is of token m // (M / T)."""
  fan_out = scales.size // tokens.shape[0]

  def add(block, y):
    expert, items = _of_block(blocks, block)
    inputs = rows(tokens, items // fan_out)[None]
    outputs = experts(inputs, _weights_of(weights, expert))[0].astype(jnp.float32)
    scaled = outputs * rows(scales[:, None], items)
    return y.at[items // fan_out].add(scaled, mode='drop')

  return jax.lax.fori_loop(0, blocks.ends[-1], add, y)


def backward(
  gradients: Gradients,
  d_y: Float[Array, 'T D'],
  tokens: Float[Array, 'T D'],
  scales: Float[Array, 'M'],
  weights: Weights,
  blocks: Blocks,
  experts: Experts,
) -> Gradients:
  """Adds the gradients of `forward` to `gradients`; each block runs its forward pass again."""
  fan_out = scales.size // tokens.shape[0]

  def add(block, gradients):
    expert, items = _of_block(blocks, block)
    token = items // fan_out
    inputs, own = rows(tokens, token)[None], _weights_of(weights, expert)
    # The block's forward pass again, cheaper than to keep every block's hidden units.
    outputs, pull = jax.vjp(experts, inputs, own)
    d_y_rows = rows(d_y, token).astype(jnp.float32)
    d_scales = jnp.sum(outputs[0].astype(jnp.float32) * d_y_rows, axis=-1)
    d_outputs = d_y_rows * rows(scales[:, None], items)
    d_inputs, d_weights = pull(d_outputs.astype(outputs.dtype)[None])
    return Gradients(
      gradients.tokens.at[token].add(d_inputs[0].astype(jnp.float32), mode='drop'),
      gradients.scales.at[items].add(d_scales, mode='drop'),
      jax.tree.map(lambda total, part: add_at(total, part, expert), gradients.weights, d_weights),
    )

  return jax.lax.fori_loop(0, blocks.ends[-1], add, gradients)


def _of_block(blocks: Blocks, block: Int[Array, '']) -> tuple[Int[Array, ''], Int[Array, 'B']]:
  """Returns the expert of a block and the rows in it."""
  return expert_of(blocks, block), blocks.items[block]


def expert_of(blocks: Blocks, block: Int[Array, '*any']) -> Int[Array, '*any']:
  """Returns the expert of blocks; E for a block that holds nothing."""
  return jnp.searchsorted(blocks.ends, block, side='right').astype(jnp.int32)


def rows(values: Float[Array, 'N D'], index: Int[Array, '*B']) -> Float[Array, '*B D']:
  """Reads rows; zeros where a block has none, whose index is past the last."""
  return values.at[index].get(mode='fill', fill_value=0)


def _weights_of(weights: Weights, expert: Int[Array, '']) -> Weights:
  return jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, expert, 1), weights)
