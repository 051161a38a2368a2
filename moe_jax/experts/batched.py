"""Matmuls of all experts at once: what GPUs and TPUs run, and the oracle of the CPU paths.

E experts, C rows of each, D embed, F1 columns of the first matrix, F hidden units.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.experts.activations import activate


def matmul(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  """Returns rows @ weights of each expert."""
  return jnp.einsum('ecd,edf->ecf', rows, weights)


def rows_gradient(
  d_output: Float[Array, 'E C F'], weights: Float[Array, 'E D F']
) -> Float[Array, 'E C D']:
  """Returns d_output @ weights.T of each expert."""
  return jnp.einsum('ecf,edf->ecd', d_output, weights)


def weights_gradient(
  rows: Float[Array, 'E C D'], d_output: Float[Array, 'E C F']
) -> Float[Array, 'E D F']:
  """Returns rows.T @ d_output of each expert."""
  return jnp.einsum('ecd,ecf->edf', rows, d_output)


def forward(
  activation: str,
  rows: Float[Array, 'E C D'],
  w_in: Float[Array, 'E D F1'],
  w_out: Float[Array, 'E F D'],
) -> tuple[Float[Array, 'E C D'], Float[Array, 'E C F1']]:
  """Returns the outputs of all experts, and their hidden layers before the activation."""
  # [E C D] -> [E C F1]. The layer before its activation is what the backward pass needs: it has the
  # slope, and the active units follow from it element by element.
  hidden = matmul(rows, w_in)
  return matmul(activate(hidden, activation), w_out), hidden


def backward(
  activation: str,
  d_y: Float[Array, 'E C D'],
  rows: Float[Array, 'E C D'],
  hidden: Float[Array, 'E C F1'],
  w_in: Float[Array, 'E D F1'],
  w_out: Float[Array, 'E F D'],
) -> tuple[Float[Array, 'E C D'], Float[Array, 'E D F1'], Float[Array, 'E F D']]:
  """Returns the gradients of rows, w_in and w_out."""
  # [E C F], formed again with its slope, rather than kept next to `hidden`.
  active, pull = jax.vjp(functools.partial(activate, activation=activation), hidden)
  (d_hidden,) = pull(rows_gradient(d_y, w_out))
  d_rows = rows_gradient(d_hidden, w_in)
  return d_rows, weights_gradient(rows, d_hidden), weights_gradient(active, d_y)
