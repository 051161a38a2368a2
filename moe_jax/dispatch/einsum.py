"""The oracle: dispatch and combine as matmuls with one-hot tensors [G S E C].

Its cost grows with S * E * C, so it is for checking, not for training.

Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 2.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, C
slots of an expert, D embed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.plan import Plan


def dispatch(tokens: Float[Array, 'G S D'], plan: Plan) -> Float[Array, 'E G C D']:
  """Copies each kept token into the slots the plan gave it; empty slots are zero."""
  # [G S K E C] -> [G S E C], 0 or 1: no token selects an expert twice.
  one_hot = jnp.sum(_one_hot(plan), axis=2).astype(tokens.dtype)
  return jnp.einsum('gsec,gsd->egcd', one_hot, tokens, precision='highest')


def combine(expert_outputs: Float[Array, 'E G C D'], plan: Plan) -> Float[Array, 'G S D']:
  """Sums the outputs of each token's experts, weighted by `plan.combine_weights`, in float32."""
  # [G S K E C] weighted by [G S K] -> [G S E C]; 0 for a dropped assignment.
  weights = jnp.einsum('gskec,gsk->gsec', _one_hot(plan), plan.combine_weights, precision='highest')
  outputs = jnp.einsum(
    'gsec,egcd->gsd', weights, expert_outputs.astype(jnp.float32), precision='highest'
  )
  return outputs.astype(expert_outputs.dtype)


def _one_hot(plan: Plan) -> Float[Array, 'G S K E C']:
  """One-hot over (expert, slot) for each kept assignment, zero for a dropped one."""
  _, num_experts, capacity = plan.source_index.shape
  expert = jax.nn.one_hot(plan.expert_index, num_experts)
  slot = jax.nn.one_hot(plan.slot_index, capacity)
  keep = plan.keep.astype(jnp.float32)
  return jnp.einsum('gske,gskc,gsk->gskec', expert, slot, keep, precision='highest')
