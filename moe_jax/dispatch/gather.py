"""Dispatch and combine by gathers, in both directions: no one-hot and no scatter-add.

A gather's transpose is a scatter-add. Here the plan knows both directions (`source_index`: slot to
assignment; `expert_index`, `slot_index`: assignment to slot), so each backward pass is written as a
gather too.

Where a token may select any number of experts (K = E) there are far more assignments than slots:
then tokens sum over the slots instead, with a scatter-add, so that the cost is that of the fewer.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, C
slots of an expert, D embed.
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
  # Assignment s * K + k of the group stands in the slot, S * K where the slot is empty.
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
  # A dropped assignment reads its expert's last slot, and is zeroed below.
  row = (plan.expert_index * num_groups + group) * capacity + slot
  return jnp.where(plan.keep[..., None], buffer.reshape(-1, width)[row], 0)


def _has_fewer_slots(plan: Plan) -> bool:
  """True if E * C slots are fewer than S * K assignments; known at compile time."""
  return plan.source_index[0].size < plan.expert_index[0].size


def _slot_weights(combine_weights: Float[Array, 'G S K'], plan: Plan) -> Float[Array, 'E G C']:
  """The weight of the assignment in each slot; of empty ones too, whose rows must be zero."""
  num_groups, num_assignments = combine_weights.shape[0], combine_weights[0].size
  source = jnp.moveaxis(plan.source_index, 1, 0)
  group = jnp.arange(num_groups)[None, :, None]
  index = group * num_assignments + jnp.minimum(source, num_assignments - 1)
  return combine_weights.reshape(-1)[index]


def _add_to_tokens(rows: Float[Array, 'E G C D'], plan: Plan) -> Float[Array, 'G S D']:
  """Each token sums the rows of its slots; those of empty slots are left out."""
  num_groups, group_size, num_selected = plan.expert_index.shape
  source = jnp.moveaxis(plan.source_index, 1, 0)
  group = jnp.arange(num_groups)[None, :, None]
  filled = source < group_size * num_selected
  # An empty slot adds to a token past the last, which `mode='drop'` leaves out.
  token = jnp.where(filled, group * group_size + source // num_selected, num_groups * group_size)
  total = jnp.zeros((num_groups * group_size, rows.shape[-1]), rows.dtype)
  total = total.at[token.ravel()].add(rows.reshape(-1, rows.shape[-1]), mode='drop')
  return total.reshape(num_groups, group_size, -1)


def _give_to_assignments(values: Float[Array, 'E G C'], plan: Plan) -> Float[Array, 'G S K']:
  """Each assignment gets the value of its slot, 0 without one."""
  num_groups, num_assignments = plan.expert_index.shape[0], plan.expert_index[0].size
  source = jnp.moveaxis(plan.source_index, 1, 0)
  group = jnp.arange(num_groups)[None, :, None]
  filled = source < num_assignments
  index = jnp.where(filled, group * num_assignments + source, num_groups * num_assignments)
  given = jnp.zeros((num_groups * num_assignments,), values.dtype)
  given = given.at[index.ravel()].set(values.ravel(), mode='drop')
  return given.reshape(plan.expert_index.shape)


@jax.custom_vjp
def _dispatch(tokens, plan):
  return _take_tokens(tokens, plan)


def _dispatch_fwd(tokens, plan):
  return _take_tokens(tokens, plan), plan


def _dispatch_bwd(plan, d_rows):
  if _has_fewer_slots(plan):
    return _add_to_tokens(d_rows.astype(jnp.float32), plan).astype(d_rows.dtype), None
  return jnp.sum(_take_slots(d_rows, plan).astype(jnp.float32), axis=2).astype(d_rows.dtype), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(expert_outputs, combine_weights, plan):
  return _weighted_sum(expert_outputs, combine_weights, plan)


def _weighted_sum(expert_outputs, combine_weights, plan):
  if _has_fewer_slots(plan):
    rows = expert_outputs.astype(jnp.float32) * _slot_weights(combine_weights, plan)[..., None]
    return _add_to_tokens(rows, plan).astype(expert_outputs.dtype)
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


def _combine_bwd(residuals, d_y):
  expert_outputs, combine_weights, plan = residuals
  # y = sum_k weight * output: the gradient of an output is its token's gradient, weighted; that of
  # a weight is the dot product of its token's gradient with the output.
  d_y_rows = _take_tokens(d_y, plan).astype(jnp.float32)
  d_outputs = d_y_rows * _slot_weights(combine_weights, plan)[..., None]
  if _has_fewer_slots(plan):
    d_slot_weights = jnp.sum(expert_outputs.astype(jnp.float32) * d_y_rows, axis=-1)
    d_weights = _give_to_assignments(d_slot_weights, plan)
  else:
    rows = _take_slots(expert_outputs, plan).astype(jnp.float32)
    d_weights = jnp.einsum('gskd,gsd->gsk', rows, d_y.astype(jnp.float32), precision='highest')
  return d_outputs.astype(expert_outputs.dtype), d_weights, None


_combine.defvjp(_combine_fwd, _combine_bwd)
