"""A dispatcher around the experts: dispatch, exchange, experts, exchange, combine.

Called inside `jax.shard_map`. G groups, S tokens in a group, K selected experts, E experts, C
capacity, D embed, R devices along the axis that the experts are split over.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax import experts as experts_lib
from moe_jax.dispatch import decode_blocks, dropless, einsum, gather, merged
from moe_jax.dispatch.blocks import Experts, Weights
from moe_jax.dispatch.exchange import (
  from_experts,
  send_slices,
  slices_of,
  sum_of_parts,
  swap,
  to_everyone,
  to_experts,
)
from moe_jax.experts import decode, packing
from moe_jax.routing.plan import Plan
from moe_jax.routing.router import varying_like

# The name of what crossed the mesh, for policies of recomputation.
EXCHANGED = 'exchanged'


def run_plan(
  name: str,
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  *,
  weights: Weights,
  experts: Experts,
  axis_name: str,
  num_selected: int | float,
  exchange: str = 'padded',
  packs: bool = False,
) -> Float[Array, 'G S D']:
  """Runs the experts of a plan; called inside `jax.shard_map`.

  Args:
    name: of `DISPATCHERS`.
    tokens: of this device.
    plan: of this device's groups; only `dropless` allows one without slots.
    weights: of this device's experts, E / R first in each.
    experts: (rows [E C D], weights, filled=None) -> [E C D], on this device; `filled` [E] says how
      many rows of each expert count, where that is known: the others are zero.
    axis_name: of the mesh, over which experts are split.
    num_selected: assignments of a token on average, by which `dropless` sizes its buffer.
    exchange: of `EXCHANGES`: how the buffer crosses the mesh.
    packs: whether rows that crossed the mesh are packed, so that experts know of filled ones there
      too; on one device they always do.
  """

  def through(buffer, weights, plan):
    # The oracle's experts compute every row.
    known = filled_slots(plan) if name != 'einsum' or exchange == 'ragged' else None
    return through_experts(
      buffer,
      weights,
      experts,
      axis_name=axis_name,
      filled=known,
      exchange=exchange,
      packs=packs,
    )

  if name == 'dropless':
    return dropless.run(tokens, plan, weights, through, experts, axis_name, num_selected)
  dispatcher = {'gather': gather, 'einsum': einsum}[name]
  shape = tokens.shape
  with jax.named_scope('dispatch'):
    if name == 'gather' and jax.lax.axis_size(axis_name) == 1 and len(tokens) > 1:
      # Then the empty slots of an expert all come last, where experts leave them out.
      plan, _ = merged.merge(plan, len(tokens) * plan.source_index.shape[-1])
      tokens = tokens.reshape(1, -1, shape[-1])
    inputs = dispatcher.dispatch(tokens, plan)
  outputs = through(inputs, weights, plan)
  with jax.named_scope('combine'):
    return dispatcher.combine(outputs, plan).reshape(shape)


def run_decode(
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  weights: tuple[Float[Array, '*L E D F1'], Float[Array, '*L E F D']],
  *,
  activation: str,
  layer: Int[Array, ''] | None = None,
  axis_name: str | None = None,
  platform: str = 'cpu',
  which: str | None = None,
  num_rows: int = 0,
) -> Float[Array, 'G S D']:
  """Returns the weighted outputs of the experts of each token. No gradient.

  Args:
    tokens: of this device.
    plan: of these tokens, with enough slots: what it drops stays out.
    weights: `w_in` and `w_out` of this device's experts; with `layer`, of all layers.
    activation: between the two matmuls.
    layer: index of the layer. Passed separately, because a slice of one layer would be a copy of
      all its experts.
    axis_name: of the mesh, over whose devices the experts are spread: every device then gets the
      tokens of all, and adds up its own experts' part of the outputs.
    platform: of the device.
    which: of `experts.decode.IMPLEMENTATIONS`; None for the best one.
    num_rows: b; 0 for the best number.
  """
  experts = weights[0].shape[-3]
  size = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  all_tokens, whole_plan, first = tokens, plan, jnp.int32(0)
  with jax.named_scope('dispatch'):
    if axis_name is not None and size > 1:
      all_tokens = to_everyone(tokens, axis_name)
      # [G_axis S K]. One gather gives both which are kept and where they go: -1 is left out by the
      # plan.
      selected = to_everyone(jnp.where(plan.keep, plan.expert_index, -1), axis_name)
      weight = to_everyone(plan.combine_weights, axis_name)
      whole_plan = plan._replace(expert_index=selected, keep=selected >= 0, combine_weights=weight)
      first = jax.lax.axis_index(axis_name) * experts
    total = whole_plan.expert_index.size
    num_rows = num_rows or decode_blocks.rows_in_block(total, experts * size)
    blocks = decode_blocks.dispatch(
      all_tokens, whole_plan, num_rows=num_rows, num_experts=experts, first_expert=first
    )
  with jax.named_scope('experts'):
    which = which or decode.implementation(total, experts * size, platform)
    outputs = experts_lib.run_blocks(blocks, weights, activation, layer=layer, which=which)
  with jax.named_scope('combine'):
    y = decode_blocks.combine(outputs, blocks, whole_plan)
    if axis_name is not None and size > 1:
      y = sum_of_parts(y, axis_name)
    return y.astype(tokens.dtype)


def filled_slots(plan: Plan) -> Int[Array, 'E G']:
  """Returns how many slots of each expert and group reach to the last that holds a token."""
  _, size, selected = plan.expert_index.shape
  filled = (plan.source_index < size * selected).swapaxes(0, 1)
  return jnp.max(jnp.where(filled, 1 + jnp.arange(filled.shape[2]), 0), axis=2, initial=0)


def through_experts(
  buffer: Float[Array, 'E G C D'],
  weights: Weights,
  experts: Experts,
  *,
  axis_name: str,
  filled: Int[Array, 'E G'] | None = None,
  exchange: str = 'padded',
  packs: bool = False,
) -> Float[Array, 'E G C D']:
  """Sends each slot to the device of its expert, computes it there, and sends it back.

  Args:
    buffer: slots of all experts; zero where there is no token.
    weights: of this device's experts, E / R first in each.
    experts: as in `run_plan`.
    axis_name: of the mesh, over which experts are split.
    filled: from `filled_slots`; None where all are.
    exchange: of `EXCHANGES`; `padded` where all are filled.
    packs: as in `run_plan`.
  """
  num_devices, groups, capacity = jax.lax.axis_size(axis_name), *buffer.shape[1:3]
  received, slots = None, None
  # What crossed the mesh is kept where blocks are recomputed: no exchange is made twice.
  with jax.named_scope('dispatch'):
    if filled is not None and num_devices > 1 and (packs or exchange == 'ragged'):
      received = checkpoint_name(swap(filled, axis_name), EXCHANGED)
      slots = (filled, received) if exchange == 'ragged' else None
    # Padded: every slot crosses. Ragged: those up to the last that holds a token.
    send, give_back = _ways(slots, buffer.shape, axis_name)
    exchanged = checkpoint_name(send(buffer), EXCHANGED)
  with jax.named_scope('experts'):
    rows = exchanged.reshape(len(exchanged), -1, buffer.shape[-1])
    if received is not None and packs:
      # [R E_local, G] as it came, [E_local, R G] as the rows are.
      counts = received.reshape(num_devices, -1, groups).swapaxes(0, 1)
      packed = packing.packing_of(counts.reshape(-1, num_devices * groups), capacity)
      # Filled rows first, so that experts can skip the others; then back to where they came from.
      outputs = experts(packing.pack(rows, packed), weights, filled=packed.filled)
      outputs = packing.unpack(outputs, packed)
    else:
      # On one device, with one group, filled rows come first as they are; with more they alternate
      # with empty ones, and only a packed buffer may leave rows out.
      known = filled[:, 0] if filled is not None and num_devices == groups == 1 else None
      outputs = experts(rows, weights, filled=known)
  with jax.named_scope('combine'):
    return checkpoint_name(give_back(outputs.reshape(exchanged.shape)), EXCHANGED)


def _ways(
  slots: tuple[Int[Array, 'E G'], Int[Array, 'E G']] | None,
  shape: tuple[int, ...],
  axis_name: str,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
  """Returns two functions: a buffer [E G C D] to the experts, and their outputs back.

  Args:
    slots: filled here, and of each device for the experts here, where only these are sent.
    shape: of the buffer.
    axis_name: of the mesh, over which experts are split.
  """
  if slots is None:
    return (
      functools.partial(to_experts, axis_name=axis_name),
      functools.partial(from_experts, axis_name=axis_name),
    )
  num_devices = jax.lax.axis_size(axis_name)
  num_experts, groups, capacity, width = shape
  device = jax.lax.axis_index(axis_name)
  slices = slices_of(*slots, capacity, device, num_devices)
  there, back = varying_like(slices, slots[1])

  def send(buffer):
    rows = send_slices(axis_name, buffer.reshape(-1, width), there, back)
    return rows.reshape(num_experts // num_devices, num_devices * groups, capacity, width)

  def give_back(outputs):
    return send_slices(axis_name, outputs.reshape(-1, width), back, there).reshape(shape)

  return send, give_back
