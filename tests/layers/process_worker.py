"""One of several processes that compute the cases of `test_moe_meshes` together.

python -m tests.layers.process_worker FILE, with the variables of `join_processes`; process 0 writes
the flattened results of every capacity factor into FILE.
"""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.parallel.distributed import join_processes


def main(path):
  join_processes()
  # After joining: importing the test makes arrays, which starts the backend.
  from tests.layers import test_moe_meshes

  def fetch(array):
    return multihost_utils.process_allgather(array, tiled=True)

  arrays = {}
  for capacity_factor in test_moe_meshes.CAPACITY_FACTORS:
    outcome = test_moe_meshes.compute(2, 4, capacity_factor, fetch)
    for i, leaf in enumerate(jax.tree.leaves(outcome)):
      arrays[f'{capacity_factor}/{i}'] = leaf
  if jax.process_index() == 0:
    np.savez(path, **arrays)


if __name__ == '__main__':
  main(sys.argv[1])
