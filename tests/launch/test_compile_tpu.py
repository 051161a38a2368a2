"""`launch/compile_tpu.py`, for the devices that are here: other compilers are not."""

import runpy

from moe_jax.benchmark.arms import Shape
from tests import tiny

SCRIPT = runpy.run_path(str(tiny.REPOSITORY / 'launch' / 'compile_tpu.py'))


def test_says_what_each_dispatcher_exchanges():
  import jax

  shape = Shape(256, 16, 16, 2, 1.25, 'swiglu', 'bfloat16')
  lines = list(SCRIPT['lines'](jax.devices(), shape, 8, 8))
  assert [line.split(': ')[0] for line in lines] == [
    'cpu, mesh 1 x 1, gather',
    'cpu, mesh 1 x 1, dropless',
    'cpu, mesh 2 x 4, gather',
    'cpu, mesh 2 x 4, dropless',
  ]
  # Two forward and two backward; none on one device.
  assert ' 0 exchanges' in lines[0] and ' 4 exchanges' in lines[2]
