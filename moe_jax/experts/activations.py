"""Activations of an expert's hidden layer, and of the dense layer's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = ('swiglu', 'gelu')


def activate(hidden: Float[Array, '*any F1'], activation: str) -> Float[Array, '*any F']:
  """Applies GELU, or SwiGLU to a hidden layer whose halves are gate and value.

  Source: Shazeer 2020, arXiv:2002.05202, eq. 5-6, without biases.
  """
  if activation == 'gelu':
    return jax.nn.gelu(hidden)
  gate, value = jnp.split(hidden, 2, axis=-1)
  return jax.nn.silu(gate) * value


def hidden_dim(mlp_dim: int, activation: str) -> int:
  """Returns F1, columns of the first matrix: SwiGLU needs a gate and a value per hidden unit."""
  return 2 * mlp_dim if activation == 'swiglu' else mlp_dim
