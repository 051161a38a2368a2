"""The mesh has exactly the devices requested, or is an error."""

import jax
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
