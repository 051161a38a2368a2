"""A user's own text: every file once, nothing that is not text, and one line on what is wrong."""

import json
import os
import pathlib
import shutil
import socket

import pytest

from moe_jax import data, errors
from moe_jax.data import file_walk, local_text


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'own' / 'a').mkdir(parents=True)
  (tmp_path / 'own' / 'b').mkdir()
  (tmp_path / 'own' / 'a' / 'x.txt').write_text('The text x.\n')
  (tmp_path / 'own' / 'b' / 'y.txt').write_text('The text y.\n')
  return tmp_path / 'own'


def read(folder):
  text = local_text.LocalText(str(folder), f'text:{folder}')
  return {document.name: document for document in text}, text.left_out


def test_many_or_large_files_are_announced_before_they_are_read(folder, monkeypatch):
  lines = []

  def said():
    lines.clear()
    local_text.LocalText(str(folder), 'text', lines.append)
    return lines

  (folder / 'b' / 'z.jsonl').write_bytes(b'{"text": "%s"}' % (b'x' * 1_999_964))
  assert said() == []
  monkeypatch.setattr(local_text, '_SILENT_FILES', 3)
  # 12 + 12 + 1,999,976 bytes.
  assert said() == [f'{folder}: reading 3 files, 2.0 MB']
  monkeypatch.setattr(local_text, '_SILENT_FILES', 4)
  monkeypatch.setattr(local_text, '_SILENT_BYTES', 2_000_000)
  assert said() == [f'{folder}: reading 3 files, 2.0 MB']
  monkeypatch.setattr(local_text, '_SILENT_BYTES', 2_000_001)
  monkeypatch.setattr(local_text.LocalText, '_read', lambda self, file: b'')
  assert said() == []
  monkeypatch.setattr(local_text, '_SILENT_BYTES', 1)
  monkeypatch.setattr(local_text.LocalText, '_read', lambda self, file: lines.append(file) or b'')
  assert said()[0].startswith(f'{folder}: reading') and len(lines) == 4


def _write(name, content):
  def change(folder):
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'wb') as file:
      file.write(content)

  return change


def _socket(folder):
  # The path of a socket is at most 107 bytes long.
  here = os.getcwd()
  os.chdir(folder)
  try:
    with socket.socket(socket.AF_UNIX) as made:
      made.bind('s.txt')
  finally:
    os.chdir(here)


def _link_to_proc(folder):
  shutil.rmtree(folder / 'b')
  (folder / 'b').symlink_to('/proc/1')


NESTED = b'[' * 20_000 + b']' * 20_000

DAMAGED = {
  'latin-1': (_write('b/bad.txt', b'good \xff bad'), r'b/bad.txt is not UTF-8 text \(byte 5\)'),
  'empty': (_write('b/empty.txt', b''), 'b/empty.txt is empty'),
  'blank': (_write('b/blank.txt', b' \n\n'), 'b/blank.txt is empty'),
  'short': (_write('b/short.txt', b'x'), 'b/short.txt is a document shorter than two tokens'),
  'cut JSON': (_write('a.jsonl', b'{"text": "fine"}\n{"text"\n'), 'a.jsonl:2 is not JSON'),
  'list': (_write('a.jsonl', b'["text"]\n'), 'a.jsonl:1 is not an object with a string "text"'),
  'number': (_write('a.jsonl', b'{"text": 3}\n'), 'a.jsonl:1 is not an object with a string'),
  'huge number': (
    _write('a.jsonl', b'{"text": ' + b'7' * 5000 + b'}\n'),
    'a.jsonl:1 is not an object with a string',
  ),
  'name': (_write('a.jsonl', b'{"text": "ab", "name": 3}'), 'a.jsonl:1 has a "name" that is not'),
  'no text': (_write('a.jsonl', b'{"text": ""}'), 'a.jsonl:1 is a document shorter than two'),
  **{
    f'surrogate in {key}': (
      _write('a.jsonl', json.dumps({'text': 'ab', key: '\ud800x'}).encode()),
      f'a.jsonl:1 holds half a surrogate pair in "{key}"',
    )
    for key in ('text', 'domain', 'name')
  },
  'nested': (_write('a.jsonl', b'\n' + NESTED), 'a.jsonl:2 is nested too deeply'),
  'nested in a record': (
    _write('a.jsonl', b'{"text": "ab", "more": ' + NESTED + b'}'),
    'a.jsonl:1 is nested too deeply',
  ),
  'name of a file': (_write(b'b/\xff.txt', b'text'), r"the name of 'b/\\udcff.txt' is not UTF-8"),
  'name of a folder': (_write(b'\xff/c.txt', b'text'), r"the name of '\\udcff/c.txt' is not UTF-8"),
  'FIFO': (lambda folder: os.mkfifo(folder / 'f.txt'), 'f.txt is not an ordinary file'),
  'device': (lambda folder: (folder / 'z.txt').symlink_to('/dev/zero'), 'z.txt is not an ordinary'),
  'socket': (_socket, 's.txt is not an ordinary file'),
  'link to /proc': (_link_to_proc, 'own/b is part of the system'),
  'link to nothing': (
    lambda folder: (folder / 'l.txt').symlink_to('nothing'),
    r'l.txt cannot be read \(No such file',
  ),
  'link to itself': (
    lambda folder: (folder / 'l.txt').symlink_to('l.txt'),
    r'l.txt cannot be read \(Too many levels',
  ),
  'nothing there': (shutil.rmtree, 'does not exist'),
  'nothing in it': (
    lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    'holds no .txt or .jsonl file',
  ),
}


@pytest.mark.usefixtures('no_hang')
@pytest.mark.parametrize(('change', 'message'), DAMAGED.values(), ids=DAMAGED)
def test_bad_text_names_the_file_and_leaves_no_store(folder, tmp_path, change, message):
  change(folder)
  name, data_dir = f'text:{folder}', str(tmp_path / 'data')
  for opened in (
    lambda: data.open_dataset(name, data_dir=data_dir),
    lambda: data.evaluation_dataset(name, data.ByteTokenizer(), data_dir, field='data.name'),
  ):
    with pytest.raises(errors.UserError, match=message) as error:
      opened()
    assert error.value.field == 'data.name'
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'data' / 'tokens').exists()


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('text:/proc/self', 'part of the system'),
    ('text:/proc/self/cmdline', 'is not a .txt or .jsonl file'),
    ('text:/dev', 'part of the system'),
    ('text:/dev/zero', 'is not a .txt or .jsonl file'),
    ('text:/tmp\0', 'must be a path in UTF-8'),
    ('text:/tmp/\udcff', 'must be a path in UTF-8'),
    ('text:~nobody_of_this_name/x', '~nobody_of_this_name is no home folder'),
  ],
)
def test_paths_that_hold_no_text(tmp_path, name, message):
  with pytest.raises(errors.UserError, match=message) as error:
    data.open_dataset(name, data_dir=str(tmp_path / 'data'))
  assert (error.value.field, error.value.value) == ('data.name', name)
  assert not (tmp_path / 'data').exists()


@pytest.mark.parametrize('data_dir', ['~nobody_of_this_name/x', 'a\0b', '\udcff'])
def test_data_dir_is_a_path(folder, tmp_path, monkeypatch, data_dir):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError) as error:
    data.open_dataset(f'text:{folder}', data_dir=data_dir)
  assert (error.value.field, error.value.value) == ('data.data_dir', data_dir)
  assert os.listdir(tmp_path) == ['own']


def test_tilde_is_the_home_folder(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(folder)
  dataset = data.open_dataset('text:~/own', data_dir='~/data')
  assert dataset.num_documents('train') == 2
  assert (tmp_path / 'data' / 'tokens').is_dir()
  assert sorted(os.listdir(folder)) == ['a', 'b']


def test_numbers_of_any_length_are_json(folder):
  record = b'{"text": "fine", "id": ' + b'-' + b'7' * 5000 + b', "x": NaN, "domain": "d"}'
  _write('a.jsonl', record)(folder)
  documents, _ = read(folder)
  assert (documents['a.jsonl:1'].text, documents['a.jsonl:1'].domain) == ('fine', 'd')


CIRCLES = {
  'to its parent': ([('a/up', '..')], ['a/up']),
  'to itself': ([('a/same', '.')], ['a/same']),
  'each other': ([('a/to_b', '../b'), ('b/to_a', '../a')], ['a/to_b', 'b/to_a']),
  'to what contains all': ([('b/out', '../..'), ('b/root', '/')], ['b/out', 'b/root']),
  'a second name': ([('c', 'b')], ['c']),
  # Sorts before what it points to, which keeps its own name and domain all the same.
  'an earlier name': ([('_', 'b'), ('A.txt', 'a/x.txt')], ['A.txt', '_']),
}


@pytest.mark.parametrize(('links', 'left_out'), CIRCLES.values(), ids=CIRCLES)
def test_what_links_repeat_is_read_once(folder, links, left_out):
  before = local_text.LocalText(str(folder), 'text').fingerprint
  for name, target in links:
    (folder / name).symlink_to(target)
  documents, found = read(folder)
  assert sorted(documents) == ['a/x.txt', 'b/y.txt']
  assert [documents[name].domain for name in sorted(documents)] == ['a', 'b']
  assert found == left_out
  assert local_text.LocalText(str(folder), 'text').fingerprint == before


def test_links_to_other_places_are_followed_and_circles_there_end(folder, tmp_path):
  other = tmp_path / 'other'
  (other / 'deep').mkdir(parents=True)
  (other / 'deep' / 'z.txt').write_text('The text z.\n')
  (other / 'deep' / 'back').symlink_to('..')
  (other / 'home').symlink_to(folder)
  (folder / 'c').symlink_to(other)
  (folder / 'd').symlink_to(other / 'deep')
  # Stores of content let many names share one file.
  (folder / 'e.txt').symlink_to(other / 'deep' / 'z.txt')
  documents, left_out = read(folder)
  assert sorted(documents) == ['a/x.txt', 'b/y.txt', 'c/deep/z.txt']
  assert left_out == ['c/deep/back', 'c/home', 'd', 'e.txt']


def test_two_links_to_one_file_outside_are_two_documents(folder, tmp_path):
  (tmp_path / 'stored').write_text('One content.\n')
  for name in ('one.txt', 'two.txt'):
    (folder / name).symlink_to(tmp_path / 'stored')
  documents, left_out = read(folder)
  assert sorted(documents) == ['a/x.txt', 'b/y.txt', 'one.txt', 'two.txt']
  assert left_out == []


def test_left_out_links_are_said_once_and_recorded(folder, tmp_path, capsys):
  (folder / 'a' / 'up').symlink_to('..')
  for said in (1, 0):
    dataset = data.open_dataset(f'text:{folder}', data_dir=str(tmp_path / 'data'))
    assert capsys.readouterr().err.count('left out (first: a/up)') == said
    assert dataset.provenance['num_links_left_out'] == 1


def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch):
  # Rights do not stop the superuser, as whom tests may run.
  real = os.scandir

  def scandir(path):
    if pathlib.Path(path).name == 'b':
      raise PermissionError(13, 'Permission denied')
    return real(path)

  monkeypatch.setattr(file_walk.os, 'scandir', scandir)
  with pytest.raises(errors.UserError, match=r'own/b cannot be read \(Permission denied\)'):
    read(folder)
