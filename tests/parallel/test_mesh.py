"""The mesh is what was asked for or an error; the rules put only experts and batch on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from moe_jax.parallel import mesh as mesh_lib


@pytest.mark.parametrize(('data', 'expert'), [(1, 1), (2, 4), (8, 1), (1, 8), (1, 2)])
def test_has_exactly_the_devices_asked_for(data, expert):
  mesh = mesh_lib.make_mesh(data, expert)
  assert dict(mesh.shape) == {'data': data, 'expert': expert}
  assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
  assert len(set(mesh.devices.flat)) == data * expert


def test_takes_the_first_of_the_devices_given():
  devices = jax.devices()[::-1]
  mesh = mesh_lib.make_mesh(1, 2, devices)
  assert set(mesh.devices.flat) == set(devices[:2])


@pytest.mark.parametrize(('data', 'expert'), [(2, 8), (16, 1), (0, 1), (1, -1)])
def test_is_never_made_smaller_to_fit(data, expert):
  with pytest.raises(ValueError, match=f'data={data}, expert={expert}.*found 8'):
    mesh_lib.make_mesh(data, expert)


def test_batch_is_split_over_both_axes():
  mesh = mesh_lib.make_mesh(2, 4)
  rows = jax.device_put(jnp.arange(16).reshape(16, 1), mesh_lib.batch_sharding(mesh))
  starts = [int(shard.data[0, 0]) for shard in rows.addressable_shards]
  assert sorted(starts) == list(range(0, 16, 2))
  whole = jax.device_put(rows, mesh_lib.replicated(mesh))
  for shard in whole.addressable_shards:
    np.testing.assert_array_equal(shard.data, rows)


def test_rules_name_axes_of_the_mesh():
  rules = dict(mesh_lib.LOGICAL_RULES)
  assert len(rules) == len(mesh_lib.LOGICAL_RULES)
  assert {name: axes for name, axes in rules.items() if axes is not None} == {
    'batch': ('data', 'expert'),
    'expert': 'expert',
  }
