"""The one rule table for parameters and activations, and every sharding that is made from it.

Code names the dimensions of an array; here, and nowhere else, a name becomes axes of the mesh. No
other module writes a PartitionSpec or a NamedSharding, so a new mesh axis starts in `RULES`.

  (batch, None, embed)   -> PartitionSpec(('data', 'expert'), None, None)   activations
  (expert, embed, mlp)   -> PartitionSpec('expert', None, None)             experts' weights
  (embed, vocab)         -> PartitionSpec(None, None)                       copied to every device
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.parallel.mesh import BATCH_AXES, DATA_AXIS, EXPERT_AXIS

# Name of a dimension -> the mesh axes that it is split over; None: every device holds it whole.
RULES: Mapping[str, str | tuple[str, ...] | None] = MappingProxyType(
  {
    # The expert axis is a data axis outside the experts: without it, devices that differ only in
    # their experts would compute the same tokens.
    'batch': BATCH_AXES,
    'expert': EXPERT_AXIS,
    # Scanned or mapped over, one element after the other or all on each device.
    'layers': None,
    'microbatches': None,
    'trials': None,
    # Of matrices.
    'embed': None,
    'mlp': None,
    'heads': None,
    'kv_heads': None,
    'vocab': None,
  }
)


def spec(*dims: str | None) -> PartitionSpec:
  """Returns the mesh axes of an array's dimensions, for `in_specs` and `out_specs` of a shard_map.

  Args:
    *dims: names in `RULES`, or None for a dimension that is never split. Dimensions left out at
      the end are not split, so `spec()` copies the array to every device.

  Raises:
    ValueError: for a name without a rule. It is never taken for a dimension that is not split.
  """
  unknown = [dim for dim in dims if dim is not None and dim not in RULES]
  if unknown:
    raise ValueError(f'no rule for dimension {unknown[0]!r}; there are {", ".join(RULES)}')
  return PartitionSpec(*(None if dim is None else RULES[dim] for dim in dims))


def sharding(mesh: Mesh, *dims: str | None) -> NamedSharding:
  """Returns the sharding of an array with these dimensions, named as in `spec`."""
  return NamedSharding(mesh, spec(*dims))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose leading dimension is the batch."""
  return sharding(mesh, 'batch')


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return sharding(mesh)


def constrain(x: Any, mesh: Mesh, *dims: str | None) -> Any:
  """Returns an array, or a tree of them, held in a compiled function to the sharding of `dims`."""
  return jax.lax.with_sharding_constraint(x, sharding(mesh, *dims))


def named_shardings(mesh: Mesh, dims_of: Any) -> Any:
  """Returns a sharding for each parameter of a tree.

  Args:
    mesh: axes ('data', 'expert').
    dims_of: tree of PartitionSpecs of names of dimensions, not yet of mesh axes, as
      `flax.linen.get_partition_spec` returns it for the parameters of `layers.basic.logical`.

  Raises:
    ValueError: for a name without a rule.
  """
  return jax.tree.map(
    lambda dims: sharding(mesh, *dims),
    dims_of,
    is_leaf=lambda node: isinstance(node, PartitionSpec),
  )


def stacked(shardings: Any, dim: str) -> Any:
  """Returns the shardings of a tree's arrays once each has the dimension `dim` in front."""
  return jax.tree.map(
    lambda one: NamedSharding(one.mesh, PartitionSpec(*spec(dim), *one.spec)), shardings
  )


def leading_dims_sharding(whole: NamedSharding, number: int) -> NamedSharding:
  """Returns the sharding of an array that shares the first `number` dimensions of another."""
  return NamedSharding(whole.mesh, PartitionSpec(*whole.spec[:number]))


def expert_spec(mesh: Mesh, *, has_layers: bool) -> PartitionSpec:
  """Returns how the experts' weights enter the shard_map of a MoE layer.

  Args:
    mesh: axes ('data', 'expert').
    has_layers: weights [layers, expert, ...] of all layers; [expert, ...] of one otherwise.
  """
  # Over a data axis of one device the experts' gradients need no sum. Unless that axis is named,
  # JAX inserts one all the same, and XLA on CPUs copies all of them for it.
  unit_axes = (DATA_AXIS,) if mesh.shape[DATA_AXIS] == 1 else ()
  *layers, expert = spec(*(('layers', 'expert') if has_layers else ('expert',)))
  return PartitionSpec(*layers, (*unit_axes, expert))
