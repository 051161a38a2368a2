"""Joining the processes of a run, and starting together or not at all."""

import contextlib
import os
import socket
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.errors import UserError
from moe_jax.parallel import watch

_VARIABLES = ('MOE_JAX_COORDINATOR', 'MOE_JAX_NUM_PROCESSES', 'MOE_JAX_PROCESS_ID')
# JAX's own watch ends a process with a long trace; ours, which says more, shall come first.
_HEARTBEAT_SECONDS = 600
# What `srun` sets and JAX needs; `sbatch` and `salloc` by themselves set only some of them.
_SLURM = (
  'SLURM_JOB_ID',
  'SLURM_STEP_NODELIST',
  'SLURM_NTASKS',
  'SLURM_PROCID',
  'SLURM_LOCALID',
)


def join_processes() -> None:
  """Connects this process to the others of its run; does nothing for a run of one process.

  `MOE_JAX_COORDINATOR=host:port`, `MOE_JAX_NUM_PROCESSES=n` and `MOE_JAX_PROCESS_ID=i` name this
  process. `MOE_JAX_COORDINATOR=auto` lets JAX read the cluster's environment (Slurm, Open MPI, TPU
  pods, GKE). A process that then does not answer for `MOE_JAX_PEER_TIMEOUT` seconds (60) ends the
  others with exit code 75, see `watch`.

  Raises:
    UserError: if only some of the variables are set, one is not a number in range, the coordinator
      is no address, or `auto` finds no cluster.
  """
  coordinator = os.environ.get(_VARIABLES[0])
  if coordinator is None:
    for name in _VARIABLES[1:]:
      if name in os.environ:
        raise UserError(_VARIABLES[0], None, f'must be set, as {name} is')
    return
  timeout = watch.timeout_seconds()
  if coordinator == 'auto':
    _join_by_environment()
  else:
    _join_by_name(coordinator)
  if jax.process_count() > 1:
    watch.start(timeout)


def _join_by_name(coordinator: str) -> None:
  """Joins as the three variables say."""
  _check_address(coordinator)
  count, index = (_number(name) for name in _VARIABLES[1:])
  if not count:
    raise UserError(_VARIABLES[1], count, 'must be at least 1')
  if index >= count:
    raise UserError(_VARIABLES[2], index, f'must be in 0..{count - 1}')
  try:
    jax.distributed.initialize(
      coordinator, count, index, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
    )
  except RuntimeError as error:
    raise UserError(_VARIABLES[0], coordinator, f'cannot be used: {error}') from error


def _join_by_environment() -> None:
  """Joins by what the scheduler set, as JAX reads it.

  Raises:
    UserError: if there is no scheduler's environment, or it is not whole.
  """
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  # A scheduler that JAX doesn't find, or whose variables it can't read.
  except (ValueError, TypeError, LookupError, RuntimeError) as error:
    missing = [name for name in _SLURM if not os.environ.get(name)]
    if not missing:
      for name in _SLURM[2:]:
        _number(name)
    reason = f'found no cluster to join ({error})'
    if missing and len(missing) < len(_SLURM):
      reason = f'Slurm did not set {", ".join(missing)}: start each process by srun'
    raise UserError(
      _VARIABLES[0],
      'auto',
      f'{reason}; or set host:port, {_VARIABLES[1]} and {_VARIABLES[2]}; or unset it for a run of '
      'one process',
    ) from error


def _check_address(coordinator: str) -> None:
  """Raises UserError unless the text is host:port of a host that is known here."""
  host, _, port = coordinator.rpartition(':')
  if not host or not _is_number(port) or not 0 < int(port) < 2**16:
    raise UserError(_VARIABLES[0], coordinator, 'must be host:port or auto; port in 1..65535')
  try:
    socket.getaddrinfo(host.strip('[]'), int(port))
  except (OSError, UnicodeError) as error:
    raise UserError(_VARIABLES[0], coordinator, f'no such host: {error}') from error


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
  """Continues after the body only if it raised in no process.

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


def _is_number(text: str) -> bool:
  # Not only isdigit or isdecimal: they take digits of any script, superscripts included.
  return text.isascii() and text.isdecimal()


def _number(name: str) -> int:
  value = os.environ.get(name)
  if value is None or not _is_number(value) or len(value) > 9:
    raise UserError(name, value, 'must be a number; it places this process in the run')
  return int(value)
