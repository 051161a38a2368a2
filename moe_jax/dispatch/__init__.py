"""Moving tokens to the experts of a plan and back. Plain JAX.

Two dispatchers have the same two halves, each the inverse of the other on kept tokens:

  dispatch(tokens [G S D], plan)          -> expert_inputs [E G C D]
  combine(expert_outputs [E G C D], plan) -> outputs [G S D]

`einsum` is the oracle, `gather` the fast one. `dropless` needs no C: its buffer holds little more
than the mean load, and what is beyond is computed block by block. `run_plan` puts any of them
around the experts; `exchange` moves buffers between the devices of a mesh axis, padded or ragged,
and serves all. `run_decode` is for decoding only: it has no gradient, so no config can name it.
"""

from moe_jax.dispatch import dropless, einsum, gather
from moe_jax.dispatch.exchange import EXCHANGES, from_experts, to_experts, why_not
from moe_jax.dispatch.run import EXCHANGED, filled_slots, run_decode, run_plan, through_experts

# Value of `MoeOptions.dispatch` in decoding, instead of one of `DISPATCHERS`.
DECODE = 'decode'
DISPATCHERS = ('gather', 'dropless', 'einsum')

__all__ = [
  'DECODE',
  'DISPATCHERS',
  'EXCHANGED',
  'EXCHANGES',
  'dropless',
  'einsum',
  'filled_slots',
  'from_experts',
  'gather',
  'run_decode',
  'run_plan',
  'through_experts',
  'to_experts',
  'why_not',
]
