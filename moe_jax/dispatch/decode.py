"""Dispatch and combine for decoding: blocks of one expert each, nothing dropped, no gradient.

Few tokens meet many experts: slots for every token at every expert would make a step cost E / K
times its active FLOPs, and read the weights of all experts. Here assignments are sorted by expert
and cut into blocks of b rows. There are as many blocks as assignments need, which only the data
says; a step that goes through these alone reads the weights of no expert that nobody chose.

  assignments of expert 0: a d f   1: -   2: b   3: c e        b = 2

  blocks   [a d] [f .] [b .] [c e] [. .] [. .]      num_filled = 4
  expert     0     0     2     3     .     .

Source: Gale et al. 2022, arXiv:2211.15841 (blocks of one expert each). Differs: forward only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.plan import Plan

# Rows of a block from which on the product is bound by arithmetic, not by the expert's weights.
MOST_ROWS = 128


class Blocks(NamedTuple):
  """Rows for the experts of one device.

  Attributes:
    rows: of each block; zero where there is no assignment.
    expert: of each block, counted from the first of the device; any of them from `num_filled` on.
    num_filled: blocks that hold an assignment. They come first.
    place: the row, of all N * b, of each assignment; N * b where its expert is not here or it was
      not kept.
  """

  rows: Float[Array, 'N b D']
  expert: Int[Array, 'N']
  num_filled: Int[Array, '']
  place: Int[Array, 'G S K']


def rows_in_block(num_assignments: int, num_experts: int) -> int:
  """Returns b, by shape: 1 while there are fewer assignments than half the experts.

  Then most chosen experts have one row, and a block of more would be padding. Otherwise about twice
  the mean load, so that most experts need one block, whose weights are read once.
  """
  if 2 * num_assignments < num_experts:
    return 1
  mean = -(-num_assignments // num_experts)
  return min(MOST_ROWS, 2 ** (2 * mean - 1).bit_length())


def dispatch(
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  *,
  num_rows: int,
  num_experts: int,
  first_expert: Int[Array, ''] | int = 0,
) -> Blocks:
  """Copies each kept token into blocks of its experts.

  Args:
    tokens: of all groups.
    plan: of the same groups; its slots and their order are not looked at.
    num_rows: b.
    num_experts: of this device.
    first_expert: of this device; assignments to others than these are left out.
  """
  num_assignments, selected = plan.expert_index.size, plan.expert_index.shape[-1]
  num_blocks = min(num_assignments, num_assignments // num_rows + num_experts)
  local = plan.expert_index - first_expert
  here = plan.keep & (local >= 0) & (local < num_experts)
  queue = jnp.where(here, local, num_experts).ravel()
  numbers = jnp.arange(num_assignments, dtype=jnp.int32)
  sorted_queue, order = jax.lax.sort((queue, numbers), num_keys=1, is_stable=True)
  experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
  starts = jnp.searchsorted(sorted_queue, experts).astype(jnp.int32)
  loads = starts[1:] - starts[:-1]
  ends = jnp.cumsum(-(-loads // num_rows)).astype(jnp.int32)
  block = jnp.arange(num_blocks, dtype=jnp.int32)
  expert = jnp.minimum(jnp.searchsorted(ends, block, side='right'), num_experts - 1)
  first_block = ends - -(-loads // num_rows)
  # The rank of each row among its expert's assignments.
  rank = (block - first_block[expert])[:, None] * num_rows + jnp.arange(num_rows)[None]
  filled = (rank < loads[expert][:, None]) & (block < ends[-1])[:, None]
  source = jnp.where(filled, starts[expert][:, None] + rank, 0)
  token = order[source] // selected
  rows = jnp.where(filled[..., None], tokens.reshape(-1, tokens.shape[-1])[token], 0)

  known = jnp.minimum(sorted_queue, num_experts - 1)
  sorted_place = first_block[known] * num_rows + numbers - starts[known]
  sorted_place = jnp.where(sorted_queue < num_experts, sorted_place, num_blocks * num_rows)
  place = jnp.zeros_like(sorted_place).at[order].set(sorted_place, unique_indices=True)
  return Blocks(rows, expert.astype(jnp.int32), ends[-1], place.reshape(plan.expert_index.shape))


def combine(outputs: Float[Array, 'N b D'], blocks: Blocks, plan: Plan) -> Float[Array, 'G S D']:
  """Sums the outputs of each token's experts on this device, weighted by `plan.combine_weights`.

  Returns:
    float32: where experts are spread over devices, a part of the sum.
  """
  flat = outputs.reshape(-1, outputs.shape[-1])
  here = blocks.place < flat.shape[0]
  rows = jnp.where(here[..., None], flat[jnp.where(here, blocks.place, 0)], 0)
  return jnp.einsum(
    'gskd,gsk->gsd', rows.astype(jnp.float32), plan.combine_weights, precision='highest'
  )
