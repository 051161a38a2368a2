"""Moving tokens to the experts of a plan and back. Plain JAX.

Two dispatchers have the same two halves, each the inverse of the other on kept tokens:

  dispatch(tokens [G S D], plan)          -> expert_inputs [E G C D]
  combine(expert_outputs [E G C D], plan) -> outputs [G S D]

`einsum` is the oracle, `gather` the fast one. `dropless` needs no C: its buffer holds little more
than the mean load, and what is beyond is computed block by block. `run` puts any of them around the
experts; `exchange` moves buffers between the devices of a mesh axis, padded or ragged, and serves
all. `decode` is for decoding alone: it has no gradient, so no config can name it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import decode, dropless, einsum, gather, merged
from moe_jax.dispatch.blocks import Experts, Weights
from moe_jax.dispatch.exchange import (
  EXCHANGES,
  from_experts,
  send_slices,
  slices_of,
  swap,
  to_experts,
  why_not,
)
from moe_jax.routing.plan import Plan
from moe_jax.routing.router import varying_like

# Value of `MoeOptions.dispatch` in decoding, in place of one of `DISPATCHERS`.
DECODE = 'decode'
DISPATCHERS = ('gather', 'dropless', 'einsum')
# The name of what crossed the mesh, for policies of recomputation.
EXCHANGED = 'exchanged'

__all__ = [
  'DECODE',
  'DISPATCHERS',
  'EXCHANGED',
  'EXCHANGES',
  'decode',
  'dropless',
  'einsum',
  'filled_rows',
  'filled_slots',
  'from_experts',
  'gather',
  'run',
  'through_experts',
  'to_experts',
  'why_not',
]


def run(
  name: str,
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  weights: Weights,
  experts: Experts,
  axis_name: str,
  num_selected: int | float,
  exchange: str = 'padded',
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
  """
  ragged = exchange == 'ragged'
  if name == 'dropless':

    def through(buffer, weights, plan):
      sent = filled_slots(plan) if ragged else None
      return through_experts(buffer, weights, experts, axis_name, filled_rows(plan), sent)

    return dropless.run(tokens, plan, weights, through, experts, axis_name, num_selected)
  dispatcher = {'gather': gather, 'einsum': einsum}[name]
  shape, filled = tokens.shape, None
  with jax.named_scope('dispatch'):
    if name == 'gather':
      if jax.lax.axis_size(axis_name) == 1 and len(tokens) > 1:
        # Then the empty slots of an expert all come last, where experts leave them out.
        plan, _ = merged.merge(plan, len(tokens) * plan.source_index.shape[-1])
        tokens = tokens.reshape(1, -1, shape[-1])
      filled = filled_rows(plan)
    inputs = dispatcher.dispatch(tokens, plan)
  sent = filled_slots(plan) if ragged else None
  outputs = through_experts(inputs, weights, experts, axis_name, filled, sent)
  with jax.named_scope('combine'):
    return dispatcher.combine(outputs, plan).reshape(shape)


def filled_rows(plan: Plan) -> Int[Array, 'E']:
  """Returns how many rows of each expert reach to its last slot that holds a token."""
  groups, size, selected = plan.expert_index.shape
  num_experts, capacity = plan.source_index.shape[1:]
  filled = (plan.source_index < size * selected).swapaxes(0, 1).reshape(num_experts, -1)
  return jnp.max(jnp.where(filled, 1 + jnp.arange(groups * capacity), 0), axis=1, initial=0)


def filled_slots(plan: Plan) -> Int[Array, 'E G']:
  """Returns how many slots of each expert and group reach to the last that holds a token."""
  _, size, selected = plan.expert_index.shape
  filled = (plan.source_index < size * selected).swapaxes(0, 1)
  return jnp.max(jnp.where(filled, 1 + jnp.arange(filled.shape[2]), 0), axis=2, initial=0)


def through_experts(
  buffer: Float[Array, 'E G C D'],
  weights: Weights,
  experts: Experts,
  axis_name: str,
  filled: Int[Array, 'E'] | None = None,
  sent: Int[Array, 'E G'] | None = None,
) -> Float[Array, 'E G C D']:
  """Sends each slot to the device of its expert, computes it there, and sends it back.

  Args:
    buffer: slots of all experts; zero where there is no token.
    weights: of this device's experts, E / R first in each.
    experts: as in `run`.
    axis_name: of the mesh, over which experts are split.
    filled: from `filled_rows`; experts hear of it where nothing is exchanged.
    sent: from `filled_slots`: only these slots cross. None for all.
  """
  # What crossed the mesh is kept where blocks are recomputed: no exchange is made twice.
  with jax.named_scope('dispatch'):
    send, give_back = _ways(sent, buffer.shape, axis_name)
    exchanged = checkpoint_name(send(buffer), EXCHANGED)
  num_experts, groups, capacity, width = exchanged.shape
  with jax.named_scope('experts'):
    rows = exchanged.reshape(num_experts, groups * capacity, width)
    alone = jax.lax.axis_size(axis_name) == 1
    outputs = experts(rows, weights, filled=filled if alone else None)
  with jax.named_scope('combine'):
    return checkpoint_name(give_back(outputs.reshape(exchanged.shape)), EXCHANGED)


def _ways(
  sent: Int[Array, 'E G'] | None, shape: tuple[int, ...], axis_name: str
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
  """Returns how a buffer [E G C D] gets to the experts, and how their outputs come back."""
  num_devices = jax.lax.axis_size(axis_name)
  if sent is None or num_devices == 1:
    return (
      functools.partial(to_experts, axis_name=axis_name),
      functools.partial(from_experts, axis_name=axis_name),
    )
  num_experts, groups, capacity, width = shape
  received = checkpoint_name(swap(sent, axis_name), EXCHANGED)
  device = jax.lax.axis_index(axis_name)
  slices = slices_of(sent, received, capacity, device, num_devices)
  there, back = varying_like(slices, received)

  def send(buffer):
    rows = send_slices(axis_name, buffer.reshape(-1, width), there, back)
    return rows.reshape(num_experts // num_devices, num_devices * groups, capacity, width)

  def give_back(outputs):
    return send_slices(axis_name, outputs.reshape(-1, width), back, there).reshape(shape)

  return send, give_back
