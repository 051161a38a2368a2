"""What layers are measured on, and the dense layer that they are measured against."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.layers.basic import activate, hidden_dim
from moe_jax.layers.moe import MoeParams


class Shape(NamedTuple):
  """What is measured: S tokens of one group, D, F of one expert, K, and the factor of capacity."""

  num_tokens: int
  embed_dim: int
  mlp_dim: int
  num_selected_experts: int
  capacity_factor: float
  activation: str
  dtype: str


def timed(layer: Callable, backward: bool) -> Callable:
  """Returns what is timed: the layer, or the gradients of a scalar of it for weights and input."""
  if not backward:
    return layer
  return jax.grad(
    lambda weights, x, *more: jnp.sum(jnp.square(layer(weights, x, *more).astype(jnp.float32))),
    argnums=(0, 1),
  )


def expert_weights(key: jax.Array, shape: Shape, num_experts: int) -> MoeParams:
  """Returns random weights of E experts, without a router."""
  keys = jax.random.split(key)
  width, mlp_dim = shape.embed_dim, shape.mlp_dim
  columns = hidden_dim(mlp_dim, shape.activation)
  return MoeParams(
    router={},
    w_in=jax.random.normal(keys[0], (num_experts, width, columns)) * width**-0.5,
    w_out=jax.random.normal(keys[1], (num_experts, mlp_dim, width)) * mlp_dim**-0.5,
  )


def dense_weights(key: jax.Array, shape: Shape) -> tuple[Float[Array, 'D F1'], Float[Array, 'F D']]:
  """Returns random weights of the dense layer of the same active FLOPs: K * F hidden units."""
  keys = jax.random.split(key)
  width, mlp_dim = shape.embed_dim, shape.num_selected_experts * shape.mlp_dim
  columns = hidden_dim(mlp_dim, shape.activation)
  return (
    jax.random.normal(keys[0], (width, columns)) * width**-0.5,
    jax.random.normal(keys[1], (mlp_dim, width)) * mlp_dim**-0.5,
  )


def dense_of(weights: Any, x: Float[Array, '*any D'], activation: str) -> Float[Array, '*any D']:
  """Returns the output of the dense layer."""
  return activate(x @ weights[0].astype(x.dtype), activation) @ weights[1].astype(x.dtype)
