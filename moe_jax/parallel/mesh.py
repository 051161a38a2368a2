"""The device mesh and its axes; `sharding` has the rules by which arrays lie on it.

                 expert ->
          +--------+--------+--------+--------+
   data   | dev 0  | dev 1  | dev 2  | dev 3  |     batch:   split over data AND expert
    |     |  e 0,1 |  e 2,3 |  e 4,5 |  e 6,7 |     experts: split over expert, copied over data
    v     +--------+--------+--------+--------+     others:  copied to every device
          | dev 4  | dev 5  | dev 6  | dev 7  |
          |  e 0,1 |  e 2,3 |  e 4,5 |  e 6,7 |     (data=2, expert=4, E=8)
          +--------+--------+--------+--------+

Every device holds its own tokens: the expert axis is a data axis too, outside the experts.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

DATA_AXIS = 'data'
EXPERT_AXIS = 'expert'
BATCH_AXES = (DATA_AXIS, EXPERT_AXIS)


def make_mesh(data: int, expert: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with axes ('data', 'expert') over exactly data * expert devices.

  Args:
    data: replicas of each expert.
    expert: devices that the experts are split over.
    devices: the first data * expert of these; all devices of all processes by default.

  Raises:
    ValueError: if the mesh needs more devices than there are. It is never made smaller to fit.
  """
  devices = list(jax.devices() if devices is None else devices)
  needed = data * expert
  if data < 1 or expert < 1 or needed > len(devices):
    raise ValueError(
      f'mesh data={data}, expert={expert}: needs {needed} devices, found {len(devices)}'
    )
  return jax.make_mesh(
    (data, expert),
    (DATA_AXIS, EXPERT_AXIS),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[:needed],
  )
