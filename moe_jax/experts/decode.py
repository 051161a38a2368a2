"""Experts when decoding: only weights of selected experts are read. No gradient.

Rows come in blocks of one expert each (`moe_jax.dispatch.decode_blocks`). One of two
implementations:

  gather  copies the weights of each block's expert, then two batched matmuls over all blocks
  loop    goes through the blocks that hold tokens, one by one, and reads their expert's weights

A copy of weights costs as much traffic as using them, so CPUs `loop`: an iteration costs next to
nothing there. On other platforms each iteration is a launch: there few assignments (fewer than
experts) are gathered. Measured only on CPUs.

N blocks of b rows, E experts, L layers, D embed, F1 columns of the first matrix, F hidden units.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.experts.activations import activate
from moe_jax.routing.router import varying_like

IMPLEMENTATIONS = ('gather', 'loop')


class Blocks(NamedTuple):
  """Rows for the experts of one device.

  Attributes:
    rows: of each block; zero where there is no assignment.
    expert: of each block, counted from the first of the device; any of them from `num_filled` on.
    num_filled: blocks that hold an assignment. They come first.
    row_index: the row, of all N * b, of each assignment; N * b where its expert is not here or it
      was not kept.
  """

  rows: Float[Array, 'N b D']
  expert: Int[Array, 'N']
  num_filled: Int[Array, '']
  row_index: Int[Array, 'G S K']


def implementation(num_assignments: int, num_experts: int, platform: str) -> str:
  """Returns the best implementation: one of `IMPLEMENTATIONS`."""
  return 'gather' if platform != 'cpu' and num_assignments < num_experts else 'loop'


def run_blocks(
  blocks: Blocks,
  weights: tuple[Float[Array, '*L E D F1'], Float[Array, '*L E F D']],
  activation: str,
  *,
  layer: Int[Array, ''] | None,
  which: str,
) -> Float[Array, 'N b D']:
  """Runs the expert of each block on its rows.

  Args:
    blocks: rows, and the expert of each block.
    weights: `w_in` and `w_out` of this device's experts; with `layer`, of all layers.
    activation: of the hidden layer.
    layer: index of the layer. Passed separately, because a slice of one layer would be a copy of
      all its experts.
    which: of `IMPLEMENTATIONS`.
  """
  run = {'gather': _gathered, 'loop': _looped}[which]
  return run(blocks, weights, activation, layer)


def _gathered(blocks: Blocks, weights, activation: str, layer) -> Float[Array, 'N b D']:
  # [*L E D F1] -> [N D F1], a copy of the expert of each block. The layer is part of the index:
  # weights[layer][expert] would copy all experts of the layer first.
  index = blocks.expert if layer is None else (layer, blocks.expert)
  w_in, w_out = (w[index].astype(blocks.rows.dtype) for w in weights)
  hidden = activate(jnp.einsum('nbd,ndf->nbf', blocks.rows, w_in), activation)
  return jnp.einsum('nbf,nfd->nbd', hidden, w_out)


def _looped(blocks: Blocks, weights, activation: str, layer) -> Float[Array, 'N b D']:
  def run_one(carry):
    i, outputs = carry
    rows = jax.lax.dynamic_index_in_dim(blocks.rows, i, keepdims=False)
    expert = jax.lax.dynamic_index_in_dim(blocks.expert, i, keepdims=False)
    at = (expert,) if layer is None else (layer, expert)
    # Cast here, one expert at a time: a cast of all weights would read every one of them.
    w_in, w_out = (_one_expert(w, at).astype(rows.dtype) for w in weights)
    new = activate(rows @ w_in, activation) @ w_out
    return i + 1, jax.lax.dynamic_update_index_in_dim(outputs, new, i, axis=0)

  # Blocks without a token keep the zeros that they start from.
  start = varying_like((jnp.int32(0), jnp.zeros_like(blocks.rows)), blocks.rows)
  # A while loop, because the number of blocks depends on the data. Reverse mode cannot pass it.
  return jax.lax.while_loop(lambda carry: carry[0] < blocks.num_filled, run_one, start)[1]


def _one_expert(weights: Float[Array, '*L E A B'], at: tuple[Array, ...]) -> Float[Array, 'A B']:
  # [*L E A B] -> [A B] by one slice, so that nothing but this expert is read.
  shape = weights.shape[len(at) :]
  start = (*at, jnp.int32(0), jnp.int32(0))
  return jax.lax.dynamic_slice(weights, start, (*(1 for _ in at), *shape)).reshape(shape)
