"""Dispatch without a capacity: every kept assignment of a plan is computed, whatever the loads.

  assignments --> slot below the base: one buffer [E, C0, D], as of a capacity, batched matmuls
              --> the rest:            block by block, in loops as long as there are rows

The base holds the mean load and `SLACK` standard deviations of random routing above it, so
balanced routing leaves next to nothing for the loops, and a collapsed router costs the loops at
most the work of its assignments once more. No array grows with the largest load.

Across a mesh axis the base is exchanged like any buffer; the rest goes in rounds of a fixed number
of rows from each device to each other, as many rounds as the fullest pair of devices needs. Rounds
are always padded, also where the base is exchanged ragged: they are rare and small by design.

The weights pass *through* the loops on their way to the base: so the loops' backward pass gets the
gradient that the base gives, [E D F], and adds to it in place instead of making another.

Source: none. Block-sparse groups: Gale et al. 2022, arXiv:2211.15841, sec. 5 (MegaBlocks); differs:
most rows go through one batched matmul, which was faster than blocks (experiments/LOG.md), and the
expert's weights are read by a loop instead of a kernel.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_jax.dispatch import blocks as blocks_lib
from moe_jax.dispatch import exchange, gather, merged
from moe_jax.dispatch.blocks import Experts, Gradients, Weights
from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.routing.plan import Plan
from moe_jax.routing.router import varying_like

# Standard deviations of the load of random routing that the base holds above the mean. A router's
# loads spread more, and a block beyond the base reads the weights of its expert again.
SLACK = 3.0
# Rows of a block at most. What an expert has beyond the base is of the order of the deviation of
# its load, and most of a larger block would be empty.
LARGEST_BLOCK = 128
# Rows that a device sends to each other in a round: this part of an even share.
ROUND_SHARE = 16


class Sizes(NamedTuple):
  """Static sizes on one device.

  Attributes:
    base: C0, slots of each expert in the base.
    block: B, rows of a block.
    round: X, rows from a device to each other in a round.
  """

  base: int
  block: int
  round: int


def sizes_of(
  num_tokens: int, num_experts: int, num_selected: int | float, num_devices: int
) -> Sizes:
  """Returns the sizes for one device.

  Args:
    num_tokens: on this device.
    num_experts: E, of all devices.
    num_selected: assignments of a token, on average.
    num_devices: R, along the axis that the experts are split over.
  """
  mean = num_tokens * num_selected / num_experts
  base = 8 * math.ceil((mean + SLACK * math.sqrt(mean)) / 8)
  # A power of 2 near two deviations: what is beyond the base is fewer rows, or very many.
  block = 2 ** round(math.log2(min(max(2 * math.sqrt(mean), 8), LARGEST_BLOCK)))
  share = num_tokens * num_selected / num_devices / ROUND_SHARE
  return Sizes(min(base, num_tokens), block, max(16, 8 * math.ceil(share / 8)))


class Rest(NamedTuple):
  """The assignments beyond the base.

  Attributes:
    expert: of each assignment; E for those that are not beyond.
    rank: position among its expert's.
    counts: of each expert.
  """

  expert: Int[Array, 'N_K']
  rank: Int[Array, 'N_K']
  counts: Int[Array, 'E']


def find_rest(plan: Plan, beyond: Bool[Array, '1 N K'], base: int) -> Rest:
  """Returns the assignments beyond the base; their slots are their ranks."""
  num_experts = plan.source_index.shape[1]
  expert, beyond = plan.expert_index.ravel(), beyond.ravel()
  counts = jnp.zeros((num_experts,), jnp.int32).at[expert].add(beyond)
  rank = jnp.maximum(plan.slot_index.ravel() - base, 0)
  return Rest(jnp.where(beyond, expert, num_experts), rank, counts)


def run(
  tokens: Float[Array, 'G S D'],
  plan: Plan,
  weights: Weights,
  through: Callable[[Array, Weights, Plan], Array],
  experts: Experts,
  axis_name: str,
  num_selected: int | float,
) -> Float[Array, 'G S D']:
  """Returns the result of dispatch, experts and combine of the other dispatchers for the plan.

  Args:
    tokens: of this device.
    plan: of each group; `source_index` is not read.
    weights: of this device's experts, E / R first in each.
    through: (buffer [E G C D], weights, its plan) -> [E G C D], exchanges included.
    experts: (rows [E C D], weights) -> [E C D], on this device.
    axis_name: of the mesh, over which experts are split.
    num_selected: assignments of a token, on average.
  """
  groups, size, width = tokens.shape
  num_experts = plan.source_index.shape[1]
  num_devices = jax.lax.axis_size(axis_name)
  sizes = sizes_of(groups * size, num_experts, num_selected, num_devices)
  with jax.named_scope('plan'):
    # One group of all, so that an expert's rows are contiguous: base slots first, the rest after
    # them.
    base_plan, beyond = merged.merge(plan, sizes.base)
  rows = tokens.reshape(groups * size, width)
  y = None
  # With as many slots as tokens nothing can lie beyond the base, and the loops aren't compiled.
  if sizes.base < groups * size:
    weights = varying_like(weights, rows)
    with jax.named_scope('plan'):
      # Zero for what the base computes: blocks then add nothing for it.
      scales = jnp.where(beyond, plan.combine_weights.reshape(beyond.shape), 0).ravel()
      rest = find_rest(base_plan, beyond, sizes.base)
    axis = axis_name if num_devices > 1 else None
    with jax.named_scope('experts'):
      y, rows, weights = add_rest(experts, sizes, axis, rows, scales, weights, rest)
  with jax.named_scope('dispatch'):
    buffer = gather.dispatch(rows[None], base_plan)
  outputs = through(buffer, weights, base_plan)
  with jax.named_scope('combine'):
    most = gather.combine(outputs, base_plan)[0]
    if y is not None:
      most = (most + y).astype(tokens.dtype)
  return most.reshape(tokens.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def add_rest(
  experts: Experts,
  sizes: Sizes,
  axis_name: str | None,
  tokens: Float[Array, 'N D'],
  scales: Float[Array, 'N_K'],
  weights: Weights,
  rest: Rest,
) -> tuple[Float[Array, 'N D'], Float[Array, 'N D'], Weights]:
  """Computes what is beyond the base.

  Args:
    experts: (rows [E C D], weights) -> [E C D].
    sizes: static sizes.
    axis_name: of the mesh, over which experts are split; None where they are not.
    tokens: of this device.
    scales: weight of each assignment.
    weights: of this device's experts, E / R first in each.
    rest: which assignments.

  Returns:
    y in float32, and tokens and weights unchanged: the base must take these, see above.
  """
  return _forward(experts, sizes, axis_name, tokens, scales, weights, rest), tokens, weights


def _add_rest_fwd(experts, sizes, axis_name, tokens, scales, weights, rest):
  primals = (tokens, scales, weights, rest)
  return add_rest(experts, sizes, axis_name, *primals), primals


def _add_rest_bwd(experts, sizes, axis_name, residuals, grads):
  tokens, scales, weights, rest = residuals
  d_y, d_tokens, d_weights = grads
  # The base's gradients came in; the blocks add to them in place.
  start = Gradients(d_tokens.astype(jnp.float32), jnp.zeros_like(scales), d_weights)
  if axis_name is None:
    blocks = blocks_lib.make_blocks(rest.expert, rest.rank, rest.counts, sizes.block)
    done = blocks_lib.backward(start, d_y, tokens, scales, weights, blocks, experts)
  else:
    rounds = _Rounds(experts, sizes, axis_name, weights, rest)
    done = rounds.backward(start, d_y, tokens, scales)
  return done.tokens.astype(tokens.dtype), done.scales, done.weights, None


add_rest.defvjp(_add_rest_fwd, _add_rest_bwd)


def _forward(experts, sizes, axis_name, tokens, scales, weights, rest):
  y = varying_like(jnp.zeros(tokens.shape, jnp.float32), tokens)
  if axis_name is None:
    blocks = blocks_lib.make_blocks(rest.expert, rest.rank, rest.counts, sizes.block)
    return blocks_lib.forward(y, tokens, scales, weights, blocks, experts)
  return _Rounds(experts, sizes, axis_name, weights, rest).forward(y, tokens, scales)


class _Rounds:
  """Exchanges of a fixed number of rows between all devices, until none has any left."""

  def __init__(self, experts: Experts, sizes: Sizes, axis_name: str, weights: Weights, rest: Rest):
    self._experts, self._weights, self._axis_name = experts, weights, axis_name
    self._num_rows, self._block = sizes.round, sizes.block
    num_devices = jax.lax.axis_size(axis_name)
    self._each = rest.counts.size // num_devices  # experts of a device
    self._expert = rest.expert
    # The assignments in order of their experts, so in order of their devices.
    first = jnp.cumsum(rest.counts) - rest.counts
    numbers = jnp.arange(rest.expert.size, dtype=jnp.int32)
    position = jnp.append(first, numbers.size)[rest.expert] + rest.rank
    self._order = jnp.full_like(numbers, numbers.size).at[position].set(numbers, mode='drop')
    # Rows for each device, and where they start in that order.
    self._counts = rest.counts.reshape(num_devices, -1).sum(axis=1)
    self._first = jnp.cumsum(self._counts) - self._counts
    most = jnp.max(-(-self._counts // self._num_rows))
    # The same number everywhere: an exchange needs all devices.
    self._num_rounds = jax.lax.pmax(most, BATCH_AXES)

  def forward(self, y, tokens, scales):
    fan_out = scales.size // tokens.shape[0]

    def run(index, y):
      # To the experts: X rows for each device. They are computed in blocks of one expert and sent
      # back, where each row is scaled and added to its token.
      items = self._items(index)
      inputs = self._swap(blocks_lib.rows(tokens, items // fan_out))
      blocks = self._received_blocks(items)
      start = varying_like(jnp.zeros(inputs.shape, jnp.float32), inputs)
      ones = varying_like(jnp.ones(inputs.shape[0], jnp.float32), inputs)
      outputs = blocks_lib.forward(start, inputs, ones, self._weights, blocks, self._experts)
      # The exchange is its own inverse, so rows come back in the order they left in.
      returned = self._swap(outputs.astype(tokens.dtype)).astype(jnp.float32)
      scaled = returned * blocks_lib.rows(scales[:, None], items)
      return y.at[items // fan_out].add(scaled, mode='drop')

    return jax.lax.fori_loop(0, self._num_rounds, run, y)

  def backward(self, start, d_y, tokens, scales):
    fan_out = scales.size // tokens.shape[0]

    def run(index, gradients):
      items = self._items(index)
      # Rows, their gradients and their scales go to the experts; the gradients of rows and scales
      # come back. Those of weights stay where the experts are.
      token = items // fan_out
      inputs = self._swap(blocks_lib.rows(tokens, token))
      d_outputs = self._swap(blocks_lib.rows(d_y, token))
      scale = self._swap(blocks_lib.rows(scales[:, None], items))[:, 0]
      blocks = self._received_blocks(items)
      nothing = varying_like(jnp.zeros(inputs.shape, jnp.float32), inputs)
      there = blocks_lib.backward(
        Gradients(nothing, jnp.zeros_like(scale), gradients.weights),
        d_outputs,
        inputs,
        scale,
        self._weights,
        blocks,
        self._experts,
      )
      d_tokens, d_scales = self._swap(there.tokens), self._swap(there.scales[:, None])[:, 0]
      return Gradients(
        gradients.tokens.at[token].add(d_tokens, mode='drop'),
        gradients.scales.at[items].set(d_scales, mode='drop'),
        there.weights,
      )

    return jax.lax.fori_loop(0, self._num_rounds, run, start)

  def _items(self, index: Int[Array, '']) -> Int[Array, 'R_X']:
    """Returns the assignments that go to each device in a round; N K where none is left."""
    position = index * self._num_rows + jnp.arange(self._num_rows)[None, :]
    order = jnp.where(
      position < self._counts[:, None],
      self._order[self._first[:, None] + position],
      self._order.size,
    )
    return order.ravel()

  def _swap(self, rows: Shaped[Array, 'R_X D']) -> Shaped[Array, 'R_X D']:
    return exchange.swap(rows, self._axis_name)

  def _received_blocks(self, items: Int[Array, 'R_X']) -> blocks_lib.Blocks:
    """Returns the blocks of the rows that came, by this device's experts."""
    none = self._expert.size
    # Experts as their own device numbers them; -1 for an empty row, which no expert takes.
    expert = jnp.where(items < none, self._expert[jnp.minimum(items, none - 1)] % self._each, -1)
    expert = self._swap(expert[:, None])[:, 0]
    expert = jnp.where(expert < 0, self._each, expert)
    return blocks_lib.sort_into_blocks(expert, self._each, self._block)
