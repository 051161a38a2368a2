"""Slots that are mixtures of tokens (Soft MoE), and back.

G groups, S tokens in a group, E experts, P slots per expert, D embed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.router import Mixture


def mix_tokens(mixture: Mixture, tokens: Float[Array, 'G S D']) -> Float[Array, 'E G P D']:
  """Fills each slot with its mixture of tokens, summed in float32."""
  # A slot sums over all S tokens: in bfloat16 the small terms would be lost.
  wide = tokens.astype(jnp.float32)
  slots = jnp.einsum('gsep,gsd->egpd', mixture.dispatch, wide, precision='highest')
  return slots.astype(tokens.dtype)


def mix_slots(mixture: Mixture, expert_outputs: Float[Array, 'E G P D']) -> Float[Array, 'G S D']:
  """Gives each token its mixture of the slots, summed in float32."""
  wide = expert_outputs.astype(jnp.float32)
  y = jnp.einsum('gsep,egpd->gsd', mixture.combine, wide, precision='highest')
  return y.astype(expert_outputs.dtype)
