"""The arrays of an optimizer as a checkpoint holds them, where an earlier version had others."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from moe_jax.parallel.sharding import replicated
from moe_jax.train.state import TrainState

Shapes = Mapping[tuple[str, ...], tuple[int, ...]]


def shapes_of(tree: Any) -> Shapes:
  """Returns {path: shape} of the arrays of a tree, or of their metadata in a checkpoint."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_words(path): tuple(leaf.shape) for path, leaf in flat if hasattr(leaf, 'shape')}


def as_saved(abstract: TrainState, saved: Shapes) -> TrainState | None:
  """Returns the state with the optimizer that a checkpoint holds; None if that is no other.

  Arrays of another shape there are replicated, and a state that is not there is empty.

  Args:
    abstract: the state of this version.
    saved: of the whole state, from `shapes_of`.
  """
  if shapes_of({'opt_state': abstract.opt_state}) == {
    path: shape for path, shape in saved.items() if path[0] == 'opt_state'
  }:
    return None

  def fit(path, leaf):
    shape = saved.get(('opt_state', *_words(path)))
    if shape is None or shape == leaf.shape:
      return None if shape is None else leaf
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=replicated(leaf.sharding.mesh))

  def is_gone(node):
    return isinstance(node, tuple) and bool(node) and all(x is None for x in node)

  fitted = jax.tree_util.tree_map_with_path(fit, abstract.opt_state)
  without = jax.tree.map(
    lambda node: optax.EmptyState() if is_gone(node) else node, fitted, is_leaf=is_gone
  )
  return abstract._replace(opt_state=without)


def _words(path) -> tuple[str, ...]:
  """Returns a path as strings: of a NamedTuple, a checkpoint has only the names."""
  names = ('name', 'key', 'idx')
  return tuple(str(next(getattr(p, n) for n in names if hasattr(p, n))) for p in path)
