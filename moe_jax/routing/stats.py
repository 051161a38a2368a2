"""Statistics of a router, as float32 sums that add up over groups, devices and micro-batches.

Losses and metrics are formed from these sums, never from means of means: a sum over valid tokens is
the same number on any mesh. Nothing here is multiplied by a loss weight.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, N
balance scopes, n parts of a group.
"""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing.plan import Plan
from moe_jax.routing.router import Choice


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
    entropy: sum of the entropy of the router probabilities, in nats. Carries gradient.
    top_prob: sum of the largest router probability of each token.
    logsumexp_max: the largest log-partition of a token's logits; -inf without a valid token.
    slots: in total, E * C for each group.
    own: sums of the router itself, over all scopes. May carry gradient.
  """

  tokens: Float[Array, 'N']
  tokens_per_expert: Float[Array, 'N E']
  prob_sum: Float[Array, 'N E']
  kept_per_expert: Float[Array, 'E']
  tokens_all_dropped: Float[Array, '']
  logsumexp_squared: Float[Array, '']
  entropy: Float[Array, '']
  top_prob: Float[Array, '']
  logsumexp_max: Float[Array, '']
  slots: Float[Array, '']
  own: dict[str, Float[Array, '...']]


def router_sums(
  choice: Choice,
  plan: Plan,
  valid: Bool[Array, 'G S'],
  scope_index: Int[Array, 'G n'],
  num_scopes: int,
) -> RouterSums:
  """Counts what a router did in the groups given, over valid tokens only.

  Args:
    choice: of the router.
    plan: of its assignments.
    valid: False for padding.
    scope_index: the balance scope, 0..N-1, of each of the n parts of a group: token s belongs to
      part s % n. n = 1 where a group lies in one scope; where a scope is a sequence, n is the
      sequences in a group.
    num_scopes: N.
  """
  router_logits, router_probs = choice.router_logits, choice.router_probs
  num_experts = router_logits.shape[-1]
  # Before the drop: what the router wanted, which losses read. After it: `kept` and `lost`, only
  # for metrics.
  mask = valid.astype(jnp.float32)
  # Counts go through an int32 segment sum: a float32 sum of ones stops at 2**24.
  groups, group_size, _ = plan.expert_index.shape
  parts = scope_index.shape[1]
  # [G S]: the part that each token counts for, numbered over all groups.
  part = jnp.arange(groups)[:, None] * parts + (jnp.arange(group_size) % parts)[None]
  selected = _count(
    part[..., None] * num_experts + plan.expert_index, plan.requested, groups * parts * num_experts
  )
  kept = _count(plan.expert_index, plan.keep, num_experts)

  def to_parts(per_token: Float[Array, 'G S *rest']) -> Float[Array, 'parts *rest']:
    rest = per_token.shape[2:]
    # Token s is of part s % n: [G S] -> [G S/n n] -> [G n].
    summed = jnp.sum(per_token.reshape(groups, group_size // parts, parts, *rest), axis=1)
    return summed.reshape(groups * parts, *rest)

  def to_scopes(per_part: Float[Array, 'parts *rest']) -> Float[Array, 'N *rest']:
    if num_scopes == 1:
      return jnp.sum(per_part, axis=0, keepdims=True)
    # Not a product with a one-hot: that costs sequences x scopes where a scope is a sequence.
    return jax.ops.segment_sum(per_part, scope_index.ravel(), num_scopes)

  logsumexp = jax.nn.logsumexp(router_logits, axis=-1)
  # The tiny number keeps the gradient finite where a probability underflowed.
  entropy = -jnp.sum(router_probs * jnp.log(router_probs + 1e-30), axis=-1)
  # A token is lost if none of its assignments has a slot; a residual connection is all it gets.
  lost = valid & ~jnp.any(plan.keep, axis=-1)
  return RouterSums(
    tokens=to_scopes(to_parts(mask)),
    tokens_per_expert=to_scopes(selected.reshape(-1, num_experts).astype(jnp.float32)),
    prob_sum=to_scopes(to_parts(router_probs * mask[..., None])),
    kept_per_expert=kept.astype(jnp.float32),
    tokens_all_dropped=jnp.sum(lost.astype(jnp.float32)),
    logsumexp_squared=jnp.sum(jnp.square(logsumexp) * mask),
    entropy=jnp.sum(entropy * mask),
    # Only metrics: without gradient.
    top_prob=jax.lax.stop_gradient(jnp.sum(jnp.max(router_probs, axis=-1) * mask)),
    logsumexp_max=jax.lax.stop_gradient(jnp.max(jnp.where(valid, logsumexp, -jnp.inf))),
    slots=jnp.float32(plan.source_index.size),
    own={name: jnp.sum(value, axis=0) for name, value in choice.sums.items()},
  )


def add_sums(one: RouterSums, other: RouterSums) -> RouterSums:
  """Adds up two parts of a batch; NumPy arrays too."""
  total = jax.tree.map(operator.add, one, other)
  # All are sums but this maximum, which keeps a NaN of either part.
  return total._replace(logsumexp_max=jnp.maximum(one.logsumexp_max, other.logsumexp_max))


def _count(
  bin_index: Int[Array, '*any'], counted: Bool[Array, '*any'], num_bins: int
) -> Int[Array, 'bins']:
  return jax.ops.segment_sum(counted.astype(jnp.int32).ravel(), bin_index.ravel(), num_bins)
