"""Moving tokens to experts and back, under a routing given beforehand: nothing is chosen here.

All arms get the same tokens, weights and plan. What differs is how tokens reach the experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax import dispatch as dispatch_room
from moe_jax import routing
from moe_jax.benchmark.arms import Shape, dense_of, dense_weights, expert_weights, timed
from moe_jax.benchmark.timing import Compiled, compile_arm, is_void, measure, ratio
from moe_jax.layers.basic import activate
from moe_jax.layers.moe import MoeParams, run_experts
from moe_jax.routing.plan import Plan

ROUTINGS = ('round_robin', 'uniform', 'zipf_0.5', 'zipf_1')
# copy: the bytes of dispatch and combine without an index, and no products.
ARMS = ('gather', 'einsum', 'ragged_dot', 'copy')
# An arm that takes so many times as long as the dense layer in its first call is not measured.
SLOWEST = 20.0


def rows(
  shape: Shape,
  *,
  num_experts: Sequence[int],
  routings: Sequence[str],
  arms: Sequence[str],
  tokens_per_expert: int,
  rounds: int,
  seed: int,
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts under each routing, forward and forward + backward.

  Args:
    shape: of all rows.
    num_experts: values of E.
    routings: of `ROUTINGS`.
    arms: of `ARMS`.
    tokens_per_expert: if not 0, tokens are as many as give each expert so many; else
      `shape.num_tokens` for every E.
    rounds: of interleaved calls.
    seed: of tokens, weights, routings and orders.

  Yields:
    num_experts, num_tokens, routing, pass, tokens_per_expert, max_load (of the fullest expert over
    the mean), drop_share, padding (share of the slots that are empty), null, void, `arms`: {name:
    eta_dense (time of the dense layer of the same active FLOPs / time of the arm), eta_bmm (time of
    the batched products on the padded buffers / time of the arm), compile_seconds,
    temporary_bytes}, and `not_measured`: {name: why}.
  """
  for experts in num_experts:
    of_experts = shape
    if tokens_per_expert:
      tokens = tokens_per_expert * experts // shape.num_selected_experts
      of_experts = shape._replace(num_tokens=tokens)
    for name in routings:
      for backward in (False, True):
        yield _row(of_experts, experts, name, arms, backward, rounds, seed)


def choose(name: str, shape: Shape, num_experts: int, seed: int) -> Int[np.ndarray, 'S K']:
  """Returns the experts of each token, all different.

  Args:
    name: `round_robin`: in turn. `uniform`: at random. `zipf_A`: at random without replacement,
      expert e in proportion to (e + 1)^-A.
    shape: S and K.
    num_experts: E.
    seed: of what is drawn.
  """
  tokens, selected = shape.num_tokens, shape.num_selected_experts
  if name == 'round_robin':
    return (np.arange(tokens * selected).reshape(tokens, selected) % num_experts).astype(np.int32)
  exponent = 0.0 if name == 'uniform' else float(name.removeprefix('zipf_'))
  # The largest of log weight + Gumbel noise are a draw without replacement.
  noise = np.random.default_rng(seed).gumbel(size=(tokens, num_experts))
  scores = noise - exponent * np.log(np.arange(1, num_experts + 1))
  return np.argsort(-scores, axis=1)[:, :selected].astype(np.int32)


def make_plan(shape: Shape, num_experts: int, expert_index: Int[np.ndarray, 'S K']) -> Plan:
  """Returns the plan of one group that asks for these experts with equal gates."""
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
  if arm == 'ragged_dot':
    return lambda params, tokens, plan: _ragged(params, tokens, plan, activation)
  dispatcher = dispatch_room.DISPATCHERS[arm]

  def layer(params, tokens, plan):
    buffers = dispatcher.dispatch(tokens, plan)
    return dispatcher.combine(run_experts(buffers, params, activation), plan)

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
  params: MoeParams, tokens: Float[Array, '1 S D'], plan: Plan, activation: str
) -> Float[Array, '1 S D']:
  """Sorted by expert, `lax.ragged_dot`, and back; drops nothing."""
  group_size, selected = plan.expert_index.shape[1:]
  experts = plan.expert_index.ravel()
  order = jnp.argsort(experts, stable=True)
  sizes = jnp.bincount(experts, length=params.w_in.shape[0]).astype(jnp.int32)
  sorted_rows = tokens[0][order // selected]
  hidden = jax.lax.ragged_dot(sorted_rows, params.w_in.astype(tokens.dtype), sizes)
  outputs = jax.lax.ragged_dot(
    activate(hidden, activation), params.w_out.astype(tokens.dtype), sizes
  )
  back = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
  return jnp.sum(back.reshape(group_size, selected, -1), axis=1)[None] / selected


def _row(
  shape: Shape,
  num_experts: int,
  routing_name: str,
  names: Sequence[str],
  backward: bool,
  rounds: int,
  seed: int,
) -> dict[str, Any]:
  plan = make_plan(shape, num_experts, choose(routing_name, shape, num_experts, seed))
  keys = jax.random.split(jax.random.key(seed), 4)
  dtype = jnp.dtype(shape.dtype)
  tokens = jax.random.normal(keys[0], (1, shape.num_tokens, shape.embed_dim), dtype)
  params = expert_weights(keys[1], shape, num_experts)
  dense = dense_weights(keys[2], shape)
  slots = (num_experts, 1, plan.source_index.shape[-1], shape.embed_dim)
  buffers = jax.random.normal(keys[3], slots, dtype)
  dense_layer = lambda weights, x: dense_of(weights, x, shape.activation)  # noqa: E731
  products = lambda p, x: run_experts(x, p, shape.activation)  # noqa: E731
  compiled = {
    'dense': compile_arm(timed(dense_layer, backward), dense, tokens),
    'dense copy': compile_arm(timed(dense_layer, backward), dense, tokens),
    'products': compile_arm(timed(products, backward), params, buffers),
  }
  not_measured = {}
  for name in names:
    arm = compile_arm(timed(layer_of(name, shape.activation), backward), params, tokens, plan)
    if (slower := seconds_of(arm) / seconds_of(compiled['dense'])) > SLOWEST:
      not_measured[name] = f'{slower:.0f} times the dense layer'
    else:
      compiled[name] = arm
  seconds = measure({name: arm.call for name, arm in compiled.items()}, rounds, seed)
  null = ratio(seconds['dense'], seconds['dense copy'])
  load = np.bincount(np.asarray(plan.expert_index).ravel(), minlength=num_experts)
  kept = int(np.sum(plan.keep))
  return {
    'num_experts': num_experts,
    'num_tokens': shape.num_tokens,
    'routing': routing_name,
    'pass': 'forward+backward' if backward else 'forward',
    'tokens_per_expert': float(load.mean()),
    'max_load': float(load.max() / load.mean()),
    'drop_share': 1 - kept / load.sum(),
    'padding': 1 - kept / plan.source_index.size,
    'null': null._asdict(),
    'void': is_void(null),
    'arms': {
      name: {
        'eta_dense': ratio(seconds['dense'], seconds[name])._asdict(),
        'eta_bmm': ratio(seconds['products'], seconds[name])._asdict(),
        'compile_seconds': arm.compile_seconds,
        'temporary_bytes': arm.temporary_bytes,
      }
      for name, arm in compiled.items()
      if name not in ('dense', 'dense copy')
    },
    'not_measured': not_measured,
  }


def seconds_of(arm: Compiled) -> float:
  """Returns the seconds of one call."""
  return measure({'': arm.call}, 1)[''][0]
