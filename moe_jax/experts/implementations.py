"""The choice between implementations of the experts, by shape and platform.

The bounds are measured on CPUs (experiments/LOG.md); the table is in the docstring of the package.

One-letter dimensions: E experts, C rows of each, D embed, F hidden units, F1 columns of the first
matrix.
"""

import math
import os

from jaxtyping import Array, Float, Int

from moe_jax.errors import UserError
from moe_jax.experts import batched, cpu
from moe_jax.experts.activations import activate
from moe_jax.routing.router import varying_like

# A loop over experts pays from this many experts on, up to this many rows of each, and only where
# an expert's matrix is not small: an iteration costs about as much as copying it into the cache.
LEAST_EXPERTS = 64
MOST_ROWS = 256
LEAST_WEIGHTS = 2**17

# Environment variable that switches the CPU paths off.
CPU_PATHS = 'MOE_JAX_CPU_EXPERTS'


def run_experts(
  rows: Float[Array, 'E C D'],
  weights: tuple[Float[Array, 'E D F1'], Float[Array, 'E F D']],
  activation: str,
  filled: Int[Array, 'E'] | None = None,
) -> Float[Array, 'E C D']:
  """Runs each expert on its own rows.

  Args:
    rows: of each expert.
    weights: `w_in` and `w_out` of all experts on this device.
    activation: of the hidden layer, one of `ACTIVATIONS`.
    filled: how many rows of each expert count, if that is known; the others must be zero.
  """
  w_in, w_out = (w.astype(rows.dtype) for w in weights)
  if filled is not None and _are_large(w_in) and cpu_paths_on():
    # The custom gradient is each device's own. Marked as varying, the weights get the sum of those
    # of all devices that hold the expert.
    w_in, w_out = varying_like((w_in, w_out), rows)
    return cpu.run_filled(activation, rows, varying_like(filled, rows), w_in, w_out)
  hidden = activate(_matmul(rows, w_in), activation)
  return _matmul(hidden, w_out)


def should_pack(
  weights: tuple[Float[Array, 'E D F1'], Float[Array, 'E F D']], platform: str
) -> bool:
  """True if it pays to move rows so that `run_experts` knows which of them are filled."""
  return platform == 'cpu' and cpu_paths_on() and _are_large(weights[0])


def cpu_paths_on() -> bool:
  """True if CPUs may run code of their own; read when a program is traced.

  Raises:
    UserError: if the environment variable is neither `on` nor `off`.
  """
  value = os.environ.get(CPU_PATHS, 'on')
  if value not in ('on', 'off'):
    raise UserError(CPU_PATHS, value, 'must be on or off')
  return value == 'on'


def prefers_loop(num_rows: int, weights_shape: tuple[int, ...]) -> bool:
  """True if a CPU is faster one expert at a time; other platforms never are.

  Args:
    num_rows: C, of each expert.
    weights_shape: (E, D, F).
  """
  num_experts, width, columns = weights_shape
  large = width * columns >= LEAST_WEIGHTS
  return num_experts >= LEAST_EXPERTS and num_rows <= MOST_ROWS and large


def _matmul(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  if cpu_paths_on() and prefers_loop(rows.shape[1], weights.shape):
    return cpu.matmul(rows, varying_like(weights, rows))
  return batched.matmul(rows, weights)


def _are_large(w_in: Float[Array, 'E D F1']) -> bool:
  return math.prod(w_in.shape[1:]) >= LEAST_WEIGHTS
