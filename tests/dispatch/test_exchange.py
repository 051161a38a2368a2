"""The exchange between devices against a NumPy simulation that moves blocks one by one."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import dispatch
from moe_jax.parallel.mesh import BATCH_AXES, EXPERT_AXIS, make_mesh

MESHES = [(1, 1), (1, 4), (2, 2), (2, 4), (1, 8), (8, 1)]
NUM_EXPERTS = 8


def buffers(data, expert):
  """One buffer [E, G, C, D] for each device; every number says where it comes from."""
  shape = (data, expert, NUM_EXPERTS, 2, 3, 1)
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def exchanged(sent):
  """Device (i, j) receives from every device (i, j') of its row the slots of its own experts."""
  data, expert, *_ = sent.shape
  each = NUM_EXPERTS // expert
  received = []
  for i in range(data):
    for j in range(expert):
      mine = slice(j * each, (j + 1) * each)
      blocks = [sent[i, sender, mine] for sender in range(expert)]
      received.append(np.concatenate(blocks, axis=1))
  return np.stack(received).reshape(data, expert, each, 2 * expert, 3, 1)


@pytest.mark.parametrize(('data', 'expert'), MESHES)
def test_to_experts_and_back(data, expert):
  mesh = make_mesh(data, expert)
  sent = buffers(data, expert)
  spec = PartitionSpec(*BATCH_AXES)

  def exchange(blocks):
    there = dispatch.to_experts(blocks[0, 0], EXPERT_AXIS)
    back = dispatch.from_experts(there, EXPERT_AXIS)
    return there[None, None], back[None, None]

  there, back = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec))(sent)
  np.testing.assert_array_equal(there, exchanged(sent))
  np.testing.assert_array_equal(back, sent)
