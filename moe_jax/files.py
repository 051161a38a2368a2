"""Files that are written whole or not at all."""

import contextlib
import json
import os
import uuid
from typing import Any

_INCOMPLETE = '.incomplete-'


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file whole: after a crash it has its old content or all of the new.

  The content is on disk under a name of its own before it replaces the old one, and the
  folder is on disk before this returns. A link stays a link: its target is replaced.

  Args:
    path: of the file; its folder must exist.
    content: all of it; text becomes UTF-8, its line ends unchanged.

  Raises:
    OSError: naming the path, if it cannot be written, as on a full disk. The old file is as it was,
      and nothing else is left in the folder.
  """
  target = os.path.realpath(path)
  folder = os.path.dirname(target)
  # Another process may be writing the same file, so the name is no other's.
  temporary = os.path.join(folder, f'{_INCOMPLETE}{uuid.uuid4().hex}')
  try:
    with open(temporary, 'xb') as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, target)
  except BaseException as error:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    if isinstance(error, OSError):
      raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    raise
  _sync_folder(folder)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes a result whole or not at all, as indented JSON with sorted keys."""
  write_atomically(path, json.dumps(value, indent=2, sort_keys=True))


def _sync_folder(folder: str) -> None:
  """Puts the names of a folder on disk; what is in its files is not part of that."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def is_incomplete(name: str) -> bool:
  """Returns True for the name that `write_atomically` leaves if its process is killed."""
  return name.startswith(_INCOMPLETE)
