"""What experts do to rows of which each has its own number: one expert at a time, for CPUs.

A buffer has equally many rows for each expert, and under capacity dispatch a fifth of them or
more are empty. Here a loop goes over the experts and multiplies only the rows that are filled,
rounded up to one of a few static sizes, with everything an expert does in one turn of the loop: its
weights and its hidden units stay in the cache. The backward pass is a loop, too, but for few rows
the gradients of the weights are one batched product after it: a loop writes them twice, into the
cache and from there to their place, which then costs more than multiplying empty rows
(experiments/LOG.md, 2026-11-27).

Other platforms compute all rows in batched products. Rows that are not filled must be zero, as must
their gradient be: then both ways give the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from moe_jax.layers import basic

# Static numbers of rows, at most, and what they are multiples of.
MOST_SIZES = 20
MULTIPLE = 8
# Rows of an expert up to which the gradients of all weights are one batched product: measured,
# better from 40 to 168, as good at 216, worse from 304 on.
MOST_BATCHED = 192


def sizes_of(capacity: int) -> tuple[int, ...]:
  """Returns the numbers of rows that are computed: multiples of a step, and all."""
  step = MULTIPLE * math.ceil(capacity / MOST_SIZES / MULTIPLE)
  return (*range(step, capacity, step), capacity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_filled(
  activation: str,
  rows: Float[Array, 'E C D'],
  filled: Int[Array, 'E'],
  w_in: Float[Array, 'E D F1'],
  w_out: Float[Array, 'E F D'],
) -> Float[Array, 'E C D']:
  """Runs each expert on its first rows.

  Args:
    activation: of the hidden layer.
    rows: of each expert; zero from `filled` on.
    filled: how many rows of each expert count, at most C.
    w_in: of each expert; varies over devices as the rows do.
    w_out: the same.

  Returns:
    Outputs; zero for rows that do not count.
  """
  return _forward(activation, False, rows, filled, w_in, w_out)[0]


def _run_filled_fwd(activation, rows, filled, w_in, w_out):
  y, hidden = _forward(activation, True, rows, filled, w_in, w_out)
  return y, (rows, filled, hidden, w_in, w_out)


def _run_filled_bwd(activation, residuals, grad):
  ways = (sequential_vmap(functools.partial(_looped_backward, activation)), _batched_backward)
  of_rows, of_in, of_out = jax.lax.platform_dependent(
    grad, *residuals, cpu=ways[0], default=functools.partial(ways[1], activation)
  )
  return of_rows, None, of_in, of_out


run_filled.defvjp(_run_filled_fwd, _run_filled_bwd)


def _forward(activation, keeps_hidden, *arguments):
  """Returns outputs, and the hidden layer before its activation, or None."""
  looped = functools.partial(_looped_forward, activation, keeps_hidden)
  batched = functools.partial(_batched_forward, activation, keeps_hidden)
  # Packed trials are computed in turn: a branch under vmap would compute all branches.
  return jax.lax.platform_dependent(*arguments, cpu=sequential_vmap(looped), default=batched)


def _looped_forward(activation, keeps_hidden, rows, filled, w_in, w_out):
  capacity = rows.shape[1]

  def run(num_rows, rows, w_in, w_out):
    hidden = rows[:num_rows] @ w_in
    y = _padded(basic.activate(hidden, activation) @ w_out, capacity)
    return y, _padded(hidden, capacity) if keeps_hidden else None

  return jax.lax.map(
    lambda of: _by_size(run, capacity, of[0], *of[1:]), (filled, rows, w_in, w_out)
  )


def _looped_backward(activation, grad, rows, filled, hidden, w_in, w_out):
  capacity = rows.shape[1]
  weights_in_loop = capacity > MOST_BATCHED

  def run(num_rows, grad, rows, hidden, w_in, w_out):
    grad, rows, hidden = grad[:num_rows], rows[:num_rows], hidden[:num_rows]
    active, pull = jax.vjp(functools.partial(basic.activate, activation=activation), hidden)
    (of_hidden,) = pull(grad @ w_out.T)
    of_rows = _padded(of_hidden @ w_in.T, capacity)
    if weights_in_loop:
      return of_rows, rows.T @ of_hidden, active.T @ grad
    return of_rows, _padded(of_hidden, capacity), _padded(active, capacity)

  of_rows, *rest = jax.lax.map(
    lambda of: _by_size(run, capacity, of[0], *of[1:]), (filled, grad, rows, hidden, w_in, w_out)
  )
  if weights_in_loop:
    return of_rows, *rest
  of_hidden, active = rest
  return of_rows, _of_weights(rows, of_hidden), _of_weights(active, grad)


def _batched_forward(activation, keeps_hidden, rows, filled, w_in, w_out):
  del filled
  hidden = jnp.einsum('ecd,edf->ecf', rows, w_in)
  y = jnp.einsum('ecf,efd->ecd', basic.activate(hidden, activation), w_out)
  return y, hidden if keeps_hidden else None


def _batched_backward(activation, grad, rows, filled, hidden, w_in, w_out):
  del filled
  active, pull = jax.vjp(functools.partial(basic.activate, activation=activation), hidden)
  (of_hidden,) = pull(jnp.einsum('ecd,efd->ecf', grad, w_out))
  of_rows = jnp.einsum('ecf,edf->ecd', of_hidden, w_in)
  return of_rows, _of_weights(rows, of_hidden), _of_weights(active, grad)


def _of_weights(rows: Float[Array, 'E C D'], grad: Float[Array, 'E C F']) -> Float[Array, 'E D F']:
  return jnp.einsum('ecd,ecf->edf', rows, grad)


def _by_size(run: Callable[..., Any], capacity: int, filled: Int[Array, ''], *arrays: Array) -> Any:
  """Returns run(n, *arrays) with the least of the static sizes that is not below `filled`."""
  sizes = sizes_of(capacity)
  # All but the last are multiples of the first.
  index = jnp.minimum((jnp.maximum(filled, 1) - 1) // sizes[0], len(sizes) - 1)
  return jax.lax.switch(index, [functools.partial(run, size) for size in sizes], *arrays)


def _padded(rows: Float[Array, 'n D'], capacity: int) -> Float[Array, 'C D']:
  return jnp.pad(rows, ((0, capacity - rows.shape[0]), (0, 0)))
