"""Static sizes of a routing group: capacity, and the sizes that follow from it and the router."""

import fractions
import math
from typing import NamedTuple

from moe_jax.routing.router import Router


def expert_capacity(
  group_size: int, num_experts: int, num_selected_experts: int, capacity_factor: float
) -> int:
  """Returns the tokens each expert accepts from one routing group.

  ceil(S * K * capacity_factor / E), in exact rational arithmetic, at least 1. The factor is read as
  the decimal a person wrote: 1.1 means 11/10, not the binary fraction just above it, which would
  round 110 up to 111.

  Args:
    group_size: S, tokens in a routing group.
    num_experts: E.
    num_selected_experts: K, experts each token selects.
    capacity_factor: slots per assignment under perfect balance.

  Returns:
    C, slots. May exceed S, which no expert can ever fill: a token selects an expert once.

  Raises:
    ValueError: if capacity_factor is not a positive finite number, group_size < 1, or not
      1 <= K <= E; names the value.

  Source: Lepikhin et al. 2020, arXiv:2006.16668, sec. 2.2. Differs: K is explicit; GShard's 2 is K.
  Mesh TensorFlow (da90793) and Flaxformer (399ea3a) leave K out of their factor: theirs is K times
  ours. They round otherwise: Mesh TensorFlow down, to at least 4; Lingvo (01ededf) down, then up to
  a multiple of 4; Flaxformer to the nearest; V-MoE's code (942a78b) up to a multiple of 4.
  """
  if not (capacity_factor > 0 and math.isfinite(capacity_factor)):
    raise ValueError(f'capacity_factor={capacity_factor!r}: must be a positive finite number')
  if not 1 <= num_selected_experts <= num_experts:
    raise ValueError(
      f'num_selected_experts={num_selected_experts!r}: must be in 1..num_experts={num_experts}'
    )
  if group_size < 1:
    raise ValueError(f'group_size={group_size!r}: must be at least 1 token')
  # repr is the shortest decimal that reads back as this float. In float arithmetic 100 * 1.1 lies
  # just above 110, and the ceiling would be 111.
  factor = fractions.Fraction(repr(float(capacity_factor)))
  return max(1, math.ceil(group_size * num_selected_experts * factor / num_experts))


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
    router: its `slots` define the meaning of the capacity factor.
    tokens_in_group: S.
    num_experts: E.
    num_selected_experts: K.
    capacity_factor: slots per assignment under perfect balance; None never drops.
  """
  # A slot for each token at each expert: C = S, and a token has E assignments.
  if router.slots == 'all':
    return Sizes(tokens_in_group, num_experts, limited=True)
  capacity = tokens_in_group
  if capacity_factor is not None:
    slots = expert_capacity(tokens_in_group, num_experts, num_selected_experts, capacity_factor)
    # A token takes one slot of an expert at most, so more than S would stay empty.
    capacity = min(slots, tokens_in_group)
  mean: int | float = num_selected_experts
  # Where experts fill their slots, assignments follow from C, not from K.
  if router.slots == 'filled':
    mean = capacity * num_experts / tokens_in_group
  return Sizes(capacity, mean, limited=capacity < tokens_in_group)
