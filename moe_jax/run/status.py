"""Progress of a run and the process that holds it, read from its files without slow imports."""

import fcntl
import json
import os
import pathlib
from typing import Any

from moe_jax.run.manifest_kinds import LOCK

# Of a run whose manifest says that it is running: whether a process does hold it.
RUNNING, STOPPED, UNFINISHED = 'running', 'stopped', 'unfinished'


def who_holds(run: pathlib.Path) -> str:
  """Returns whether the lock of a run is held: running, stopped, or unfinished if none can tell."""
  held = is_held(run / LOCK)
  # No lock, as in a copy; or a file system that has none.
  return UNFINISHED if held is None else RUNNING if held else STOPPED


def is_held(lock: pathlib.Path) -> bool | None:
  """Returns whether a process holds a lock; None if that can't be known."""
  try:
    with open(lock, 'rb') as file:
      # Shared and for a moment: two listings don't disturb each other, and a run that begins
      # meanwhile tries again.
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    return None
  return False


def last_loss(path: pathlib.Path) -> tuple[int | None, float | None]:
  """Returns step and loss of the last whole line of training; reads no more than needed."""
  if not path.is_file():
    return None, None
  try:
    with open(path, 'rb') as file:
      end = file.seek(0, os.SEEK_END)
      size = 1 << 16
      while True:
        start = max(0, end - size)
        file.seek(start)
        lines = file.read(end - start).split(b'\n')
        # The first may have begun earlier.
        for line in reversed(lines[1 if start else 0 :]):
          found = _loss_of(line)
          if found is not None:
            return found
        if not start:
          return None, None
        size *= 4
  except OSError:
    return None, None


def _loss_of(line: bytes) -> tuple[int | None, float] | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or record.get('split') != 'train':
    return None
  loss, step = number(record.get('loss')), record.get('step')
  return None if loss is None else (step if type(step) is int else None, loss)


def number(value: Any) -> float | None:
  """Returns a number of JSON as a float; None if it is none, or too large."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  try:
    return float(value)
  except OverflowError:
    return None
