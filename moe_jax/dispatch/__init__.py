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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from moe_jax.dispatch import decode, dropless, einsum, gather
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
    experts: (rows [E C D], weights) -> [E C D], on this device.
    axis_name: of the mesh, over which experts are split.
    num_selected: assignments of a token on average, by which `dropless` sizes its buffer.
  """
  if name == 'dropless':

    def through(buffer, weights):
      return through_experts(buffer, weights, experts, axis_name)

    return dropless.run(tokens, plan, weights, through, experts, axis_name, num_selected)
  dispatcher = {'gather': gather, 'einsum': einsum}[name]
  with jax.named_scope('dispatch'):
    inputs = dispatcher.dispatch(tokens, plan)
  outputs = through_experts(inputs, weights, experts, axis_name)
  with jax.named_scope('combine'):
    return dispatcher.combine(outputs, plan)


def through_experts(
  buffer: Float[Array, 'E G C D'], weights: Weights, experts: Experts, axis_name: str
) -> Float[Array, 'E G C D']:
  """Sends each slot to the device of its expert, computes it there, and sends it back."""
  # What crossed the mesh is kept where blocks are recomputed: no exchange is made twice.
  with jax.named_scope('dispatch'):
    exchanged = checkpoint_name(to_experts(buffer, axis_name), EXCHANGED)
  num_experts, groups, capacity, width = exchanged.shape
  with jax.named_scope('experts'):
    outputs = experts(exchanged.reshape(num_experts, groups * capacity, width), weights)
  with jax.named_scope('combine'):
    return checkpoint_name(from_experts(outputs.reshape(exchanged.shape), axis_name), EXCHANGED)
