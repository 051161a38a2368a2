"""What experts do to their rows: two batched products with an activation between them.

XLA on CPUs runs a batched product of few rows with many large matrices at a fraction of the speed
of a plain product, above all the gradient of the rows. There these products go one expert at a time
through a loop, which copies one expert's weights into the cache and multiplies; the gradient of the
weights is faster as a batched product and stays one. Which way is decided by shape and platform, as
measured (`benchmark products`; experiments/LOG.md, 2026-11-27).

Where it is known how many rows of each expert are filled, `moe_jax.layers.filled` takes the loop
further.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.layers import basic
from moe_jax.layers.filled import run_filled
from moe_jax.layers.weight_gradients import batched_gradient
from moe_jax.routing.router import varying_like

# A loop on CPUs from so many experts on, up to so many rows of each, from so many weights of each.
LEAST_EXPERTS = 64
MOST_ROWS = 256
LEAST_WEIGHTS = 2**17


def run_experts(
  rows: Float[Array, 'E C D'],
  weights: tuple[Float[Array, 'E D F1'], Float[Array, 'E F D']],
  activation: str,
  filled: Int[Array, 'E'] | None = None,
) -> Float[Array, 'E C D']:
  """Runs each expert on its own rows.

  Args:
    rows: of each expert.
    weights: of all experts here.
    activation: of the hidden layer.
    filled: how many rows of each expert count, if that is known; the others are zero.
  """
  w_in, w_out = (w.astype(rows.dtype) for w in weights)
  if filled is not None and _are_large(w_in):
    w_in, w_out = varying_like((w_in, w_out), rows)
    return run_filled(activation, rows, varying_like(filled, rows), w_in, w_out)
  hidden = basic.activate(times(rows, w_in), activation)
  return times(hidden, w_out)


def gains_from_packing(
  weights: tuple[Float[Array, 'E D F1'], Float[Array, 'E F D']], platform: str
) -> bool:
  """Whether it pays to move rows so that `run_experts` can be told which ones are filled."""
  return platform == 'cpu' and _are_large(weights[0])


def _are_large(w_in: Float[Array, 'E D F1']) -> bool:
  return math.prod(w_in.shape[1:]) >= LEAST_WEIGHTS


def times(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  """Multiplies the rows of each expert with its weights."""
  if not prefers_loop(rows.shape[1], weights.shape):
    return batched(rows, weights)
  return _times(rows, varying_like(weights, rows))


def prefers_loop(num_rows: int, weights_shape: tuple[int, ...]) -> bool:
  """Whether a CPU is faster one expert at a time; other platforms never are.

  Args:
    num_rows: C, of each expert.
    weights_shape: (E, D, F).
  """
  num_experts, width, columns = weights_shape
  large = width * columns >= LEAST_WEIGHTS
  return num_experts >= LEAST_EXPERTS and num_rows <= MOST_ROWS and large


def batched(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  """All experts in one product."""
  return jnp.einsum('ecd,edf->ecf', rows, weights)


def looped(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  """One expert at a time."""
  return jax.lax.map(lambda pair: pair[0] @ pair[1], (rows, weights))


def batched_rows_gradient(
  grad: Float[Array, 'E C F'], weights: Float[Array, 'E D F']
) -> Float[Array, 'E C D']:
  """Gradient of the rows, all experts in one product."""
  return jnp.einsum('ecf,edf->ecd', grad, weights)


def looped_rows_gradient(
  grad: Float[Array, 'E C F'], weights: Float[Array, 'E D F']
) -> Float[Array, 'E C D']:
  """Gradient of the rows, one expert at a time."""
  return jax.lax.map(lambda pair: pair[0] @ pair[1].T, (grad, weights))


@jax.custom_vjp
def _times(rows, weights):
  return jax.lax.platform_dependent(rows, weights, cpu=looped, default=batched)


def _times_fwd(rows, weights):
  return _times(rows, weights), (rows, weights)


def _times_bwd(residuals, grad):
  rows, weights = residuals
  of_rows = jax.lax.platform_dependent(
    grad, weights, cpu=looped_rows_gradient, default=batched_rows_gradient
  )
  return of_rows, batched_gradient(rows, grad)


_times.defvjp(_times_fwd, _times_bwd)
