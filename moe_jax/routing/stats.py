"""What happened in a router, as float32 sums that add up over groups, devices and micro-batches.

Losses and metrics are formed from these sums, never from means of means: a sum over valid tokens is
the same number on any mesh. Nothing here is multiplied by a loss weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing.plan import Plan


class RouterSums(NamedTuple):
  """Sums over the valid tokens of one MoE layer.

  N is the number of balance scopes: the load-balancing loss is formed in each and averaged.

  Attributes:
    tokens: valid tokens in each scope.
    tokens_per_expert: assignments to each expert BEFORE any drop.
    prob_sum: sum of router probabilities of each expert. Carries gradient.
    kept_per_expert: assignments that got a slot, over all scopes.
    tokens_all_dropped: tokens none of whose K assignments got a slot.
    logsumexp_squared: sum of the squared log-partition of the logits. Carries gradient.
    entropy: sum of the entropy of the router probabilities, in nats.
    top_prob: sum of the largest router probability of each token.
  """

  tokens: Float[Array, 'N']
  tokens_per_expert: Float[Array, 'N E']
  prob_sum: Float[Array, 'N E']
  kept_per_expert: Float[Array, 'E']
  tokens_all_dropped: Float[Array, '']
  logsumexp_squared: Float[Array, '']
  entropy: Float[Array, '']
  top_prob: Float[Array, '']


def router_sums(
  router_logits: Float[Array, 'G S E'],
  router_probs: Float[Array, 'G S E'],
  plan: Plan,
  valid: Bool[Array, 'G S'],
  scope_index: Int[Array, 'G'],
  num_scopes: int,
) -> RouterSums:
  """Counts what a router did in the groups given, over valid tokens only.

  Args:
    router_logits: float32.
    router_probs: softmax of the logits over all experts.
    plan: what became of the assignments.
    valid: False for padding.
    scope_index: the balance scope of each group, 0..N-1.
    num_scopes: N.
  """
  num_experts = router_logits.shape[-1]
  mask = valid.astype(jnp.float32)
  # Counts go through an int32 segment sum: a float32 sum of ones stops at 2**24.
  group, _, _ = plan.expert_index.shape
  bin_index = jnp.arange(group)[:, None, None] * num_experts + plan.expert_index
  selected = _count(bin_index, valid[..., None] | jnp.zeros_like(plan.keep), group * num_experts)
  kept = _count(bin_index, plan.keep, group * num_experts)
  selected_per_group = selected.reshape(group, num_experts).astype(jnp.float32)
  kept_per_group = kept.reshape(group, num_experts).astype(jnp.float32)
  in_scope = jax.nn.one_hot(scope_index, num_scopes, axis=0, dtype=jnp.float32)

  def to_scopes(per_group: Float[Array, 'G *rest']) -> Float[Array, 'N *rest']:
    return jnp.einsum('ng,g...->n...', in_scope, per_group, precision='highest')

  logsumexp = jax.nn.logsumexp(router_logits, axis=-1)
  # H(p) = lse(z) - sum p z: no log of a probability that underflowed.
  entropy = logsumexp - jnp.sum(router_probs * router_logits, axis=-1)
  lost = valid & ~jnp.any(plan.keep, axis=-1)
  return RouterSums(
    tokens=to_scopes(jnp.sum(mask, axis=-1)),
    tokens_per_expert=to_scopes(selected_per_group),
    prob_sum=to_scopes(jnp.sum(router_probs * mask[..., None], axis=1)),
    kept_per_expert=jnp.sum(kept_per_group, axis=0),
    tokens_all_dropped=jnp.sum(lost.astype(jnp.float32)),
    logsumexp_squared=jnp.sum(jnp.square(logsumexp) * mask),
    entropy=jax.lax.stop_gradient(jnp.sum(entropy * mask)),
    top_prob=jax.lax.stop_gradient(jnp.sum(jnp.max(router_probs, axis=-1) * mask)),
  )


def _count(
  bin_index: Int[Array, '*any'], counted: Bool[Array, '*any'], num_bins: int
) -> Int[Array, 'bins']:
  return jax.ops.segment_sum(counted.astype(jnp.int32).ravel(), bin_index.ravel(), num_bins)
