"""The experts of a MoE layer when decoding: only what was chosen is read and computed.

One of two ways, both on the blocks of `moe_jax.dispatch.decode`:

  gather  copies the weights of each block's expert, then two batched products over all blocks
  loop    goes through the blocks that hold tokens, one by one, and reads their expert's weights

A copy of weights costs as much traffic as using them, so `loop` is the way on CPUs, where a step of
a loop costs next to nothing. On other platforms each step is a launch: there few assignments
(fewer than experts) are gathered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch import decode, exchange
from moe_jax.layers.basic import activate
from moe_jax.routing.plan import Plan
from moe_jax.routing.router import varying_like

WAYS = ('gather', 'loop')


def way_of(num_assignments: int, num_experts: int, platform: str) -> str:
  """Returns the way that is taken. Measured on CPUs alone: experiments/LOG.md, 2026-11-27."""
  return 'gather' if platform != 'cpu' and num_assignments < num_experts else 'loop'


def decode_experts(
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  weights: tuple[Float[Array, '*L E D F1'], Float[Array, '*L E F D']],
  activation: str,
  *,
  layer: Array | None = None,
  axis_name: str | None = None,
  platform: str = 'cpu',
  way: str | None = None,
  num_rows: int = 0,
) -> Float[Array, 'G S D']:
  """Returns the weighted outputs of the experts of each token. No gradient.

  Args:
    tokens: of this device.
    plan: of these tokens, with enough slots: what it drops stays out.
    weights: w_in and w_out of this device's experts; with `layer`, of all layers.
    activation: between the two products.
    layer: whose weights are meant. Given apart, because a slice of one layer would be a copy of all
      its experts.
    axis_name: of the mesh, over whose devices the experts are spread: every device then gets the
      tokens of all, and adds up its own experts' part of the outputs.
    platform: of the device.
    way: of `WAYS`; None for the one that suits.
    num_rows: b; 0 for what suits.
  """
  experts = weights[0].shape[-3]
  size = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  everyone, whole_plan, first = tokens, plan, jnp.int32(0)
  with jax.named_scope('dispatch'):
    if axis_name is not None and size > 1:
      everyone = exchange.to_everyone(tokens, axis_name)
      asked = exchange.to_everyone(jnp.where(plan.keep, plan.expert_index, -1), axis_name)
      weight = exchange.to_everyone(plan.combine_weights, axis_name)
      whole_plan = plan._replace(expert_index=asked, keep=asked >= 0, combine_weights=weight)
      first = jax.lax.axis_index(axis_name) * experts
    total = whole_plan.expert_index.size
    num_rows = num_rows or decode.rows_in_block(total, experts * size)
    blocks = decode.dispatch(
      everyone, whole_plan, num_rows=num_rows, num_experts=experts, first_expert=first
    )
  with jax.named_scope('experts'):
    run = {'gather': _gathered, 'loop': _looped}[way or way_of(total, experts * size, platform)]
    outputs = run(blocks, weights, activation, layer)
  with jax.named_scope('combine'):
    y = decode.combine(outputs, blocks, whole_plan)
    if axis_name is not None and size > 1:
      y = exchange.sum_of_parts(y, axis_name)
    return y.astype(tokens.dtype)


def _gathered(blocks: decode.Blocks, weights, activation: str, layer) -> Float[Array, 'N b D']:
  index = blocks.expert if layer is None else (layer, blocks.expert)
  w_in, w_out = (w[index].astype(blocks.rows.dtype) for w in weights)
  hidden = activate(jnp.einsum('nbd,ndf->nbf', blocks.rows, w_in), activation)
  return jnp.einsum('nbf,nfd->nbd', hidden, w_out)


def _looped(blocks: decode.Blocks, weights, activation: str, layer) -> Float[Array, 'N b D']:
  def run_one(carry):
    i, outputs = carry
    rows = jax.lax.dynamic_index_in_dim(blocks.rows, i, keepdims=False)
    expert = jax.lax.dynamic_index_in_dim(blocks.expert, i, keepdims=False)
    at = (expert,) if layer is None else (layer, expert)
    w_in, w_out = (_one_expert(w, at).astype(rows.dtype) for w in weights)
    new = activate(rows @ w_in, activation) @ w_out
    return i + 1, jax.lax.dynamic_update_index_in_dim(outputs, new, i, axis=0)

  start = varying_like((jnp.int32(0), jnp.zeros_like(blocks.rows)), blocks.rows)
  return jax.lax.while_loop(lambda carry: carry[0] < blocks.num_filled, run_one, start)[1]


def _one_expert(weights: Float[Array, '*L E A B'], at: tuple[Array, ...]) -> Float[Array, 'A B']:
  shape = weights.shape[len(at) :]
  start = (*at, jnp.int32(0), jnp.int32(0))
  return jax.lax.dynamic_slice(weights, start, (*(1 for _ in at), *shape)).reshape(shape)
