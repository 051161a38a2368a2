"""Finds the files below a folder, links included, each once and in a finite time."""

import dataclasses
import os
from collections.abc import Callable, Sequence

# Files there are windows onto the kernel: of no length, without end, or the whole disk again.
_SPECIAL = ('/proc', '/sys', '/dev')
_MEMORY_DISK = '/dev/shm'


@dataclasses.dataclass
class Walk:
  """The result of a walk.

  Attributes:
    files: path by path relative to the root.
    left_out: relative paths of links that were not followed, in order.
  """

  files: dict[str, str]
  left_out: list[str]


def walk(root: str, suffixes: Sequence[str], to_error: Callable[[str], Exception]) -> Walk:
  """Finds the files with one of the suffixes; passes over hidden files and folders.

  The folders that lie below the root come first, then those that links point to, in the order of
  their relative paths. A link is left out, and listed, where its target is already read under
  another name: a folder that was walked, a folder that contains the root (else the link would bring
  in the root's neighbours and the root again), or a file of the walk. So a circle of links ends.
  Two links to one file outside are two files: stores of content share files like that.

  Args:
    root: the folder.
    suffixes: of the files to find.
    to_error: makes an exception of a sentence that starts with the path.

  Raises:
    What `to_error` makes: if a folder can't be listed, or lies in /proc, /sys or /dev.
  """
  state = _State(os.path.realpath(root), tuple(suffixes), to_error)
  state.walk_tree('', root)
  while state.links:
    relative, path = state.links.pop(0)
    state.follow(relative, path)
  links = {name: path for name, path in sorted(state.files.items()) if os.path.islink(path)}
  real = {os.path.realpath(path) for name, path in state.files.items() if name not in links}
  for relative, path in links.items():
    if os.path.realpath(path) in real:
      del state.files[relative]
      state.left_out.append(relative)
  return Walk(state.files, sorted(state.left_out))


class _State:
  """State of a walk in progress."""

  def __init__(
    self, real_root: str, suffixes: tuple[str, ...], to_error: Callable[[str], Exception]
  ):
    self._real_root = real_root
    self._suffixes = suffixes
    self._to_error = to_error
    self._walked: set[str] = set()
    self.files: dict[str, str] = {}
    self.links: list[tuple[str, str]] = []
    self.left_out: list[str] = []

  def walk_tree(self, relative: str, path: str) -> None:
    """Walks a folder and the folders in it; keeps links to folders for later."""
    links, folders = [], [(relative, path, os.path.realpath(path))]
    while folders:
      relative, path, real = folders.pop()
      if _lies_in(real, _SPECIAL) and not _lies_in(real, (_MEMORY_DISK,)):
        raise self._to_error(f'{path} is part of the system, not a folder of text')
      if real in self._walked:
        self.left_out.append(relative)
        continue
      self._walked.add(real)
      for entry in self._list(path):
        inner = os.path.join(relative, entry.name)
        if entry.name.startswith('.'):
          continue
        if entry.is_dir(follow_symlinks=False):
          folders.append((inner, entry.path, os.path.join(real, entry.name)))
        # Not entry.is_dir(), which raises for a link to itself.
        elif entry.is_symlink() and os.path.isdir(entry.path):
          links.append((inner, entry.path))
        elif entry.name.endswith(self._suffixes):
          self.files[inner] = entry.path
    self.links += sorted(links)

  def follow(self, relative: str, path: str) -> None:
    """Walks the folder that a link points to, unless that is read anyway."""
    real = os.path.realpath(path)
    if real in self._walked or _lies_in(self._real_root, (real,)):
      self.left_out.append(relative)
    else:
      self.walk_tree(relative, path)

  def _list(self, path: str) -> list[os.DirEntry[str]]:
    try:
      with os.scandir(path) as entries:
        return list(entries)
    except OSError as error:
      raise self._to_error(f'{path} cannot be read ({error.strerror})') from error


def _lies_in(path: str, folders: Sequence[str]) -> bool:
  return any(path == folder or path.startswith(folder.rstrip('/') + '/') for folder in folders)
