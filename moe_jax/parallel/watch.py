"""Detection of a process of a run that no longer answers.

A process that was stopped, or whose machine is gone, lets all others wait in their next sum. JAX
ends them with a trace of the one that waits. Here each process counts up a number of its own in
JAX's key-value store, and ends with one line that names those that stopped.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax.errors import UserError

TIMEOUT = 'MOE_JAX_PEER_TIMEOUT'
_SECONDS = 60
# A process of the run is lost, the run is not: the same command continues it.
LOST_EXIT_CODE = 75
_KEY = 'moe_jax/alive/'


class Watch:
  """The last sign of life of each other process, by the clock of this one."""

  def __init__(self, index: int, count: int, timeout: float, now: float):
    """Begins at a time, in seconds, as if all had just been heard of."""
    self._timeout = timeout
    self._said: dict[int, str] = {}
    self._heard = {i: now for i in range(count) if i != index}
    self._looked = now

  def look(self, said: Mapping[int, str] | None, now: float) -> list[int]:
    """Takes the last count of each process, and returns those that have been silent for too long.

    Args:
      said: by process; None if the store, which process 0 keeps, did not answer.
      now: in seconds.
    """
    if now - self._looked > self._timeout / 2:
      # It was this process that was stopped for a while.
      self._heard = dict.fromkeys(self._heard, now)
    self._looked = now
    if said is not None:
      for other in self._heard:
        # The store is kept by process 0, so it is there as long as the store answers.
        if other == 0 or self._said.get(other) != said.get(other):
          self._heard[other] = now
      self._said = dict(said)
    silent = [other for other, then in self._heard.items() if now - then > self._timeout]
    # Without the store nothing is known of any process.
    return [0] if 0 in silent else silent


def timeout_seconds() -> float:
  """Returns after how many seconds a silent process is given up.

  Raises:
    UserError: if `MOE_JAX_PEER_TIMEOUT` is not a whole number of at least 10.
  """
  value = os.environ.get(TIMEOUT, str(_SECONDS))
  if not value.isascii() or not value.isdecimal() or len(value) > 6 or int(value) < 10:
    raise UserError(TIMEOUT, value, 'must be seconds, at least 10')
  return float(value)


def start(timeout: float) -> None:
  """Watches the other processes from now on; ends this one when one of them is silent too long."""
  from jax._src import distributed  # The key-value store has no public name.

  client: Any = distributed.global_state.client
  index, count = jax.process_index(), jax.process_count()
  latest: list[Mapping[int, str] | None] = [None]

  def beat() -> None:
    number = 0
    while True:
      number += 1
      try:
        client.key_value_set(f'{_KEY}{index}', str(number), allow_overwrite=True)
        said = client.key_value_dir_get(_KEY)
        latest[0] = {int(key.rpartition('/')[2]): value for key, value in said}
      except RuntimeError:
        latest[0] = None
      time.sleep(timeout / 10)

  def look() -> None:
    watch = Watch(index, count, timeout, time.monotonic())
    while True:
      time.sleep(timeout / 10)
      # Taken once: a store that hangs gives nothing new.
      said, latest[0] = latest[0], None
      silent = watch.look(said, time.monotonic())
      if silent:
        give_up(silent, count, timeout, os._exit)

  for target in (beat, look):
    threading.Thread(target=target, name=f'moe_jax {target.__name__}', daemon=True).start()


def give_up(silent: list[int], count: int, timeout: float, end: Callable[[int], Any]) -> None:
  """Names who does not answer and ends the process; the main thread waits in a sum, for ever."""
  names = ' and '.join(f'process {other}' for other in silent)
  verb = 'does' if len(silent) == 1 else 'do'
  _end(
    f'{names} of {count} {verb} not answer for {timeout:.0f} s ({TIMEOUT}): stopped, or its '
    'machine is lost',
    end,
  )


def connection_lost(count: int) -> None:
  """Ends this process when a sum found that another was killed.

  At once: leaving as usual would wait for the others.
  """
  _end(f'another of the {count} processes has ended, or its machine is lost', os._exit)


def _end(what: str, end: Callable[[int], Any]) -> None:
  sys.stdout.flush()
  print(
    f'\nerror: {what}; the same command goes on from the last checkpoint',
    file=sys.stderr,
    flush=True,
  )
  end(LOST_EXIT_CODE)
