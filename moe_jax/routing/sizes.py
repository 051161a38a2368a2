"""Static sizes of a routing group that follow from the router and the capacity factor."""

from typing import NamedTuple

from moe_jax.routing import capacity as capacity_lib
from moe_jax.routing.router import Router


class Sizes(NamedTuple):
  """Sizes of one routing group.

  Attributes:
    capacity: C, slots of each expert; at most the S tokens that one expert can take.
    mean_selected: assignments of a token, on average, that balanced experts share.
    limited: whether C is a buffer to be filled: it is below S, or the router fills all S slots.
  """

  capacity: int
  mean_selected: int | float
  limited: bool


def group_sizes(
  router: Router,
  tokens_in_group: int,
  *,
  num_experts: int,
  num_selected_experts: int,
  capacity_factor: float | None,
) -> Sizes:
  """Returns the sizes of a routing group.

  Args:
    router: its `slots` say what the capacity factor means.
    tokens_in_group: S.
    num_experts: E.
    num_selected_experts: K.
    capacity_factor: slots per assignment under perfect balance; None never drops.
  """
  if router.slots == 'all':
    return Sizes(tokens_in_group, num_experts, limited=True)
  capacity = tokens_in_group
  if capacity_factor is not None:
    slots = capacity_lib.expert_capacity(
      tokens_in_group, num_experts, num_selected_experts, capacity_factor
    )
    capacity = min(slots, tokens_in_group)
  mean: int | float = num_selected_experts
  if router.slots == 'filled':
    mean = capacity * num_experts / tokens_in_group
  return Sizes(capacity, mean, limited=capacity < tokens_in_group)
