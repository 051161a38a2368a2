"""The MoE layer against a dense layer of the same active FLOPs and against its own products."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import routing
from moe_jax.benchmark.arms import Shape, dense_of, dense_weights, expert_weights, timed
from moe_jax.benchmark.timing import compile_arm, is_void, measure, profiled, ratio
from moe_jax.layers.moe import MoeOptions, TokenInfo, group_capacity, moe_layer, run_experts
from moe_jax.parallel.mesh import make_mesh

ROUTER_INIT_SCALE = 0.1


def rows(
  shape: Shape,
  *,
  num_experts: Sequence[int],
  dispatch: str,
  rounds: int,
  seed: int,
  profile: str = '',
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts, forward and forward + backward, on one device.

  All tokens are one routing group. Every E has the same tokens and, with K and F fixed, the same
  active FLOPs, so the dense layer (K * F hidden units) is the same for all. The router is random.

  Args:
    shape: of all rows.
    num_experts: values of E.
    dispatch: the dispatcher.
    rounds: of interleaved calls.
    seed: of weights, inputs and orders.
    profile: directory for a trace of each row's layer; empty for none.

  Yields:
    num_experts, pass, eta_dense (time of dense / time of MoE), eta_bmm (time of the layer's own
    batched products, on its own padded buffers / time of MoE), null (dense / copy of dense), void,
    drop_share, tokens_per_expert, max_load (of the fullest expert over the mean), padding (share of
    the slots that are empty), compile_seconds, temporary_bytes, and with `profile` the table of
    the layer's time by part.
  """
  mesh = make_mesh(1, 1, jax.devices()[:1])
  key = jax.random.key(seed)
  x = jax.random.normal(key, (1, shape.num_tokens, shape.embed_dim), jnp.dtype(shape.dtype))
  for experts in num_experts:
    options = options_of(shape, experts, dispatch)
    for backward in (False, True):
      yield _row(shape, options, mesh, x, backward, rounds, seed, profile)


def options_of(shape: Shape, num_experts: int, dispatch: str) -> MoeOptions:
  """Returns the options of the layer that is measured."""
  return MoeOptions(
    router='top_k',
    choice=routing.RouterOptions(
      num_experts=num_experts, num_selected_experts=shape.num_selected_experts
    ),
    mlp_dim=shape.mlp_dim,
    activation=shape.activation,
    capacity_factor=shape.capacity_factor,
    jitter=0.0,
    priority='token',
    balance_scopes=1,
    balance_normalization='one',
    device_balance_parts=1,
    dispatch=dispatch,
    router_init_scale=ROUTER_INIT_SCALE,
  )


def _row(
  shape: Shape,
  options: MoeOptions,
  mesh: Mesh,
  x: jax.Array,
  backward: bool,
  rounds: int,
  seed: int,
  profile: str,
) -> dict[str, Any]:
  num_tokens, embed_dim = x.shape[1:]
  keys = jax.random.split(jax.random.key(seed + 1), 5)
  router = jax.random.normal(keys[4], (embed_dim, options.num_experts))
  params = expert_weights(keys[0], shape, options.num_experts)._replace(
    router={'router': router * (ROUTER_INIT_SCALE / embed_dim) ** 0.5}
  )
  dense = dense_weights(keys[1], shape)
  places = jnp.zeros(x.shape[:2], jnp.int32)
  info = TokenInfo(jnp.ones(x.shape[:2], bool), places, places)
  group_keys = jax.random.split(keys[2], 1)
  slots = (options.num_experts, 1, group_capacity(options, num_tokens), embed_dim)
  buffers = jax.random.normal(keys[3], slots, x.dtype)

  def moe(params, x):
    return moe_layer(x, info, params, {}, group_keys, mesh, options, True)

  def dense_layer(weights, x):
    return dense_of(weights, x, options.activation)

  def products(params, buffers):
    return run_experts(buffers, params, options.activation)

  with jax.set_mesh(mesh):
    sums = jax.jit(moe)(params, x)[1]
    arms = {
      'dense': compile_arm(timed(dense_layer, backward), dense, x),
      'dense copy': compile_arm(timed(dense_layer, backward), dense, x),
      'products': compile_arm(timed(products, backward), params, buffers),
      'moe': compile_arm(timed(lambda p, x: moe(p, x)[0], backward), params, x),
    }
    calls = {name: arm.call for name, arm in arms.items()}
    seconds = measure(calls, rounds, seed)
    name = f'E{options.num_experts}-{"forward+backward" if backward else "forward"}'
    table = profiled(arms['moe'], profile, name)
  null = ratio(seconds['dense'], seconds['dense copy'])
  kept = float(np.sum(sums.kept_per_expert))
  load = np.asarray(sums.tokens_per_expert, np.float64).ravel()
  return {
    'num_experts': options.num_experts,
    'pass': 'forward+backward' if backward else 'forward',
    'eta_dense': ratio(seconds['dense'], seconds['moe'])._asdict(),
    'eta_bmm': ratio(seconds['products'], seconds['moe'])._asdict(),
    'null': null._asdict(),
    'void': is_void(null),
    'drop_share': 1 - kept / load.sum(),
    'tokens_per_expert': num_tokens * options.num_selected_experts / options.num_experts,
    'max_load': float(load.max() / load.mean()),
    'padding': 1 - kept / (buffers.size / embed_dim),
    'compile_seconds': arms['moe'].compile_seconds,
    'temporary_bytes': arms['moe'].temporary_bytes,
  } | table
