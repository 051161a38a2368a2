"""Joining the processes of a run, and starting together or not at all."""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import UserError

_VARIABLES = ('MOE_JAX_COORDINATOR', 'MOE_JAX_NUM_PROCESSES', 'MOE_JAX_PROCESS_ID')


def join_processes() -> None:
  """Connects this process to the others of its run; does nothing for a run of one process.

  `MOE_JAX_COORDINATOR=host:port`, `MOE_JAX_NUM_PROCESSES=n` and `MOE_JAX_PROCESS_ID=i` name the
  place of this process. `MOE_JAX_COORDINATOR=auto` lets JAX read the cluster's environment (Slurm,
  Open MPI, TPU pods, GKE).

  Raises:
    UserError: if only some of the variables are set, or one is not a number in range.
  """
  coordinator = os.environ.get(_VARIABLES[0])
  if coordinator is None:
    for name in _VARIABLES[1:]:
      if name in os.environ:
        raise UserError(_VARIABLES[0], None, f'must be set, as {name} is')
    return
  if coordinator == 'auto':
    jax.distributed.initialize()
    return
  count, index = (_number(name) for name in _VARIABLES[1:])
  if not 0 <= index < count:
    raise UserError(_VARIABLES[2], index, f'must be in 0..{count - 1}')
  jax.distributed.initialize(coordinator, count, index)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """Goes on after the body only if it raised in no process.

  Where one process stops, the others would wait for it in their first sum, for ever. Not for a body
  that itself waits for other processes.

  Raises:
    UserError: in the processes whose own body went well, when another's did not.
  """
  if jax.process_count() == 1:
    yield
    return
  went_wrong = True
  try:
    yield
    went_wrong = False
  finally:
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(went_wrong)))
  if failed.size:
    raise UserError('process', int(failed[0]), 'could not start; its own error line says why')


def _number(name: str) -> int:
  value = os.environ.get(name)
  if value is None or not value.isdigit():
    raise UserError(name, value, 'must be a number; it places this process in the run')
  return int(value)
