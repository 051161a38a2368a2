"""The lock on the directory of a run: two processes never write into one."""

import contextlib
import fcntl
import pathlib
import time
from collections.abc import Iterator
from typing import IO

from moe_jax.errors import UserError
from moe_jax.files import is_incomplete
from moe_jax.run.manifest import MANIFEST, holds_run
from moe_jax.run.manifest_kinds import LOCK

# Left by a run that was stopped before its manifest was written; the last by earlier versions.
_BEGINNINGS = (LOCK, 'checkpoints', 'tokenizer', 'manifest.tmp')


def hold(lock: IO[str]) -> None:
  """Locks a file; tries twice, as `moe_jax.runs` holds it for a moment to see whether it is free.

  Raises:
    OSError: if another process holds it.
  """
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    time.sleep(0.1)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[None]:
  """Makes the directory and holds it, so that two runs never write into one.

  A directory that this made, and into which nothing was written, is removed again.

  Raises:
    UserError: if it can't be written, holds something that is not a run, or is held.
  """
  path = pathlib.Path(workdir)
  try:
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    had_lock = (path / LOCK).exists()
    lock = open(path / LOCK, 'w')  # noqa: SIM115
  except OSError as error:
    raise UserError('workdir', workdir, f'cannot be written: {error.strerror}') from error
  with lock:
    try:
      hold(lock)
    except OSError as error:
      raise UserError('workdir', workdir, 'another process is writing this run') from error
    try:
      names = [entry.name for entry in path.iterdir()]
      foreign = [n for n in names if n not in _BEGINNINGS and not is_incomplete(n)]
      if foreign and not holds_run(workdir):
        raise UserError('workdir', workdir, f'holds {foreign[0]!r} but no run; use an empty one')
      yield
    finally:
      if not (path / MANIFEST).exists() and not had_lock:
        (path / LOCK).unlink(missing_ok=True)
        if new and not any(path.iterdir()):
          path.rmdir()
