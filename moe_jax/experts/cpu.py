"""Experts on CPUs: one expert at a time, and only the rows that are filled.

`matmul` is a plain loop over experts: each iteration copies one expert's weights into the cache and
multiplies. The gradient of the weights is faster as a batched matmul and stays one.

`run_filled` goes further, where the number of filled rows of each expert is known. A buffer has
equally many rows for each expert, and under capacity dispatch a fifth of them or more are empty.
Only filled rows are multiplied, rounded up to one of a few static sizes. For each size there is a
loop over the experts that need it:

  sizes 2, 4, 8; filled = 3, 8, 0, 2, 4   ->   size 2: expert 3   size 4: experts 0, 4   size 8: 1

One iteration does everything that an expert does, so that its weights and its hidden units
stay in the cache, and writes the results in place. Experts without rows are left out. The backward
pass has the same loops; for few rows the gradients of the weights come from
`cpu_weight_gradients` after them.

Other platforms run `batched` (`jax.lax.platform_dependent`). Rows that are not filled must be zero,
and so must their gradient: then both give the same.

E experts, C rows of each, D embed, F1 columns of the first matrix, F hidden units.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from moe_jax.experts import batched
from moe_jax.experts.activations import activate
from moe_jax.experts.cpu_weight_gradients import filled_gradients
from moe_jax.routing.router import varying_like

# Sizes are multiples of the first; the others are numbers of steps, above half of all rows and
# below. Matmuls gain nothing from multiples of 8; more sizes take longer to compile.
MULTIPLE = 2
FINE_STEPS, COARSE_STEPS = 6, 2
# Up to this many rows of an expert the gradients of the weights come after the loops: then one
# batched matmul writes each once, instead of zeros first and the gradient later.
MOST_BATCHED = 192


def sizes_of(capacity: int) -> tuple[int, ...]:
  """Returns the numbers of rows that are computed; finer above half of all, as most loads are."""
  half = _rounded(capacity / 2)
  fine, coarse = _rounded(capacity / 2 / FINE_STEPS), _rounded(capacity / 2 / COARSE_STEPS)
  return (*range(coarse, half, coarse), *range(half, capacity, fine), capacity)


def _rounded(size: float) -> int:
  """Returns the next multiple."""
  return MULTIPLE * math.ceil(size / MULTIPLE)


# A custom gradient: reverse mode cannot differentiate a loop whose number of iterations depends on
# the data.
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


def _run_filled_bwd(activation, residuals, d_y):
  d_rows, d_w_in, d_w_out = jax.lax.platform_dependent(
    d_y,
    *residuals,
    cpu=sequential_vmap(functools.partial(_looped_backward, activation)),
    default=functools.partial(_batched_backward, activation),
  )
  return d_rows, None, d_w_in, d_w_out


run_filled.defvjp(_run_filled_fwd, _run_filled_bwd)


def _forward(activation, keeps_hidden, *arguments):
  """Returns outputs, and the hidden layer before its activation, or None."""
  looped = functools.partial(_looped_forward, activation, keeps_hidden)
  default = functools.partial(_batched_forward, activation, keeps_hidden)
  # Packed trials are computed one after another: a loop under vmap would go on for the longest of
  # them.
  return jax.lax.platform_dependent(*arguments, cpu=sequential_vmap(looped), default=default)


def _looped_forward(activation, keeps_hidden, rows, filled, w_in, w_out):
  num_experts, capacity, _ = rows.shape

  def body(size, expert, results):
    # Rows from `filled` to `size` are zero and stay zero: every activation maps 0 to 0. One that
    # does not would leave outputs in slots that no token holds.
    hidden = _first(rows, expert, size) @ _of(w_in, expert)
    y = activate(hidden, activation) @ _of(w_out, expert)
    return tuple(map(functools.partial(_put, expert), results, (y, hidden)))

  y, hidden = jnp.zeros_like(rows), jnp.zeros((num_experts, capacity, w_in.shape[2]), rows.dtype)
  # Without a gradient to come, the hidden units never leave the cache.
  results = (y, hidden) if keeps_hidden else (y,)
  results = _for_each_expert(body, filled, capacity, varying_like(results, rows))
  return results if keeps_hidden else (*results, None)


def _looped_backward(activation, d_y, rows, filled, hidden, w_in, w_out):
  num_experts, capacity, _ = rows.shape
  weights_in_loop = capacity > MOST_BATCHED

  def body(size, expert, results):
    own_d_y, own_rows, own_hidden = (_first(a, expert, size) for a in (d_y, rows, hidden))
    active, pull = jax.vjp(functools.partial(activate, activation=activation), own_hidden)
    (d_hidden,) = pull(own_d_y @ _of(w_out, expert).T)
    d_rows = d_hidden @ _of(w_in, expert).T
    new = (d_rows, d_hidden, active)
    if weights_in_loop:
      new = (d_rows, own_rows.T @ d_hidden, active.T @ own_d_y)
    return tuple(map(functools.partial(_put, expert), results, new))

  if weights_in_loop:
    others = (jnp.zeros_like(w_in), jnp.zeros_like(w_out))
  else:
    shape = (num_experts, capacity, w_out.shape[1])
    others = (jnp.zeros_like(hidden), jnp.zeros(shape, hidden.dtype))
  # A loop must start from values that differ between devices, as its later ones do.
  results = varying_like((jnp.zeros_like(rows), *others), rows)
  d_rows, *others = _for_each_expert(body, filled, capacity, results)
  if weights_in_loop:
    return d_rows, *others
  # [E C F1] and [E C F]. Experts without rows left zeros, which add nothing below.
  d_hidden, active = others
  return d_rows, *filled_gradients(filled, ((rows, d_hidden), (active, d_y)))


def _batched_forward(activation, keeps_hidden, rows, filled, w_in, w_out):
  del filled
  y, hidden = batched.forward(activation, rows, w_in, w_out)
  return y, hidden if keeps_hidden else None


def _batched_backward(activation, d_y, rows, filled, hidden, w_in, w_out):
  del filled
  return batched.backward(activation, d_y, rows, hidden, w_in, w_out)


def _for_each_expert(
  body: Callable[[int, Int[Array, ''], Any], Any],
  filled: Int[Array, 'E'],
  capacity: int,
  results: Any,
) -> Any:
  """Calls results = body(size, expert, results) for each expert that has rows.

  Args:
    body: writes the results of one expert; `size`, which is static, is the least of the sizes that
      is not below its number of rows.
    filled: rows of each expert.
    capacity: the largest size.
    results: initial values, overwritten in place.
  """
  sizes = sizes_of(capacity)
  # Experts in the order of their sizes; those without rows come first, and have no loop.
  count = functools.partial(jnp.searchsorted, method='compare_all')
  # The number of sizes below `filled`: 0 without rows, i + 1 for sizes[i].
  rank = count(jnp.array((0, *sizes[:-1])), filled)
  if filled.size == 1:
    # Nothing would differ between the iterations of a loop, and XLA would compute all sizes before
    # it.
    branches = [functools.partial(body, size, jnp.zeros_like(filled[0])) for size in sizes]
    return jax.lax.switch(rank[0], [lambda results: results, *branches], results)
  order = jnp.argsort(rank).astype(jnp.int32)
  # ends[i] to ends[i + 1]: the experts of sizes[i] in that order.
  ends = count(rank[order], jnp.arange(len(sizes) + 1), side='right').astype(jnp.int32)
  # One loop for each size: the number of iterations is data, the shape of an iteration is static.
  for i, size in enumerate(sizes):
    one = functools.partial(lambda size, j, results: body(size, order[j], results), size)
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


@jax.custom_vjp
def matmul(rows: Float[Array, 'E C D'], weights: Float[Array, 'E D F']) -> Float[Array, 'E C F']:
  """Returns rows @ weights of each expert; on a CPU one expert at a time, in both directions."""
  return jax.lax.platform_dependent(rows, weights, cpu=_looped_matmul, default=batched.matmul)


def _matmul_fwd(rows, weights):
  return matmul(rows, weights), (rows, weights)


def _matmul_bwd(residuals, d_output):
  rows, weights = residuals
  d_rows = jax.lax.platform_dependent(
    d_output, weights, cpu=_looped_rows_gradient, default=batched.rows_gradient
  )
  return d_rows, batched.weights_gradient(rows, d_output)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _looped_matmul(rows, weights):
  return jax.lax.map(lambda pair: pair[0] @ pair[1], (rows, weights))


def _looped_rows_gradient(d_output, weights):
  return jax.lax.map(lambda pair: pair[0] @ pair[1].T, (d_output, weights))
