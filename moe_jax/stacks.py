"""Parameter arrays as stacks of matrices and vectors, and functions of each of these.

`layers` stacks the parameters of all layers in a first dimension, a MoE layer those of all experts
in a second, and `w_in` of a gated unit holds the columns of gate and value side by side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Stack(NamedTuple):
  """Structure of an array of parameters.

  Attributes:
    rank: dimensions of each matrix or vector, the last ones of the array.
    halves: 2 where the last dimension holds the columns of gate and value, else 1.
  """

  rank: int
  halves: int


# Kinds of arrays of parameters: weights of matmuls inside blocks; those of routed experts; those
# that routers select by; input embedding; output matrix; scales of norms.
LABELS = ('matrix', 'expert', 'router', 'embedding', 'output', 'norm')

# Returns the kind of an array, from the names on its path and its shape.
Labeller = Callable[[tuple[str, ...], tuple[int, ...]], str]


def names(path: Any) -> tuple[str, ...]:
  """Returns the names on the path of an array in a tree of dictionaries."""
  return tuple(str(part.key) for part in path)


def label(path: tuple[str, ...], shape: tuple[int, ...]) -> str:
  """Returns the label of a parameter by the names that this package gives them."""
  del shape
  if path[0] in ('embedding', 'output'):
    return path[0]
  if path[-1] == 'scale':
    return 'norm'
  if 'moe' in path:
    # Whatever a router calls its weights, they lie next to those of the experts.
    return 'expert' if path[-1] in ('w_in', 'w_out') else 'router'
  return 'matrix'


def labels_of(params: Any, labeller: Labeller = label) -> Any:
  """Returns the label of each array of a tree of parameters."""
  return jax.tree_util.tree_map_with_path(lambda path, p: labeller(names(path), p.shape), params)


def is_matrix(params: Any, labeller: Labeller = label) -> Any:
  """True for the weights of matmuls inside blocks; False for norms, embedding and output."""
  return jax.tree_util.tree_map_with_path(
    lambda path, p: _is_matrix(path, p.shape, labeller), params
  )


def _is_matrix(path: Any, shape: tuple[int, ...], labeller: Labeller = label) -> bool:
  of_layers = path[0].key == 'layers'
  inside = labeller(names(path), shape) in ('matrix', 'expert', 'router')
  return inside and len(shape) - of_layers >= 2


def stacks_of(params: Any) -> Any:
  """Returns a `Stack` for each array of a tree of parameters, or of arrays of their shapes."""

  def one(path, p):
    if path[0].key != 'layers':
      return Stack(p.ndim, 1)
    if not _is_matrix(path, p.shape):
      return Stack(min(p.ndim - 1, 1), 1)
    return Stack(2, _halves(path, p))

  def _halves(path, p) -> int:
    neighbours = params
    for part in path[:-1]:
      neighbours = neighbours[part.key]
    if path[-1].key != 'w_in' or 'w_out' not in neighbours:
      return 1
    return p.shape[-1] // neighbours['w_out'].shape[-2]

  return jax.tree_util.tree_map_with_path(one, params)


def for_each(function: Callable, params: Any, *others: Any, num_results: int = 1) -> Any:
  """Maps a function over every matrix and every vector of the parameters.

  Never by a reshape of the stack into one dimension: where it is split over devices, each would
  then gather and work on the experts of all others.

  Args:
    function: of one matrix or vector, and of what belongs to it in the other trees. An array that
      it returns in the shape of the matrix is put back into that of the parameter.
    params: parameters, or arrays of their shapes.
    *others: trees of the same structure, of arrays that have the shape of the parameter or come
      from an earlier call.
    num_results: how many arrays the function returns, as a tuple if more than one.

  Returns:
    A tree for each result.
  """

  def one(p, stack, *rest):
    arrays = [jnp.asarray(x) for x in (p, *rest)]
    arrays = [_split(x, stack) if x.shape == p.shape else x for x in arrays]
    mapped = function
    for _ in range(arrays[0].ndim - stack.rank):
      mapped = jax.vmap(mapped)
    results = mapped(*arrays)
    shape = arrays[0].shape
    return jax.tree.map(lambda x: _join(x, stack) if x.shape == shape else x, results)

  results = jax.tree.map(one, params, stacks_of(params), *others)
  if num_results == 1:
    return results
  outer, inner = jax.tree.structure(params), jax.tree.structure((0,) * num_results)
  return jax.tree.transpose(outer, inner, results)


def _split(x: jax.Array, stack: Stack) -> jax.Array:
  """Turns [... D 2F] into [... 2 D F]."""
  if stack.halves == 1:
    return x
  return jnp.moveaxis(x.reshape(*x.shape[:-1], stack.halves, -1), -2, -3)


def _join(x: jax.Array, stack: Stack) -> jax.Array:
  """The inverse of `_split`."""
  if stack.halves == 1:
    return x
  x = jnp.moveaxis(x, -3, -2)
  return x.reshape(*x.shape[:-2], -1)
