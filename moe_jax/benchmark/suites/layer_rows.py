"""The MoE layer with its router, against dense of the same active FLOPs and its own matmuls."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.benchmark.harness.cases import (
  ROUTER_INIT_SCALE,
  batched_of,
  dense_of,
  dense_weights,
  excess,
  expert_weights,
  load_statistics,
  matmuls_of,
  options_of,
  timed,
)
from moe_jax.benchmark.harness.shape import Shape, with_tokens_per_expert
from moe_jax.benchmark.harness.timing import (
  Memory,
  compile_arm,
  is_invalid,
  measure,
  milliseconds,
  profiled,
  ratio,
)
from moe_jax.errors import UserError
from moe_jax.layers.moe_layer import moe_layer, sizes_of
from moe_jax.layers.moe_options import MoeOptions, MoeParams, TokenInfo
from moe_jax.parallel.mesh import make_mesh


def rows(
  shape: Shape,
  *,
  num_experts: Sequence[int],
  dispatch: str,
  tokens_per_expert: int,
  rounds: int,
  seed: int,
  profile: str = '',
  num_groups: int = 1,
  reuse_memory: bool = False,
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts, forward and forward + backward, on one device.

  With K and F fixed, active FLOPs per token are those of the dense layer (K * F hidden units) at
  every E. The router is random.

  Args:
    shape: of all rows.
    num_experts: values of E.
    dispatch: the dispatcher. One that drops nothing has no capacity factor, and its matmuls are
      those of ceil(S K / E) rows per expert.
    tokens_per_expert: if not 0, S is set so that each expert gets this many tokens on average; else
      `shape.num_tokens` for every E.
    rounds: of interleaved calls.
    seed: of weights, inputs and orders.
    profile: directory for a trace of each row's layer; empty for none.
    num_groups: routing groups that the tokens are in.
    reuse_memory: write results over those of the call before.

  Yields:
    num_experts, num_tokens, num_groups, dispatch, pass, eta_dense (time of dense / time of MoE),
    eta_bmm (time of the layer's own matmuls without dispatch / time of MoE), eta_batched (the same
    for one batched matmul of each matrix, see `cases.batched_of`), excess and excess_batched (over
    the first E; see `cases.excess`), milliseconds and dense_milliseconds, null (dense / copy of
    dense), void, the load (`cases.load_statistics`), compile_seconds, temporary_bytes, and with
    `profile` the table of the layer's time by part.

  Raises:
    UserError: if tokens cannot be split into `num_groups`.
  """
  mesh = make_mesh(1, 1, jax.devices()[:1])
  key = jax.random.key(seed)
  first: dict[tuple[bool, str], float] = {}
  for experts in num_experts:
    tokens = with_tokens_per_expert(shape, tokens_per_expert, experts).num_tokens
    if tokens % num_groups:
      raise UserError('--num_groups', num_groups, f'must divide {tokens} tokens')
  for experts in num_experts:
    sized = with_tokens_per_expert(shape, tokens_per_expert, experts)
    dims = (num_groups, sized.num_tokens // num_groups, shape.embed_dim)
    x = jax.random.normal(key, dims, jnp.dtype(shape.dtype))
    options = options_of(shape, experts, dispatch)
    for backward in (False, True):
      memory = Memory() if reuse_memory else None
      row = _row(shape, options, mesh, x, backward, rounds, seed, profile, memory)
      for name, eta_name in (('excess', 'eta_bmm'), ('excess_batched', 'eta_batched')):
        eta = row[eta_name]['median']
        row[name] = excess(eta, first.setdefault((backward, name), eta))
      yield row


def _params(expert_key, router_key, shape: Shape, num_experts: int) -> MoeParams:
  """Returns the weights of the experts, and of a router as training starts it."""
  router = jax.random.normal(router_key, (shape.embed_dim, num_experts))
  return expert_weights(expert_key, shape, num_experts)._replace(
    router={'router': router * (ROUTER_INIT_SCALE / shape.embed_dim) ** 0.5}
  )


def _slots(options: MoeOptions, num_groups: int, group_size: int) -> int:
  """Returns the slots of an expert; without capacity those of balanced experts."""
  if options.capacity_factor is not None:
    return num_groups * sizes_of(options, group_size).capacity
  return -(-num_groups * group_size * options.num_selected_experts // options.num_experts)


def _row(
  shape: Shape,
  options: MoeOptions,
  mesh: Mesh,
  x: jax.Array,
  backward: bool,
  rounds: int,
  seed: int,
  profile: str,
  memory: Memory | None,
) -> dict[str, Any]:
  num_groups, group_size, embed_dim = x.shape
  num_tokens = num_groups * group_size
  keys = jax.random.split(jax.random.key(seed + 1), 5)
  params = _params(keys[0], keys[4], shape, options.num_experts)
  dense = dense_weights(keys[1], shape)
  positions = jnp.zeros(x.shape[:2], jnp.int32)
  info = TokenInfo(jnp.ones(x.shape[:2], bool), positions, positions)
  group_keys = jax.random.split(keys[2], num_groups)
  slots = _slots(options, num_groups, group_size)
  buffers = jax.random.normal(keys[3], (options.num_experts, slots, embed_dim), x.dtype)

  def moe(params, x):
    return moe_layer(
      x, info, params, state={}, keys=group_keys, mesh=mesh, options=options, deterministic=True
    )

  def dense_layer(weights, x):
    return dense_of(weights, x, options.activation)

  def without_dispatch(matmuls):
    return lambda params, buffers: matmuls(params, buffers, options.activation)

  with jax.set_mesh(mesh):
    sums = jax.jit(moe)(params, x)[1]
    arms = {
      name: compile_arm(timed(function, backward), *arguments, memory=memory)
      for name, function, *arguments in (
        ('dense', dense_layer, dense, x),
        ('dense copy', dense_layer, dense, x),
        ('matmuls', without_dispatch(matmuls_of), params, buffers),
        ('batched', without_dispatch(batched_of), params, buffers),
        ('moe', lambda p, x: moe(p, x)[0], params, x),
      )
    }
    calls = {name: arm.call for name, arm in arms.items()}
    seconds = measure(calls, rounds, seed)
    name = f'E{options.num_experts}-{"forward+backward" if backward else "forward"}'
    table = profiled(arms['moe'], profile, name)
  null = ratio(seconds['dense'], seconds['dense copy'])
  all_slots = None if options.capacity_factor is None else options.num_experts * slots
  return {
    'num_experts': options.num_experts,
    'num_tokens': num_tokens,
    'num_groups': num_groups,
    'dispatch': options.dispatch,
    'pass': 'forward+backward' if backward else 'forward',
    'eta_dense': ratio(seconds['dense'], seconds['moe'])._asdict(),
    'eta_bmm': ratio(seconds['matmuls'], seconds['moe'])._asdict(),
    'eta_batched': ratio(seconds['batched'], seconds['moe'])._asdict(),
    'milliseconds': milliseconds(seconds['moe']),
    'dense_milliseconds': milliseconds(seconds['dense']),
    'null': null._asdict(),
    'void': is_invalid(null),
    **load_statistics(sums.tokens_per_expert, int(np.sum(sums.kept_per_expert)), all_slots),
    'compile_seconds': arms['moe'].compile_seconds,
    'temporary_bytes': arms['moe'].temporary_bytes,
  } | table
