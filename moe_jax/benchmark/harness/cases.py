"""The layers that are measured, their weights, and the dense layer that they are compared with."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax import routing
from moe_jax.benchmark.harness.names import DROPLESS
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.experts import activate, batched, hidden_dim, run_experts
from moe_jax.layers.moe_options import MoeOptions, MoeParams

ROUTER_INIT_SCALE = 0.1


def options_of(
  shape: Shape, num_experts: int, dispatch: str, exchange: str = 'padded'
) -> MoeOptions:
  """Returns the options of the layer that is measured; no capacity if it drops nothing."""
  return MoeOptions(
    router='top_k',
    choice=routing.ROUTERS['top_k'].options(
      num_experts=num_experts, num_selected_experts=shape.num_selected_experts
    ),
    mlp_dim=shape.mlp_dim,
    activation=shape.activation,
    capacity_factor=None if dispatch in DROPLESS else shape.capacity_factor,
    jitter=0.0,
    priority='token',
    balance_scopes=1,
    balance_normalization='one',
    device_balance_parts=1,
    dispatch=dispatch,
    router_init_scale=ROUTER_INIT_SCALE,
    exchange=exchange,
  )


def load_statistics(load: Any, kept: int, slots: int | None) -> dict[str, float | None]:
  """Returns the statistics of the load that every row holds.

  Args:
    load: assignments to each expert, before any drop.
    kept: assignments that got a slot.
    slots: of all experts; None where experts have as many as they need.

  Returns:
    tokens_per_expert, on average; max_load, of the fullest expert over the average; drop_share;
    padding, the share of slots that are empty, None without a number of slots.
  """
  load = np.asarray(load, np.float64).ravel()
  return {
    'tokens_per_expert': float(load.mean()),
    'max_load': float(load.max() / load.mean()),
    'drop_share': float(1 - kept / load.sum()),
    'padding': None if slots is None else float(1 - kept / slots),
  }


def excess(eta_bmm: float, first_eta_bmm: float) -> float:
  """Returns how much more the time of an arm grows with E than that of its batched matmuls.

  (t(E) / t(first E)) / (the same of the matmuls), from matmuls / arm at both: each was measured
  within one run.
  """
  return first_eta_bmm / eta_bmm


def timed(layer: Callable, backward: bool) -> Callable:
  """Returns the layer, or the gradients of a scalar of it for weights and input."""
  if not backward:
    return layer
  return jax.grad(
    lambda weights, x, *more: jnp.sum(jnp.square(layer(weights, x, *more).astype(jnp.float32))),
    argnums=(0, 1),
  )


def expert_weights(key: jax.Array, shape: Shape, num_experts: int) -> MoeParams:
  """Returns random weights of E experts in the dtype of the matmuls, without a router."""
  width, mlp_dim = shape.embed_dim, shape.mlp_dim
  columns = hidden_dim(mlp_dim, shape.activation)
  w_in, w_out = _matrices(
    key, (num_experts, width, columns), (num_experts, mlp_dim, width), shape.dtype
  )
  return MoeParams(router={}, w_in=w_in, w_out=w_out)


def dense_weights(key: jax.Array, shape: Shape) -> tuple[Float[Array, 'D F1'], Float[Array, 'F D']]:
  """Returns random weights of the dense layer of the same active FLOPs: K * F hidden units."""
  width, mlp_dim = shape.embed_dim, shape.num_selected_experts * shape.mlp_dim
  columns = hidden_dim(mlp_dim, shape.activation)
  return _matrices(key, (width, columns), (mlp_dim, width), shape.dtype)


def _matrices(
  key: jax.Array, first: tuple[int, ...], second: tuple[int, ...], dtype: str
) -> tuple[Array, Array]:
  keys = jax.random.split(key)
  return _matrix(keys[0], first, dtype), _matrix(keys[1], second, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _matrix(key: jax.Array, shape: tuple[int, ...], dtype: str) -> Array:
  """Draws expert by expert: random bits of all would be as large as the weights."""
  one = lambda key: jax.random.normal(key, shape[-2:], jnp.dtype(dtype)) * shape[-2] ** -0.5  # noqa: E731
  return one(key) if len(shape) == 2 else jax.lax.map(one, jax.random.split(key, shape[0]))


def dense_of(weights: Any, x: Float[Array, '*any D'], activation: str) -> Float[Array, '*any D']:
  """Returns the output of the dense layer."""
  return activate(x @ weights[0].astype(x.dtype), activation) @ weights[1].astype(x.dtype)


def matmuls_of(
  params: MoeParams, buffers: Float[Array, 'E C D'], activation: str
) -> Float[Array, 'E C D']:
  """Returns the experts' outputs for their rows: the layer's own matmuls, without dispatch."""
  return run_experts(buffers, (params.w_in, params.w_out), activation)


def batched_of(
  params: MoeParams, buffers: Float[Array, 'E C D'], activation: str
) -> Float[Array, 'E C D']:
  """Returns the same by one batched matmul for each matrix, as the compiler has it.

  On CPUs the layer's own matmuls go one expert at a time where that is faster.
  """
  w_in, w_out = (w.astype(buffers.dtype) for w in (params.w_in, params.w_out))
  return batched.forward(activation, buffers, w_in, w_out)[0]
