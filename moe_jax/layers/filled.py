"""What experts do to rows of which each has its own number: one expert at a time, for CPUs.

A buffer has equally many rows for each expert, and under capacity dispatch a fifth of them or
more are empty. Here only the rows that are filled are multiplied, rounded up to one of a few static
sizes: for each size a loop over the experts that need it, of which a turn does everything that
an expert does, so that its weights and its hidden units stay in the cache, and writes the
results to their place. Experts without rows are left out. The backward pass has such loops, too,
but for few rows the gradients of the weights come from `weight_gradients` after them
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
from moe_jax.layers.weight_gradients import batched_gradient, filled_gradients
from moe_jax.routing.router import varying_like

# What numbers of rows are multiples of, and their steps above half of all rows and below. Products
# gain nothing from multiples of 8; more sizes take longer to compile.
MULTIPLE = 2
FINE_STEPS, COARSE_STEPS = 20, 4
# Rows of an expert up to which the gradients of the weights come after the loops: measured,
# better from 40 to 168, as good at 216, worse from 304 on.
MOST_BATCHED = 192


def sizes_of(capacity: int) -> tuple[int, ...]:
  """Returns the numbers of rows that are computed; finer above half of all, as most loads are."""
  half = _rounded(capacity / 2)
  fine, coarse = _rounded(capacity / 2 / FINE_STEPS), _rounded(capacity / 2 / COARSE_STEPS)
  return (*range(coarse, half, coarse), *range(half, capacity, fine), capacity)


def _rounded(size: float) -> int:
  """Returns the next multiple."""
  return MULTIPLE * math.ceil(size / MULTIPLE)


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
  # Packed trials are computed in turn: a loop under vmap would go on for the longest of them.
  return jax.lax.platform_dependent(*arguments, cpu=sequential_vmap(looped), default=batched)


def _looped_forward(activation, keeps_hidden, rows, filled, w_in, w_out):
  num_experts, capacity, _ = rows.shape

  def turn(size, expert, results):
    hidden = _first(rows, expert, size) @ _of(w_in, expert)
    y = basic.activate(hidden, activation) @ _of(w_out, expert)
    return tuple(map(functools.partial(_put, expert), results, (y, hidden)))

  y, hidden = jnp.zeros_like(rows), jnp.zeros((num_experts, capacity, w_in.shape[2]), rows.dtype)
  results = (y, hidden) if keeps_hidden else (y,)
  results = _for_each_expert(turn, filled, capacity, varying_like(results, rows))
  return results if keeps_hidden else (*results, None)


def _looped_backward(activation, grad, rows, filled, hidden, w_in, w_out):
  num_experts, capacity, _ = rows.shape
  weights_in_loop = capacity > MOST_BATCHED

  def turn(size, expert, results):
    own_grad, own_rows, own_hidden = (_first(of, expert, size) for of in (grad, rows, hidden))
    active, pull = jax.vjp(functools.partial(basic.activate, activation=activation), own_hidden)
    (of_hidden,) = pull(own_grad @ _of(w_out, expert).T)
    of_rows = of_hidden @ _of(w_in, expert).T
    new = (of_rows, of_hidden, active)
    if weights_in_loop:
      new = (of_rows, own_rows.T @ of_hidden, active.T @ own_grad)
    return tuple(map(functools.partial(_put, expert), results, new))

  if weights_in_loop:
    others = (jnp.zeros_like(w_in), jnp.zeros_like(w_out))
  else:
    shape = (num_experts, capacity, w_out.shape[1])
    others = (jnp.zeros_like(hidden), jnp.zeros(shape, hidden.dtype))
  results = varying_like((jnp.zeros_like(rows), *others), rows)
  of_rows, *others = _for_each_expert(turn, filled, capacity, results)
  if weights_in_loop:
    return of_rows, *others
  of_hidden, active = others
  return of_rows, *filled_gradients(filled, ((rows, of_hidden), (active, grad)))


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
  return of_rows, batched_gradient(rows, of_hidden), batched_gradient(active, grad)


def _for_each_expert(
  turn: Callable[[int, Int[Array, ''], Any], Any],
  filled: Int[Array, 'E'],
  capacity: int,
  results: Any,
) -> Any:
  """Calls results = turn(size, expert, results) for each expert that has rows.

  Args:
    turn: writes the results of one expert; `size`, which is static, is the least of the sizes that
      is not below its number of rows.
    filled: rows of each expert.
    capacity: the largest size.
    results: what the turns start from.
  """
  sizes = sizes_of(capacity)
  # Experts in the order of their sizes; those without rows come first, and have no loop.
  count = functools.partial(jnp.searchsorted, method='compare_all')
  rank = count(jnp.array((0, *sizes[:-1])), filled)
  if filled.size == 1:
    # Nothing would differ between the turns of a loop, and XLA would compute all sizes before it.
    alone = [functools.partial(turn, size, jnp.zeros_like(filled[0])) for size in sizes]
    return jax.lax.switch(rank[0], [lambda results: results, *alone], results)
  order = jnp.argsort(rank).astype(jnp.int32)
  ends = count(rank[order], jnp.arange(len(sizes) + 1), side='right').astype(jnp.int32)
  for i, size in enumerate(sizes):
    one = functools.partial(lambda size, j, results: turn(size, order[j], results), size)
    results = jax.lax.fori_loop(ends[i], ends[i + 1], one, results)
  return results


def _first(values: Float[Array, 'E C D'], expert: Int[Array, ''], size: int) -> Float[Array, 'n D']:
  """Reads the first rows of one expert."""
  zero = jnp.zeros_like(expert)
  return jax.lax.dynamic_slice(values, (expert, zero, zero), (1, size, values.shape[2]))[0]


def _of(weights: Float[Array, 'E D F'], expert: Int[Array, '']) -> Float[Array, 'D F']:
  return jax.lax.dynamic_index_in_dim(weights, expert, keepdims=False)


def _put(
  expert: Int[Array, ''], values: Float[Array, 'E C D'], first: Float[Array, 'n D']
) -> Float[Array, 'E C D']:
  """Writes the first rows of one expert, in place."""
  zero = jnp.zeros_like(expert)
  return jax.lax.dynamic_update_slice(values, first[None], (expert, zero, zero))
