"""`launch/compile_tpu.py`, for the devices that are here: other compilers are not."""

import runpy

import jax

from moe_jax.benchmark.harness.shape import Shape
from moe_jax.dispatch import exchange
from tests import tiny
from tests.layers import ragged_stand_in

SCRIPT = runpy.run_path(str(tiny.REPOSITORY / 'launch' / 'compile_tpu.py'))


SHAPE = Shape(256, 16, 16, 2, 1.25, 'swiglu', 'bfloat16')


def test_says_what_each_dispatcher_exchanges():
  lines = list(SCRIPT['lines'](jax.devices(), SHAPE, 8, 8))
  # CPUs have no ragged exchange.
  assert [line.split(': ')[0] for line in lines] == [
    'cpu, mesh 1 x 1, gather padded',
    'cpu, mesh 1 x 1, dropless padded',
    'cpu, mesh 2 x 4, gather padded',
    'cpu, mesh 2 x 4, dropless padded',
  ]
  # Two forward and two backward; none on one device.
  assert ' 0 padded and 0 ragged ' in lines[0] and ' 4 padded and 0 ragged ' in lines[2]


def test_compiles_the_ragged_exchange_where_there_is_one(monkeypatch):
  monkeypatch.setattr(exchange, 'RAGGED_PLATFORMS', ('cpu',))
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged_stand_in.ragged_all_to_all)
  lines = list(SCRIPT['lines'](jax.devices()[:2], SHAPE, 8, 8))
  assert [line.split(': ')[0] for line in lines[2:]] == [
    'cpu, mesh 1 x 2, gather padded',
    'cpu, mesh 1 x 2, gather ragged',
    'cpu, mesh 1 x 2, dropless padded',
    'cpu, mesh 1 x 2, dropless ragged',
  ]
  # The stand-in is of gathers; the numbers of rows are exchanged once.
  assert ' 1 padded and 0 ragged ' in lines[3]
