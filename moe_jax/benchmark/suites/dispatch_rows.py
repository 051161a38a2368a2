"""Dispatch and combine under a routing given beforehand: nothing is selected here.

All arms get the same tokens, weights and plan; they differ in how tokens reach the experts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax import dispatch as dispatch_lib
from moe_jax import routing
from moe_jax.benchmark.harness import peers as peers_lib
from moe_jax.benchmark.harness.cases import (
  dense_of,
  dense_weights,
  excess,
  expert_weights,
  load_statistics,
  matmuls_of,
  timed,
)
from moe_jax.benchmark.harness.names import DROPLESS, TOKAMAX
from moe_jax.benchmark.harness.routings import Trace, choose
from moe_jax.benchmark.harness.shape import Shape, with_tokens_per_expert
from moe_jax.benchmark.harness.timing import (
  Compiled,
  Memory,
  compile_arm,
  is_invalid,
  is_out_of_memory,
  measure,
  milliseconds,
  ratio,
)
from moe_jax.experts import activate, run_experts
from moe_jax.layers.moe_options import MoeParams
from moe_jax.parallel.mesh import EXPERT_AXIS, make_mesh
from moe_jax.parallel.sharding import spec
from moe_jax.routing.plan import Plan

# An arm is not measured if each of two calls takes more than this many times as long as the dense
# layer, and more than this many seconds.
SLOWEST = 20.0
LEAST_SECONDS = 0.5


class Case(NamedTuple):
  """One routing of one E, and the inputs of all arms.

  Attributes:
    shape: S, D, F, K, the capacity factor.
    routing: its name.
    plan: of the routing.
    params: of the experts.
    dense: of the dense layer of the same active FLOPs.
    tokens: one group.
    buffers: of the capacity of the plan.
    balanced: the rows of balanced experts, ceil(S K / E) each.
  """

  shape: Shape
  routing: str
  plan: Plan
  params: MoeParams
  dense: tuple[Array, Array]
  tokens: Float[Array, '1 S D']
  buffers: Float[Array, 'E C D']
  balanced: Float[Array, 'E B D']


def rows(
  shape: Shape,
  *,
  num_experts: Sequence[int],
  routings: Sequence[str],
  arms: Sequence[str],
  tokens_per_expert: int,
  rounds: int,
  seed: int,
  trace: Trace | None = None,
  peers: bool = False,
  reuse_memory: bool = False,
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts under each routing, forward and forward + backward.

  Args:
    shape: of all rows.
    num_experts: values of E.
    routings: of `names.ROUTINGS`.
    arms: of `names.ARMS`, or `TOKAMAX`.
    tokens_per_expert: if not 0, S is set so that each expert gets this many tokens on average; else
      `shape.num_tokens` for every E.
    rounds: of interleaved calls.
    seed: of tokens, weights, routings and orders.
    trace: for the routing `trace`.
    peers: time other libraries, too.
    reuse_memory: write results over those of the call before.

  Yields:
    num_experts, num_tokens, routing, pass, the load (`cases.load_statistics`), null, void,
    dense_milliseconds,
    `arms`: {name: eta_dense (time of the dense layer of the same active FLOPs / time of the arm),
    eta_bmm (time of its batched matmuls without dispatch / time of the arm: `products` are those
    of the padded buffers, `balanced` those of ceil(S K / E) rows per expert, with which arms that
    drop nothing are compared), eta_balanced (`balanced` / arm for every arm), excess and
    excess_balanced (of these two, over the first E of the same routing and pass; see
    `cases.excess`), milliseconds, compile_seconds, temporary_bytes}, `not_measured`: {name: why},
    and `peers`, None without them (or without memory for them) or `peers.summary`.
  """
  first: dict[tuple[str, ...], float] = {}
  # An arm that is too slow or too large is so again with more experts.
  left_out: dict[bool, dict[str, str]] = {False: {}, True: {}}
  for experts in num_experts:
    sized = with_tokens_per_expert(shape, tokens_per_expert, experts)
    for name in routings:
      case = _case(sized, experts, name, seed, trace)
      for backward in (False, True):
        out = left_out[backward]
        memory = Memory() if reuse_memory else None
        names = [arm for arm in arms if arm not in out]
        with_peers = peers and peers_lib.GROUPED not in out
        row = _row(case, names, backward, rounds, seed, with_peers, memory)
        for arm, measured in row['arms'].items():
          for of, eta_of in (('excess', 'eta_bmm'), ('excess_balanced', 'eta_balanced')):
            eta = measured[eta_of]['median']
            measured[of] = excess(eta, first.setdefault((name, row['pass'], arm, of), eta))
        out |= {arm: f'{why} at E={experts}' for arm, why in row['not_measured'].items()}
        row['not_measured'] = dict(out)
        yield row


def _case(
  shape: Shape, num_experts: int, routing_name: str, seed: int, trace: Trace | None
) -> Case:
  plan = make_plan(shape, num_experts, choose(routing_name, shape, num_experts, seed, trace))
  keys = jax.random.split(jax.random.key(seed), 5)

  def normal(key, *dims):
    return jax.random.normal(key, (*dims, shape.embed_dim), jnp.dtype(shape.dtype))

  balanced = -(-shape.num_tokens * shape.num_selected_experts // num_experts)
  return Case(
    shape=shape,
    routing=routing_name,
    plan=plan,
    params=expert_weights(keys[1], shape, num_experts),
    dense=dense_weights(keys[2], shape),
    tokens=normal(keys[0], 1, shape.num_tokens),
    buffers=normal(keys[3], num_experts, plan.source_index.shape[-1]),
    balanced=normal(keys[4], num_experts, balanced),
  )


def make_plan(shape: Shape, num_experts: int, expert_index: Int[np.ndarray, 'S K']) -> Plan:
  """Returns the plan of one group that sends its tokens to these experts with equal gates."""
  tokens, selected = expert_index.shape
  capacity = min(
    tokens, routing.expert_capacity(tokens, num_experts, selected, shape.capacity_factor)
  )
  nothing = jnp.zeros((1, tokens, num_experts))
  choice = routing.Choice(
    jnp.asarray(expert_index)[None],
    jnp.full((1, tokens, selected), 1 / selected),
    jnp.ones((1, tokens, selected), bool),
    nothing,
    nothing,
    {},
  )
  keys = jax.random.split(jax.random.key(0), 1)
  return routing.make_plan(choice, jnp.ones((1, tokens), bool), keys, capacity=capacity)


def layer_of(arm: str, activation: str) -> Callable[[MoeParams, Array, Plan], Array]:
  """Returns (weights, tokens [1 S D], plan) -> outputs [1 S D] of an arm."""
  if arm == 'copy':
    return _copy
  if arm in ('ragged_dot', TOKAMAX):
    matmul = jax.lax.ragged_dot if arm == 'ragged_dot' else peers_lib.tokamax_ragged_dot()
    return functools.partial(_ragged, activation, matmul)
  experts = functools.partial(run_experts, activation=activation)
  everywhere = spec('batch')

  def local(weights, tokens, plan):
    selected = plan.expert_index.shape[-1]
    if arm in DROPLESS:
      plan = plan._replace(keep=plan.requested, combine_weights=plan.requested / selected)
    return dispatch_lib.run_plan(
      arm,
      tokens,
      plan,
      weights=weights,
      experts=experts,
      axis_name=EXPERT_AXIS,
      num_selected=selected,
    )

  def layer(params, tokens, plan):
    run = jax.shard_map(
      local, mesh=make_mesh(1, 1, jax.devices()[:1]), in_specs=everywhere, out_specs=everywhere
    )
    return run((params.w_in, params.w_out), tokens, plan)

  return layer


def _copy(params: MoeParams, tokens: Float[Array, '1 S D'], plan: Plan) -> Float[Array, '1 S D']:
  """Fills the buffers in order and adds them up again: the same bytes, no index."""
  del params
  _, num_experts, capacity = plan.source_index.shape
  group_size, width = tokens.shape[1:]
  slots = num_experts * capacity
  buffers = jnp.resize(tokens[0], (slots, width))
  # Or XLA would add the tokens without the buffers.
  buffers = jax.lax.optimization_barrier(buffers)
  times = -(-slots // group_size)
  padded = jnp.pad(buffers, ((0, times * group_size - slots), (0, 0)))
  return jnp.sum(padded.reshape(times, group_size, width), axis=0)[None]


def _ragged(
  activation: str,
  ragged_dot: Callable[..., Array],
  params: MoeParams,
  tokens: Float[Array, '1 S D'],
  plan: Plan,
) -> Float[Array, '1 S D']:
  """Sorted by expert, `lax.ragged_dot` or one like it, and back; drops nothing."""
  group_size, selected = plan.expert_index.shape[1:]
  experts = plan.expert_index.ravel()
  order = jnp.argsort(experts, stable=True)
  sizes = jnp.bincount(experts, length=params.w_in.shape[0]).astype(jnp.int32)
  sorted_rows = tokens[0][order // selected]
  hidden = ragged_dot(sorted_rows, params.w_in.astype(tokens.dtype), sizes)
  outputs = ragged_dot(activate(hidden, activation), params.w_out.astype(tokens.dtype), sizes)
  back = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
  return jnp.sum(back.reshape(group_size, selected, -1), axis=1)[None] / selected


def _row(
  case: Case,
  names: Sequence[str],
  backward: bool,
  rounds: int,
  seed: int,
  with_peers: bool,
  memory: Memory | None,
) -> dict[str, Any]:
  plan, num_experts = case.plan, case.params.w_in.shape[0]
  compiled, not_measured = _compile(case, names, backward, memory)
  calls = {name: arm.call for name, arm in compiled.items()}
  peer_arms = {}
  if with_peers:
    try:
      peer_arms = peers_lib.arms(
        case.shape, case.params, case.dense, case.tokens[0], plan.expert_index[0], backward
      )
    except RuntimeError as error:
      if not is_out_of_memory(error):
        raise
      not_measured[peers_lib.GROUPED] = 'out of memory'
  seconds = measure(calls | peer_arms, rounds, seed)
  null = ratio(seconds['dense'], seconds['dense copy'])
  load = np.bincount(np.asarray(plan.expert_index).ravel(), minlength=num_experts)
  row = {
    'num_experts': num_experts,
    'num_tokens': case.shape.num_tokens,
    'routing': case.routing,
    'pass': 'forward+backward' if backward else 'forward',
    **load_statistics(load, int(np.sum(plan.keep)), plan.source_index.size),
    'null': null._asdict(),
    'void': is_invalid(null),
    'dense_milliseconds': milliseconds(seconds['dense']),
    'arms': {
      name: {
        'eta_dense': ratio(seconds['dense'], seconds[name])._asdict(),
        'eta_bmm': ratio(seconds[_matmuls_of(name)], seconds[name])._asdict(),
        'eta_balanced': ratio(seconds['balanced'], seconds[name])._asdict(),
        'milliseconds': milliseconds(seconds[name]),
        'compile_seconds': arm.compile_seconds,
        'temporary_bytes': arm.temporary_bytes,
      }
      for name, arm in compiled.items()
      if name not in ('dense', 'dense copy')
    },
    'not_measured': not_measured,
    'peers': None,
  }
  if peer_arms:
    row['peers'] = peers_lib.summary(seconds, [name for name in names if name in compiled])
  return row


def _compile(
  case: Case, names: Sequence[str], backward: bool, memory: Memory | None
) -> tuple[dict[str, Compiled], dict[str, str]]:
  """Returns the compiled arms, the references first, and why others are not measured."""
  activation = case.shape.activation
  compile_ = functools.partial(compile_arm, memory=memory)
  dense_layer = timed(lambda weights, x: dense_of(weights, x, activation), backward)
  matmuls = timed(lambda params, x: matmuls_of(params, x, activation), backward)
  compiled = {
    'dense': compile_(dense_layer, case.dense, case.tokens),
    'dense copy': compile_(dense_layer, case.dense, case.tokens),
    'products': compile_(matmuls, case.params, case.buffers),
    'balanced': compile_(matmuls, case.params, case.balanced),
  }
  dense_seconds = float(np.median(measure({'': compiled['dense'].call}, 3)['']))
  not_measured = {}
  for name in names:
    layer = timed(layer_of(name, activation), backward)
    try:
      arm = compile_(layer, case.params, case.tokens, case.plan)
    except jax.errors.JaxRuntimeError as error:
      if not is_out_of_memory(error):
        raise
      not_measured[name] = 'out of memory'
      continue
    seconds, most = arm.first_seconds, max(LEAST_SECONDS, SLOWEST * dense_seconds)
    if seconds > most:
      # On a busy machine one call can take any time.
      seconds = min(seconds, measure({'': arm.call}, 1)[''][0])
    if seconds > most:
      not_measured[name] = f'{seconds / dense_seconds:.0f} times the dense layer'
    else:
      compiled[name] = arm
  return compiled, not_measured


def _matmuls_of(arm: str) -> str:
  """Returns the name of the matmuls that an arm is compared with."""
  return 'balanced' if arm in (*DROPLESS, 'balanced') else 'products'
