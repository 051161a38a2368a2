"""Moving tokens to the experts of a plan and back. Plain JAX.

Two dispatchers have the same two halves, each the inverse of the other on kept tokens:

  dispatch(tokens [G S D], plan)          -> expert_inputs [E G C D]
  combine(expert_outputs [E G C D], plan) -> outputs [G S D]

`einsum` is the oracle, `gather` the fast one. `dropless` needs no C: its buffer holds little more
than the mean load, and what is beyond is computed block by block. `run` puts any of them around the
experts; `exchange` moves buffers between the devices of a mesh axis and serves all. `decode` is for
decoding alone: it has no gradient, so no config can name it.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import decode, dropless, einsum, gather, merged
from moe_jax.dispatch.blocks import Experts, Weights
from moe_jax.dispatch.exchange import from_experts, to_experts
from moe_jax.routing.plan import Plan

# Value of `MoeOptions.dispatch` in decoding, in place of one of `DISPATCHERS`.
DECODE = 'decode'
DISPATCHERS = ('gather', 'dropless', 'einsum')
# The name of what crossed the mesh, for policies of recomputation.
EXCHANGED = 'exchanged'

__all__ = [
  'DECODE',
  'DISPATCHERS',
  'EXCHANGED',
  'decode',
  'dropless',
  'einsum',
  'filled_rows',
  'from_experts',
  'gather',
  'run',
  'through_experts',
  'to_experts',
]


def run(
  name: str,
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  weights: Weights,
  experts: Experts,
  axis_name: str,
  num_selected: int | float,
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
  """
  if name == 'dropless':

    def through(buffer, weights, plan):
      return through_experts(buffer, weights, experts, axis_name, filled_rows(plan))

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
  outputs = through_experts(inputs, weights, experts, axis_name, filled)
  with jax.named_scope('combine'):
    return dispatcher.combine(outputs, plan).reshape(shape)


def filled_rows(plan: Plan) -> Int[Array, 'E']:
  """Returns how many rows of each expert reach to its last slot that holds a token."""
  groups, size, selected = plan.expert_index.shape
  num_experts, capacity = plan.source_index.shape[1:]
  filled = (plan.source_index < size * selected).swapaxes(0, 1).reshape(num_experts, -1)
  return jnp.max(jnp.where(filled, 1 + jnp.arange(groups * capacity), 0), axis=1, initial=0)


def through_experts(
  buffer: Float[Array, 'E G C D'],
  weights: Weights,
  experts: Experts,
  axis_name: str,
  filled: Int[Array, 'E'] | None = None,
) -> Float[Array, 'E G C D']:
  """Sends each slot to the device of its expert, computes it there, and sends it back.

  Args:
    buffer: slots of all experts; zero where there is no token.
    weights: of this device's experts, E / R first in each.
    experts: as in `run`.
    axis_name: of the mesh, over which experts are split.
    filled: from `filled_rows`; experts hear of it where nothing is exchanged.
  """
  # What crossed the mesh is kept where blocks are recomputed: no exchange is made twice.
  with jax.named_scope('dispatch'):
    exchanged = checkpoint_name(to_experts(buffer, axis_name), EXCHANGED)
  num_experts, groups, capacity, width = exchanged.shape
  with jax.named_scope('experts'):
    rows = exchanged.reshape(num_experts, groups * capacity, width)
    alone = jax.lax.axis_size(axis_name) == 1
    outputs = experts(rows, weights, filled=filled if alone else None)
  with jax.named_scope('combine'):
    return checkpoint_name(from_experts(outputs.reshape(exchanged.shape), axis_name), EXCHANGED)
