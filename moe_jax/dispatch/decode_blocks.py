"""Dispatch and combine for decoding: blocks of one expert each, nothing dropped, no gradient.

Few tokens meet many experts: slots for every token at every expert would make a step cost E / K
times its active FLOPs, and read the weights of all experts. Here assignments are sorted by expert
and cut into blocks of b rows. There are as many blocks as assignments need, which depends on the
data; a step that goes through only these reads no weights of an expert that no token selected.

  assignments of expert 0: a d f   1: -   2: b   3: c e        b = 2

  blocks   [a d] [f .] [b .] [c e] [. .] [. .]      num_filled = 4
  expert     0     0     2     3     .     .

Source: Gale et al. 2022, arXiv:2211.15841 (blocks of one expert each). Differs: forward only.

One-letter dimensions: G routing groups, S tokens of a group, K assignments of a token, D embed, N
blocks, b rows of a block.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import blocks as blocks_lib
from moe_jax.experts.decode import Blocks
from moe_jax.routing.plan import Plan

# Rows of a block at most: more gain nothing, and where a prompt is mostly padding, which is counted
# among the assignments but takes no row, blocks would be mostly empty.
MOST_ROWS = 144


def rows_in_block(num_assignments: int, num_experts: int) -> int:
  """Returns b, by shape, as measured on CPUs. Prompts are run in blocks, too.

  1 while there are fewer assignments than half the experts: then most selected experts have one
  row. Then about twice the mean load, so that most experts need one block, whose weights are read
  once. From a mean of 8 on, where empty rows cost more than that, the mean and one deviation of a
  random load.
  """
  if 2 * num_assignments < num_experts:
    return 1
  mean = num_assignments / num_experts
  if mean <= 8:
    return 2 ** (2 * math.ceil(mean) - 1).bit_length()
  return min(MOST_ROWS, max(16, 4 * math.ceil((mean + math.sqrt(mean)) / 4)))


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
    plan: of the same groups; its slots and their order are not read.
    num_rows: b.
    num_experts: of this device.
    first_expert: of this device; assignments to others than these are left out.
  """
  selected = plan.expert_index.shape[-1]
  # Where experts are spread over devices, each takes only the assignments of its own.
  local = plan.expert_index - first_expert
  here = plan.keep & (local >= 0) & (local < num_experts)
  # Others queue for an expert that isn't there, behind all blocks.
  queue = jnp.where(here, local, num_experts).ravel()
  blocks = blocks_lib.sort_into_blocks(queue, num_experts, num_rows)
  rows = blocks_lib.rows(tokens.reshape(-1, tokens.shape[-1]), blocks.items // selected)
  expert = blocks_lib.expert_of(blocks, jnp.arange(len(blocks.items), dtype=jnp.int32))
  return Blocks(
    rows,
    jnp.minimum(expert, num_experts - 1),
    blocks.ends[-1],
    jnp.where(here, blocks.position.reshape(here.shape), blocks.items.size),
  )


def combine(outputs: Float[Array, 'N b D'], blocks: Blocks, plan: Plan) -> Float[Array, 'G S D']:
  """Sums the outputs of each token's experts on this device, weighted by `plan.combine_weights`.

  Returns:
    float32: where experts are spread over devices, a part of the sum.
  """
  flat = outputs.reshape(-1, outputs.shape[-1])
  here = blocks.row_index < flat.shape[0]
  rows = jnp.where(here[..., None], flat[jnp.where(here, blocks.row_index, 0)], 0)
  return jnp.einsum(
    'gskd,gsk->gsd', rows.astype(jnp.float32), plan.combine_weights, precision='highest'
  )
