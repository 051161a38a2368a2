"""Files written whole: what is left when a write fails, and the order of what reaches the disk."""

import errno
import os
import pathlib
import stat

import pytest

import moe_jax
from moe_jax.files import is_incomplete, write_atomically

OLD, NEW = 'old: \u00e4\n', 'new: \u00f6\r\n'


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'result.json'
  path.write_text(OLD, encoding='utf-8')
  return path


def fail(*unused_arguments):
  raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('content', [NEW, NEW.encode()])
def test_replaces_a_file_and_leaves_nothing_else(path, content):
  write_atomically(path, content)
  assert path.read_bytes() == NEW.encode()
  assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize('call', ['fsync', 'replace'])
@pytest.mark.parametrize('exists', [True, False])
def test_full_disk_leaves_the_old_file(path, monkeypatch, call, exists):
  if not exists:
    path.unlink()
  monkeypatch.setattr(os, call, fail)
  with pytest.raises(OSError, match='No space left on device') as caught:
    write_atomically(path, NEW)
  # The name that was asked to be written, not that of the temporary file.
  assert caught.value.filename == str(path)
  assert caught.value.errno == errno.ENOSPC
  assert os.listdir(path.parent) == [path.name] * exists
  if exists:
    assert path.read_text(encoding='utf-8') == OLD


def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(path, monkeypatch):
  calls = []
  sync, replace = os.fsync, os.replace

  def recorded_sync(descriptor):
    kind = 'folder' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file'
    calls.append(f'{kind} with {path.read_text(encoding="utf-8").split(":")[0]}')
    sync(descriptor)

  def recorded_replace(source, target):
    calls.append('replace')
    assert is_incomplete(os.path.basename(source))
    replace(source, target)

  monkeypatch.setattr(os, 'fsync', recorded_sync)
  monkeypatch.setattr(os, 'replace', recorded_replace)
  write_atomically(path, NEW)
  assert calls == ['file with old', 'replace', 'folder with new']


def test_interrupt_leaves_the_old_file(path, monkeypatch):
  def interrupt(*unused_arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'fsync', interrupt)
  with pytest.raises(KeyboardInterrupt):
    write_atomically(path, NEW)
  assert path.read_text(encoding='utf-8') == OLD
  assert os.listdir(path.parent) == [path.name]


def test_link_stays_a_link(path):
  link = path.with_name('link')
  link.symlink_to(path.name)
  write_atomically(link, NEW)
  assert link.is_symlink()
  assert path.read_bytes() == NEW.encode()


def test_new_file_has_the_permissions_of_any_other(path):
  other = path.with_name('other')
  other.touch()
  write_atomically(path, NEW)
  assert path.stat().st_mode == other.stat().st_mode


def test_missing_folder_is_named(tmp_path):
  with pytest.raises(FileNotFoundError) as caught:
    write_atomically(tmp_path / 'none' / 'a.txt', NEW)
  assert caught.value.filename == str(tmp_path / 'none' / 'a.txt')


def test_no_other_module_replaces_files():
  """Whole folders are renamed, and a download takes the name of its file; nothing else is."""
  found = set()
  root = pathlib.Path(moe_jax.__file__).parent
  for module in root.rglob('*.py'):
    text = module.read_text(encoding='utf-8')
    if any(call in text for call in ('os.replace(', '.write_text(', '.write_bytes(', '.fsync(')):
      found.add(str(module.relative_to(root)))
  assert found == {'files.py', 'data/packages.py'}
