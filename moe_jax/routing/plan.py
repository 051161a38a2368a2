"""The plan: which assignment gets which slot of which expert, and which ones are dropped.

An *assignment* is a pair (token s, choice k) with flat index s * K + k. A plan is data: any router
makes one and any dispatcher runs it, so a routing experiment cannot change performance code.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, C
slots of an expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.routing.router import Choice
from moe_jax.routing.routers.top_k import RENORMALIZATIONS

# Which assignments get a slot when an expert has fewer slots than assignments. Only `token` is
# causal in a decoder language model: with the others, a later token can take the slot of an earlier
# one.
PRIORITIES = ('token', 'choice', 'priority', 'random')
CAUSAL_PRIORITIES = ('token',)


class Plan(NamedTuple):
  """Slots of the assignments of a routing group.

  Attributes:
    expert_index: the selected expert of each assignment.
    slot_index: rank of the assignment among all of its expert's, in order of priority. It is kept
      if the rank is below the capacity. 0 for assignments that request no slot.
    requested: True if the assignment requests a slot: selected by the router, and not of padding.
    keep: True if the assignment got a slot.
    combine_weights: the gate of a kept assignment, 0 for a dropped one.
    source_index: the assignment in each slot; S * K where the slot is empty.
  """

  expert_index: Int[Array, 'G S K']
  slot_index: Int[Array, 'G S K']
  requested: Bool[Array, 'G S K']
  keep: Bool[Array, 'G S K']
  combine_weights: Float[Array, 'G S K']
  source_index: Int[Array, 'G E C']


def make_plan(
  choice: Choice,
  valid: Bool[Array, 'G S'],
  keys: Key[Array, 'G'],
  *,
  capacity: int,
  priority: str = 'token',
  renormalize: str = 'before_drop',
) -> Plan:
  """Gives the slots of each expert to its assignments in order of priority.

  Tokens of a group stand in order of position: position t of every sequence before t + 1 of any.

  Args:
    choice: from a router.
    valid: False for padding, which takes no slot.
    keys: one per group; only `random` reads them.
    capacity: C, slots per expert and group.
    priority: `token`: by position, then choice (s, k). `choice`: all first choices before any
      second choice (k, s). `priority`: tokens by their largest router probability, descending, then
      as `choice`; equal probabilities by position. `random`: assignments in random order.
    renormalize: `after_drop` divides the kept gates of a token by their sum.

  Raises:
    ValueError: for an unknown `priority` or `renormalize`, capacity < 1, or a group of more
      assignments than int32 can number.

  Source: `choice`: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1. `priority`: Riquelme et al.
  2021, arXiv:2106.05974, sec. 4.1 (batch-prioritized routing) within a group. `random`: DeepSpeed's
  random token selection, over all K choices together.
  """
  if priority not in PRIORITIES:
    raise ValueError(f'priority={priority!r}: must be one of {PRIORITIES}')
  if renormalize not in RENORMALIZATIONS:
    raise ValueError(f'renormalize={renormalize!r}: must be one of {RENORMALIZATIONS}')
  if capacity < 1:
    raise ValueError(f'capacity={capacity!r}: must be at least 1 slot')
  _, group_size, num_experts = choice.router_probs.shape
  num_selected = choice.expert_index.shape[-1]
  if group_size * num_selected >= 2**31:
    raise ValueError(
      f'group_size={group_size}: group_size * num_selected_experts must stay below 2**31'
    )

  # One group at a time: groups share no slots. vmap adds the dimension G to all of it.
  def plan_group(expert_index, router_probs, requested, key):
    if priority == 'token' and num_selected == num_experts:
      return _count_slots(expert_index, requested, capacity)
    rank = _priority_rank(priority, router_probs, num_selected, key)
    return _assign_slots(expert_index, rank, requested, num_experts, capacity)

  requested = choice.chosen & valid[..., None]
  slot_index, source_index = jax.vmap(plan_group)(
    choice.expert_index, choice.router_probs, requested, keys
  )
  # Only here is an assignment dropped: its rank among its expert's is not below C.
  keep = (slot_index < capacity) & requested
  combine_weights = jnp.where(keep, choice.gates, 0)
  if renormalize == 'after_drop':
    total = jnp.sum(combine_weights, axis=-1, keepdims=True)
    # A token that lost all K experts has total 0: divide by 1, or the gradient is NaN.
    combine_weights = combine_weights / jnp.where(total > 0, total, 1)
  return Plan(choice.expert_index, slot_index, requested, keep, combine_weights, source_index)


def _priority_rank(
  priority: str, router_probs: Float[Array, 'S E'], num_selected: int, key: Key[Array, '']
) -> Int[Array, 'S K']:
  """Returns the rank of each assignment in the queue, from 0; a permutation of 0..S*K-1."""
  group_size = router_probs.shape[0]
  token = jnp.arange(group_size, dtype=jnp.int32)[:, None]
  choice = jnp.arange(num_selected, dtype=jnp.int32)[None, :]
  if priority == 'token':
    return token * num_selected + choice
  if priority == 'choice':
    return choice * group_size + token
  if priority == 'priority':
    # argsort of an argsort: the rank of each token, largest probability first.
    order = jnp.argsort(-jnp.max(router_probs, axis=-1), stable=True)
    token_rank = jnp.argsort(order).astype(jnp.int32)[:, None]
    return choice * group_size + token_rank
  # Over all S K assignments: the choices of a token stand apart in the queue.
  order = jax.random.permutation(key, group_size * num_selected)
  return order.astype(jnp.int32).reshape(group_size, num_selected)


def _assign_slots(
  expert_index: Int[Array, 'S K'],
  rank: Int[Array, 'S K'],
  requested: Bool[Array, 'S K'],
  num_experts: int,
  capacity: int,
) -> tuple[Int[Array, 'S K'], Int[Array, 'E C']]:
  """Ranks the assignments within each expert by one sort: O(S K log(S K)), no one-hot."""
  num_assignments = expert_index.size
  # Sort by (expert, priority): an assignment's slot is its position among its expert's. Those
  # without a slot queue for an expert E, behind all others.
  queue = jnp.where(requested, expert_index, num_experts)
  assignment = jnp.arange(num_assignments, dtype=jnp.int32)
  if (num_experts + 1) * num_assignments < 2**31:
    # One key instead of two: the sort takes half the time.
    sort_key = (queue * num_assignments + rank).ravel()
    sorted_key, sorted_assignment = jax.lax.sort((sort_key, assignment), num_keys=1)
    sorted_queue = sorted_key // num_assignments
  else:
    keys = (queue.ravel(), rank.ravel(), assignment)
    sorted_queue, _, sorted_assignment = jax.lax.sort(keys, num_keys=2)
  # starts[e]: where expert e begins in the sorted order; starts[E]: where those that request no
  # slot begin.
  experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
  starts = jnp.searchsorted(sorted_queue, experts).astype(jnp.int32)
  sorted_slot = jnp.where(sorted_queue < num_experts, assignment - starts[sorted_queue], 0)
  # From sorted order back to [S K]. Each assignment occurs once, so no two writes meet.
  slot_index = (
    jnp.zeros_like(sorted_slot)
    .at[sorted_assignment]
    .set(sorted_slot, unique_indices=True)
    .reshape(expert_index.shape)
  )
  # The other direction: slot c of expert e holds the assignment at starts[e] + c, if it is still
  # e's.
  index = starts[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)[None, :]
  filled = index < starts[1:, None]
  source_index = jnp.where(
    filled, sorted_assignment[jnp.minimum(index, num_assignments - 1)], num_assignments
  )
  return slot_index, source_index


def _count_slots(
  expert_index: Int[Array, 'S E'], requested: Bool[Array, 'S E'], capacity: int
) -> tuple[Int[Array, 'S E'], Int[Array, 'E C']]:
  """Same as `_assign_slots` by position where every token selects every expert, without a sort.

  The slot of an assignment is the number of earlier tokens that select the same expert: O(S E).
  """
  group_size, num_experts = expert_index.shape
  token = jnp.arange(group_size)[:, None]
  # Added, not set: an expert may also be named by an assignment that requests no slot.
  by_expert = jnp.zeros(requested.shape, jnp.int32).at[token, expert_index].add(requested)
  before = jnp.cumsum(by_expert, axis=0) - by_expert
  slot_index = jnp.where(requested, jnp.take_along_axis(before, expert_index, axis=1), 0)
  assignment = jnp.arange(requested.size, dtype=jnp.int32).reshape(requested.shape)
  # Assignments without a slot go one past the last, which is cut off.
  slot = jnp.where(requested, jnp.minimum(slot_index, capacity), capacity)
  source_index = jnp.full((num_experts, capacity + 1), requested.size, jnp.int32)
  source_index = source_index.at[expert_index, slot].set(assignment)[:, :capacity]
  return slot_index, source_index
