"""One table of rules says how arrays lie on the mesh, and no other module writes a sharding."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import moe_jax
from moe_jax.parallel import sharding as sharding_lib
from moe_jax.parallel.mesh import make_mesh

PACKAGE = pathlib.Path(moe_jax.__file__).parent
# What makes or applies a sharding without the table, whatever it is called through.
WRITTEN = {
  'GSPMDSharding',
  'NamedSharding',
  'PartitionSpec',
  'PositionalSharding',
  'SingleDeviceSharding',
  'logical_to_mesh_sharding',
  'with_logical_constraint',
  'with_partitioning',
  'with_sharding_constraint',
}


def written_in(source: str) -> set[str]:
  """Returns what a module imports from JAX, or reaches as an attribute, to write a sharding."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      short = {'P'} if (node.module or '').split('.')[0] == 'jax' else set()
      found |= {alias.name for alias in node.names} & (WRITTEN | short)
    elif isinstance(node, ast.Attribute):
      is_short = node.attr == 'P' and ast.unparse(node.value) in ('jax', 'jax.sharding')
      found |= {node.attr} & WRITTEN | ({'P'} if is_short else set())
  return found


def test_no_other_module_writes_a_sharding():
  written = {
    path.relative_to(PACKAGE).as_posix(): written_in(path.read_text(encoding='utf-8'))
    for path in PACKAGE.rglob('*.py')
  }
  assert {path: names for path, names in written.items() if names} == {
    'parallel/sharding.py': {'NamedSharding', 'PartitionSpec', 'with_sharding_constraint'}
  }


@pytest.mark.parametrize(
  ('source', 'names'),
  [
    ('from jax.sharding import Mesh, PartitionSpec as Spec', {'PartitionSpec'}),
    ('import jax\nx = jax.sharding.NamedSharding(mesh, spec)', {'NamedSharding'}),
    ('from jax import P', {'P'}),
    ('import jax\nx = jax.P("data")', {'P'}),
    ('import jax\ny = jax.lax.with_sharding_constraint(x, s)', {'with_sharding_constraint'}),
    ('import flax.linen as nn\nnn.logical_to_mesh_sharding(a, b, c)', {'logical_to_mesh_sharding'}),
    ('from jax.sharding import Mesh\nP = params.P\n"PartitionSpec(None)"', set()),
  ],
)
def test_finds_every_way_to_write_one(source, names):
  assert written_in(source) == names


# Shape of the whole array -> shape on each device of the mesh (2, 4): 8 devices share the batch,
# 4 the experts.
@pytest.mark.parametrize(
  ('dims', 'shape', 'on_device'),
  [
    (('batch',), (16,), (2,)),
    (('batch',), (16, 3, 5), (2, 3, 5)),
    (('batch', None, 'embed'), (16, 3, 5), (2, 3, 5)),
    (('trials', 'batch'), (6, 16, 3), (6, 2, 3)),
    (('microbatches', 'batch'), (4, 16, 3), (4, 2, 3)),
    (('layers', 'batch'), (2, 16, 3, 2), (2, 2, 3, 2)),
    (('expert', 'embed', 'mlp'), (8, 3, 5), (2, 3, 5)),
    (('layers', 'expert', 'mlp', 'embed'), (4, 8, 5, 3), (4, 2, 5, 3)),
    (('layers', 'embed', 'heads'), (4, 8, 16), (4, 8, 16)),
    (('embed', 'kv_heads'), (8, 16), (8, 16)),
    (('vocab', 'embed'), (16, 8), (16, 8)),
    ((), (16, 8), (16, 8)),
  ],
)
def test_splits_only_batch_and_experts(dims, shape, on_device):
  mesh = make_mesh(2, 4)
  whole = sharding_lib.sharding(mesh, *dims)
  assert whole.shard_shape(shape) == on_device
  # As it enters and leaves a shard_map, and as a constraint in a compiled function.
  assert whole.spec == sharding_lib.spec(*dims)
  constrained = jax.jit(lambda x: sharding_lib.constrain({'x': x}, mesh, *dims)['x'])
  assert constrained(jnp.zeros(shape)).sharding.is_equivalent_to(whole, len(shape))


def test_rules_name_axes_of_the_mesh():
  axes = make_mesh(2, 4).axis_names
  used = {name: rule for name, rule in sharding_lib.RULES.items() if rule is not None}
  assert used == {'batch': axes, 'expert': 'expert'}


@pytest.mark.parametrize('dims', [('bacth',), ('layers', 'experts'), ('batch', 'data')])
def test_name_without_a_rule_is_an_error(dims):
  mesh = make_mesh(1, 1, jax.devices()[:1])
  calls = [
    lambda: sharding_lib.spec(*dims),
    lambda: sharding_lib.named_shardings(mesh, {'w': PartitionSpec(*dims)}),
    lambda: sharding_lib.stacked(sharding_lib.replicated(mesh), dims[-1]),
  ]
  for call in calls:
    with pytest.raises(ValueError, match=f'no rule for dimension {dims[-1]!r}'):
      call()


def test_batch_is_split_over_both_axes():
  mesh = make_mesh(2, 4)
  rows = jax.device_put(jnp.arange(16).reshape(16, 1), sharding_lib.batch_sharding(mesh))
  starts = {shard.device: int(shard.data[0, 0]) for shard in rows.addressable_shards}
  # Two rows on each device, in the order of the mesh.
  assert [starts[device] for device in mesh.devices.flat] == list(range(0, 16, 2))
  whole = jax.device_put(rows, sharding_lib.replicated(mesh))
  for shard in whole.addressable_shards:
    np.testing.assert_array_equal(shard.data, rows)


def test_shardings_made_from_shardings():
  mesh = make_mesh(2, 4)
  dims_of = {'w': PartitionSpec('expert', 'embed', 'mlp'), 'copied': PartitionSpec()}
  params = sharding_lib.named_shardings(mesh, dims_of)
  assert params['w'] == sharding_lib.sharding(mesh, 'expert', None, None)
  assert params['copied'] == sharding_lib.replicated(mesh)
  in_trials = sharding_lib.stacked(params, 'trials')
  assert in_trials['w'].shard_shape((3, 8, 5, 7)) == (3, 2, 5, 7)
  assert in_trials['copied'].shard_shape((3, 8)) == (3, 8)
  # A statistic of one number per expert, and one of a single number.
  assert sharding_lib.leading_dims_sharding(params['w'], 1).shard_shape((8,)) == (2,)
  assert sharding_lib.leading_dims_sharding(params['w'], 0).shard_shape(()) == ()


@pytest.mark.parametrize(
  ('sizes', 'has_layers', 'wanted'),
  [
    ((2, 4), False, PartitionSpec(('expert',))),
    ((2, 4), True, PartitionSpec(None, ('expert',))),
    # A data axis of one device is named too, or JAX inserts a sum over it.
    ((1, 8), False, PartitionSpec(('data', 'expert'))),
    ((1, 8), True, PartitionSpec(None, ('data', 'expert'))),
    ((1, 1), False, PartitionSpec(('data', 'expert'))),
  ],
)
def test_experts_enter_the_layer_by_expert(sizes, has_layers, wanted):
  assert sharding_lib.expert_spec(make_mesh(*sizes), has_layers=has_layers) == wanted
