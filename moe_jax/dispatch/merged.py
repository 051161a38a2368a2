"""One routing group instead of several: kept assignments stay kept, and slots are renumbered.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, N
= G S tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from moe_jax.routing.plan import Plan


def merge(plan: Plan, base: int) -> tuple[Plan, Bool[Array, '1 N K']]:
  """Merges all routing groups into one, keeping what the plan keeps.

  The slots of an expert are then filled from the first on, without a gap between groups.

  Args:
    plan: of each group; `source_index` is not read.
    base: C0, slots of each expert in the merged plan.

  Returns:
    The plan of the base: assignments with a slot below `base`. And the mask of those kept beyond
    it: none, if there are as many slots as all groups have.
  """
  groups, size, _ = plan.expert_index.shape
  num_experts = plan.source_index.shape[1]
  kept_before = _kept_in_earlier_groups(plan, num_experts)
  group = jnp.arange(groups)[:, None, None]
  # Behind what earlier groups keep at the same expert.
  slot = plan.slot_index + kept_before[group, plan.expert_index]
  expert, slot, requested, keep, weights = (
    a.reshape(1, groups * size, -1)
    for a in (plan.expert_index, slot, plan.requested, plan.keep, plan.combine_weights)
  )
  in_base = keep & (slot < base)
  # The inverse: which assignment stands in each slot of the base. The rest goes past the end.
  index = jnp.where(in_base, expert * base + slot, num_experts * base).ravel()
  source = jnp.full((num_experts * base,), expert.size, jnp.int32)
  source = source.at[index].set(jnp.arange(expert.size, dtype=jnp.int32), mode='drop')
  base_plan = Plan(
    expert, slot, requested, in_base, jnp.where(in_base, weights, 0), source.reshape(1, -1, base)
  )
  return base_plan, keep & ~in_base


def _kept_in_earlier_groups(plan: Plan, num_experts: int) -> Int[Array, 'G E']:
  groups = plan.expert_index.shape[0]
  index = jnp.arange(groups)[:, None, None] * num_experts + plan.expert_index
  kept = jnp.zeros((groups * num_experts,), jnp.int32).at[index.ravel()].add(plan.keep.ravel())
  kept = kept.reshape(groups, num_experts)
  return jnp.cumsum(kept, axis=0) - kept
