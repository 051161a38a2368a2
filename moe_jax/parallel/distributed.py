"""Joining the processes of a run: by the cluster's own environment, or by four variables."""

import os

import jax

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


def _number(name: str) -> int:
  value = os.environ.get(name)
  if value is None or not value.isdigit():
    raise UserError(name, value, 'must be a number; it places this process in the run')
  return int(value)
