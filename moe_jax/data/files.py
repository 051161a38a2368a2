"""Directories that are whole or absent, locks between processes, checksums of files."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from moe_jax import errors


def make_directory(path: str) -> None:
  """Makes a directory and its parents.

  Raises:
    errors.UserError: if it can't be made or written to; names the path.
  """
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      'data.data_dir', path, f'must be a writable directory ({error.strerror})'
    ) from error
  if not os.access(path, os.W_OK | os.X_OK):
    raise errors.UserError(
      'data.data_dir', path, 'must be a writable directory (permission denied)'
    )


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
  """Holds an exclusive lock between processes while the body runs; waits for it.

  The kernel drops the lock when its holder dies, so a killed process never blocks the next one.
  The lock file itself stays: removing it would let two processes lock two different files.
  """
  make_directory(os.path.dirname(path))
  with open(path, 'a') as lock_file:
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def atomic_directory(path: str) -> Iterator[str]:
  """Gives a temporary directory that becomes `path` when the body succeeds.

  An older `path` is replaced. Call it while holding a lock: what other, killed writers of the same
  path left behind is removed first.
  """
  parent, name = os.path.split(path)
  make_directory(parent)
  prefix = f'.{name}.incomplete-'
  for entry in os.listdir(parent):
    if entry.startswith(prefix):
      shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)
  temporary = tempfile.mkdtemp(prefix=prefix, dir=parent)
  # mkdtemp makes it private to this user; a data directory is often shared by a group.
  os.chmod(temporary, 0o755)
  try:
    yield temporary
    if os.path.isdir(path):
      shutil.rmtree(path)
    os.rename(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def sha256_file(path: str) -> str:
  """Returns the SHA-256 of a file's content, as 64 hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
