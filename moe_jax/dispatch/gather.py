"""Dispatch and combine by gathers, in both directions: no one-hot and no scatter-add.

A gather's transpose is a scatter-add. Here the plan knows both directions (`source_index`: slot to
assignment; `expert_index`, `slot_index`: assignment to slot), so each backward pass is written as a
gather too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.plan import Plan


def dispatch(tokens: Float[Array, 'G S D'], plan: Plan) -> Float[Array, 'E G C D']:
  """Copies each kept token into the slots the plan gave it; empty slots are zero."""
  return _dispatch(tokens, plan)


def combine(expert_outputs: Float[Array, 'E G C D'], plan: Plan) -> Float[Array, 'G S D']:
  """Sums the outputs of each token's experts, weighted by `plan.combine_weights`, in float32."""
  return _combine(expert_outputs, plan.combine_weights, plan)


def _take_tokens(tokens: Float[Array, 'G S D'], plan: Plan) -> Float[Array, 'E G C D']:
  """Slot (e, g, c) reads its token; an empty slot is zero."""
  num_groups, group_size, width = tokens.shape
  num_selected = plan.expert_index.shape[-1]
  source = jnp.moveaxis(plan.source_index, 1, 0)
  filled = source < group_size * num_selected
  group = jnp.arange(num_groups)[None, :, None]
  # Empty slots read the last token and are zeroed: an index that is always in bounds is cheaper
  # than a padded copy of the tokens.
  token = jnp.minimum(source // num_selected, group_size - 1)
  rows = tokens.reshape(-1, width)[group * group_size + token]
  return jnp.where(filled[..., None], rows, 0)


def _take_slots(buffer: Float[Array, 'E G C D'], plan: Plan) -> Float[Array, 'G S K D']:
  """Assignment (g, s, k) reads its slot; a dropped one is zero."""
  _, num_groups, capacity, width = buffer.shape
  group = jnp.arange(num_groups)[:, None, None]
  slot = jnp.minimum(plan.slot_index, capacity - 1)
  row = (plan.expert_index * num_groups + group) * capacity + slot
  return jnp.where(plan.keep[..., None], buffer.reshape(-1, width)[row], 0)


@jax.custom_vjp
def _dispatch(tokens, plan):
  return _take_tokens(tokens, plan)


def _dispatch_fwd(tokens, plan):
  return _take_tokens(tokens, plan), plan


def _dispatch_bwd(plan, grad):
  return jnp.sum(_take_slots(grad, plan).astype(jnp.float32), axis=2).astype(grad.dtype), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(expert_outputs, combine_weights, plan):
  return _weighted_sum(expert_outputs, combine_weights, plan)


def _weighted_sum(expert_outputs, combine_weights, plan):
  rows = _take_slots(expert_outputs, plan).astype(jnp.float32)
  return jnp.einsum('gskd,gsk->gsd', rows, combine_weights, precision='highest').astype(
    expert_outputs.dtype
  )


def _combine_fwd(expert_outputs, combine_weights, plan):
  return _weighted_sum(expert_outputs, combine_weights, plan), (
    expert_outputs,
    combine_weights,
    plan,
  )


def _combine_bwd(residuals, grad):
  expert_outputs, combine_weights, plan = residuals
  num_groups = combine_weights.shape[0]
  rows = _take_slots(expert_outputs, plan).astype(jnp.float32)
  grad_weights = jnp.einsum('gskd,gsd->gsk', rows, grad.astype(jnp.float32), precision='highest')
  num_assignments = combine_weights[0].size
  source = jnp.moveaxis(plan.source_index, 1, 0)
  group = jnp.arange(num_groups)[None, :, None]
  # An empty slot reads token S - 1 in _take_tokens and is zeroed there, so its weight is free.
  weight = combine_weights.reshape(-1)[
    group * num_assignments + jnp.minimum(source, num_assignments - 1)
  ]
  grad_outputs = _take_tokens(grad, plan).astype(jnp.float32) * weight[..., None]
  return grad_outputs.astype(expert_outputs.dtype), grad_weights, None


_combine.defvjp(_combine_fwd, _combine_bwd)
