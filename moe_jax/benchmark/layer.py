"""The MoE layer against a dense layer of the same active FLOPs and against its own products."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import routing
from moe_jax.benchmark.timing import compile_arm, is_void, measure, ratio
from moe_jax.layers.basic import activate, hidden_dim
from moe_jax.layers.moe import (
  MoeOptions,
  MoeParams,
  TokenInfo,
  group_capacity,
  moe_layer,
  run_experts,
)
from moe_jax.parallel.mesh import make_mesh

ROUTER_INIT_SCALE = 0.1


def rows(
  *,
  num_experts: list[int],
  num_tokens: int,
  embed_dim: int,
  mlp_dim: int,
  num_selected_experts: int,
  capacity_factor: float,
  dispatch: str,
  activation: str,
  dtype: str,
  rounds: int,
  seed: int,
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts, forward and forward + backward, on one device.

  All tokens are one routing group. Every E has the same tokens and, with K and F fixed, the same
  active FLOPs, so the dense layer (K * F hidden units) is the same for all. The router is random.

  Yields:
    E, pass, eta_dense (time of dense / time of MoE), eta_bmm (time of the layer's own batched
    products, on its own padded buffers / time of MoE), null (dense / copy of dense), void, drop
    share, tokens per expert, compile seconds.
  """
  mesh = make_mesh(1, 1, jax.devices()[:1])
  key = jax.random.key(seed)
  x = jax.random.normal(key, (1, num_tokens, embed_dim), jnp.dtype(dtype))
  for experts in num_experts:
    options = MoeOptions(
      router='top_k',
      choice=routing.RouterOptions(num_experts=experts, num_selected_experts=num_selected_experts),
      mlp_dim=mlp_dim,
      activation=activation,
      capacity_factor=capacity_factor,
      jitter=0.0,
      priority='token',
      balance_scopes=1,
      balance_normalization='one',
      device_balance_parts=1,
      dispatch=dispatch,
      router_init_scale=ROUTER_INIT_SCALE,
    )
    for backward in (False, True):
      yield _row(options, mesh, x, backward, rounds, seed)


def _row(
  options: MoeOptions, mesh: Mesh, x: jax.Array, backward: bool, rounds: int, seed: int
) -> dict[str, Any]:
  num_tokens, embed_dim = x.shape[1:]
  keys = jax.random.split(jax.random.key(seed + 1), 5)
  params = _params(keys[0], options, embed_dim)
  dense = _dense_params(keys[1], options, embed_dim)
  places = jnp.zeros(x.shape[:2], jnp.int32)
  info = TokenInfo(jnp.ones(x.shape[:2], bool), places, places)
  group_keys = jax.random.split(keys[2], 1)
  slots = (options.num_experts, 1, group_capacity(options, num_tokens), embed_dim)
  buffers = jax.random.normal(keys[3], slots, x.dtype)

  def moe(params, x):
    return moe_layer(x, info, params, {}, group_keys, mesh, options, True)

  def dense_layer(weights, x):
    return activate(x @ weights[0].astype(x.dtype), options.activation) @ weights[1].astype(x.dtype)

  def products(params, buffers):
    return run_experts(buffers, params, options.activation)

  with jax.set_mesh(mesh):
    sums = jax.jit(moe)(params, x)[1]
    arms = {
      'dense': compile_arm(_timed(dense_layer, backward), dense, x),
      'dense copy': compile_arm(_timed(dense_layer, backward), dense, x),
      'products': compile_arm(_timed(products, backward), params, buffers),
      'moe': compile_arm(_timed(lambda p, x: moe(p, x)[0], backward), params, x),
    }
    calls = {name: arm.call for name, arm in arms.items()}
    seconds = measure(calls, rounds, seed)
  null = ratio(seconds['dense'], seconds['dense copy'])
  assigned = float(np.sum(sums.tokens_per_expert))
  return {
    'num_experts': options.num_experts,
    'pass': 'forward+backward' if backward else 'forward',
    'eta_dense': ratio(seconds['dense'], seconds['moe'])._asdict(),
    'eta_bmm': ratio(seconds['products'], seconds['moe'])._asdict(),
    'null': null._asdict(),
    'void': is_void(null),
    'drop_share': 1 - float(np.sum(sums.kept_per_expert)) / assigned,
    'tokens_per_expert': num_tokens * options.num_selected_experts / options.num_experts,
    'compile_seconds': arms['moe'].compile_seconds,
  }


def _timed(layer: Callable, backward: bool) -> Callable:
  """Returns what is timed: the layer, or the gradients of a scalar of it for weights and input."""
  if not backward:
    return layer
  return jax.grad(
    lambda weights, x: jnp.sum(jnp.square(layer(weights, x).astype(jnp.float32))), argnums=(0, 1)
  )


def _params(key: jax.Array, options: MoeOptions, embed_dim: int) -> MoeParams:
  keys = jax.random.split(key, 3)
  experts, columns = options.num_experts, hidden_dim(options.mlp_dim, options.activation)
  return MoeParams(
    router={
      'router': jax.random.normal(keys[0], (embed_dim, experts))
      * (ROUTER_INIT_SCALE / embed_dim) ** 0.5
    },
    w_in=jax.random.normal(keys[1], (experts, embed_dim, columns)) * embed_dim**-0.5,
    w_out=jax.random.normal(keys[2], (experts, options.mlp_dim, embed_dim)) * options.mlp_dim**-0.5,
  )


def _dense_params(key: jax.Array, options: MoeOptions, embed_dim: int):
  keys = jax.random.split(key, 2)
  mlp_dim = options.num_selected_experts * options.mlp_dim
  columns = hidden_dim(mlp_dim, options.activation)
  return (
    jax.random.normal(keys[0], (embed_dim, columns)) * embed_dim**-0.5,
    jax.random.normal(keys[1], (mlp_dim, embed_dim)) * mlp_dim**-0.5,
  )
