"""Two processes of four devices give the result of one device: all policies, both dispatchers."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.layers import test_moe_meshes


def start(index, port, path):
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0',
    'JAX_PLATFORMS': 'cpu',
    'MOE_JAX_COORDINATOR': f'localhost:{port}',
    'MOE_JAX_NUM_PROCESSES': '2',
    'MOE_JAX_PROCESS_ID': str(index),
  }
  command = [sys.executable, '-m', 'tests.layers.process_worker', str(path)]
  return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_device(tmp_path):
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    port = probe.getsockname()[1]
  path = tmp_path / 'results.npz'
  workers = [start(index, port, path) for index in range(2)]
  errors = [worker.communicate(timeout=900)[1] for worker in workers]
  assert [worker.returncode for worker in workers] == [0, 0], errors
  saved = np.load(path)
  one_device = test_moe_meshes.compute_all(1, 1)
  for capacity_factor, outcome in one_device.items():
    leaves, shape = jax.tree.flatten(outcome)
    together = shape.unflatten([saved[f'{capacity_factor}/{i}'] for i in range(len(leaves))])
    for case in test_moe_meshes.CASES:
      test_moe_meshes.check_same(together[case], outcome[case])
