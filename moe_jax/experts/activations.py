"""Activations of an expert's hidden layer, and of the dense layer's.

F hidden units; F1 columns of the first matrix: 2 F where each unit has a gate and a value, else F.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Each by the function that it applies, to all columns or to the first half, the gates.
_PLAIN: dict[str, Callable[[Array], Array]] = {
  'gelu': jax.nn.gelu,
  'gelu_exact': functools.partial(jax.nn.gelu, approximate=False),
  'relu': jax.nn.relu,
}
_GATED: dict[str, Callable[[Array], Array]] = {
  'swiglu': jax.nn.silu,
  'geglu': jax.nn.gelu,
}
GATED = tuple(_GATED)
ACTIVATIONS = (*GATED, *_PLAIN)


def activate(hidden: Float[Array, '*any F1'], activation: str) -> Float[Array, '*any F']:
  """Applies the activation of a hidden layer; halves of a gated one are gate and value.

  `relu`: max(x, 0). `gelu`: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))). `gelu_exact`:
  x Phi(x) = x / 2 (1 + erf(x / sqrt(2))). `swiglu`: silu(gate) * value. `geglu`: gelu(gate) *
  value, with the tanh, as in the code of its source.

  Args:
    hidden: the columns of the first matmul.
    activation: one of `ACTIVATIONS`.

  Raises:
    ValueError: for another name.

  Source: Hendrycks & Gimpel 2016, arXiv:1606.08415 (GELU); Shazeer 2020, arXiv:2002.05202, eq. 5-6,
  without biases (SwiGLU, GEGLU), with Mesh TensorFlow's gelu.
  """
  if activation in _PLAIN:
    return _PLAIN[activation](hidden)
  if activation not in _GATED:
    raise ValueError(f'activation={activation!r}: must be one of {", ".join(ACTIVATIONS)}')
  # [.. 2F] -> two of [.. F], the gates first: imported weights must have that order, too.
  gate, value = jnp.split(hidden, 2, axis=-1)
  return _GATED[activation](gate) * value


def hidden_dim(mlp_dim: int, activation: str) -> int:
  """Returns F1, columns of the first matrix: twice F where each unit has a gate and a value."""
  return 2 * mlp_dim if activation in GATED else mlp_dim
