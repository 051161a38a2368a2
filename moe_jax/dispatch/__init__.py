"""Moving tokens to the experts of a plan and back. Plain JAX.

Every dispatcher has the same two halves, each the inverse of the other on kept tokens:

  dispatch(tokens [G S D], plan)          -> expert_inputs [E G C D]
  combine(expert_outputs [E G C D], plan) -> outputs [G S D]

`einsum` is the oracle, `gather` the fast one; `exchange` moves the experts' buffers between the
devices of a mesh axis and serves both. `decode` is for decoding alone: it has blocks in place of
slots and no gradient, so that no config can name it.
"""

from types import ModuleType

from moe_jax.dispatch import decode, einsum, gather
from moe_jax.dispatch.exchange import from_experts, to_experts

DISPATCHERS: dict[str, ModuleType] = {'einsum': einsum, 'gather': gather}
# Value of `MoeOptions.dispatch` in place of one of these.
DECODE = 'decode'

__all__ = ['DECODE', 'DISPATCHERS', 'decode', 'einsum', 'from_experts', 'gather', 'to_experts']
