"""From a name to a data set: bad input, kills, damage, and two processes at once."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from moe_jax import data, errors
from moe_jax.data import sources, token_store, tokenizer

from . import conftest


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / 'corpus'
  for domain in ('letters', 'notes'):
    (folder / domain).mkdir(parents=True)
    for i in range(4):
      (folder / domain / f'{i}.txt').write_text(conftest.prose(f'{domain}{i}', 6))
  records = [{'text': conftest.prose(f'r{i}', 3), 'domain': 'mail'} for i in range(3)]
  records.append({'text': 'Second\u2028half.', 'name': 'named'})
  (folder / 'records.jsonl').write_text('\n\n'.join(map(json.dumps, records)) + '\n')
  (folder / 'ignored.csv').write_bytes(b'\xff')
  (folder / '.hidden.txt').write_bytes(b'\xff')
  return folder


def open_text(corpus, tmp_path, **kwargs):
  return data.open_dataset(f'text:{corpus}', data_dir=str(tmp_path / 'data'), **kwargs)


def test_a_folder_of_text(corpus, tmp_path):
  dataset = open_text(corpus, tmp_path)
  assert dataset.domains == ('letters', 'mail', 'notes', 'text')
  counts = {s: dataset.num_documents(s) for s in ('train', 'valid', 'test')}
  assert sum(counts.values()) == 12
  assert all(dataset.num_documents('test', d) for d in ('letters', 'mail', 'notes'))
  everything = [t for split in counts for t in dataset.document_text(split)]
  assert 'Second\u2028half.'.encode() in everything
  assert sum(map(len, everything)) == sum(map(dataset.num_bytes, counts))
  assert dataset.num_tokens('train') == dataset.num_bytes('train') + counts['train']
  windows = dataset.windows('train', 64)
  assert windows.num_pairs == dataset.num_tokens('train')
  mail = dataset.domains.index('mail')
  assert {int(i) for row in dataset.windows('train', 64, 'mail') for i in row['domain_ids']} <= {
    mail,
    -1,
  }
  json.dumps(dataset.provenance)
  batch = next(data.train_iterator(windows, batch_size=2, seed=0))
  assert batch['inputs'].shape == (2, 64)


def test_one_file(corpus, tmp_path):
  dataset = open_text(corpus / 'letters' / '0.txt', tmp_path)
  assert dataset.domains == ('text',)
  with pytest.raises(errors.UserError, match="split='valid'.*has none there"):
    dataset.windows('valid', 8)


def test_changed_files_are_prepared_again(corpus, tmp_path):
  before = open_text(corpus, tmp_path)
  assert open_text(corpus, tmp_path).fingerprint == before.fingerprint
  (corpus / 'notes' / '0.txt').write_text(conftest.prose('changed', 6))
  assert open_text(corpus, tmp_path).fingerprint != before.fingerprint
  shares = open_text(corpus, tmp_path, valid_fraction=0.0)
  assert shares.num_documents('valid') == 0


def test_a_smaller_vocabulary_than_asked_is_said_every_time(corpus, tmp_path, capsys):
  for _ in range(2):
    dataset = open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=60_000)
    size = dataset.tokenizer.vocab_size
    assert 258 < size < 60_000
    (line,) = [x for x in capsys.readouterr().err.splitlines() if 'data.vocab_size=60000' in x]
    assert f'for {size} tokens' in line
  meta = json.loads(_store_file(tmp_path, 'tokens/*/bpe-60000/meta.json').read_text())
  assert meta['vocab_size'] == size
  open_text(corpus, tmp_path)
  assert 'vocab_size' not in capsys.readouterr().err


def test_every_long_pass_says_how_far_it_is(corpus, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('moe_jax.data.progress._INTERVAL_SECONDS', 0.0)
  open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=600)
  said = capsys.readouterr().err
  for step in ('dividing into splits', 'storing train', 'counting words', 'encoding train'):
    assert f'{step}: 1 documents, ' in said
  # The merges are one call of the library, after all documents were read.
  (line,) = [line for line in said.splitlines() if 'learning' in line]
  read = sum(len(p.read_bytes()) for p in corpus.rglob('*.txt'))
  assert re.fullmatch(r'data: text:.*: learning 600 tokens from 0\.\d MB', line)
  assert 0 <= float(line.split()[-2]) <= read / 1e6
  assert said.index('counting words') < said.index('learning') < said.index('encoding')


def test_one_token_documents_are_short_for_bpe(corpus, tmp_path):
  for i in range(12):
    (corpus / 'notes' / f'word{i}.txt').write_text('antidis ' * 50 + str(i))
  (corpus / 'notes' / 'one.txt').write_text('antidis')
  open_text(corpus, tmp_path)
  with pytest.raises(errors.UserError, match='document notes/one.txt is shorter than two tokens'):
    open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=600)


@pytest.mark.parametrize(
  ('name', 'kwargs', 'field'),
  [
    ('tier9', {}, 'data.name'),
    ('', {}, 'data.name'),
    ('text:', {}, 'data.name'),
    ('tfds:', {}, 'data.name'),
    ('tier1', {'tokenizer': 'words'}, 'data.tokenizer'),
    ('tier1', {'vocab_size': 300}, 'data.vocab_size'),
    ('tier1', {'tokenizer': 'bpe', 'vocab_size': 100}, 'data.vocab_size'),
    ('tier1', {'valid_fraction': 0.7}, 'data.valid_fraction'),
    ('tier1', {'test_fraction': -0.1}, 'data.test_fraction'),
  ],
)
def test_bad_arguments(tmp_path, name, kwargs, field):
  with pytest.raises(errors.UserError) as error:
    data.open_dataset(name, data_dir=str(tmp_path / 'data'), **kwargs)
  assert error.value.field == field
  assert not (tmp_path / 'data').exists()


def test_unwritable_directory(corpus, tmp_path):
  (tmp_path / 'data').write_text('a file stands here')
  with pytest.raises(errors.UserError, match='data_dir'):
    open_text(corpus, tmp_path)


def test_unknown_split_and_domain(corpus, tmp_path):
  dataset = open_text(corpus, tmp_path)
  for call in (dataset.num_bytes, dataset.num_tokens, dataset.num_documents):
    with pytest.raises(errors.UserError, match="split='dev'"):
      call('dev')
  with pytest.raises(errors.UserError, match="split='dev'"):
    dataset.windows('dev', 8)
  with pytest.raises(errors.UserError, match="domain='poems'"):
    dataset.windows('train', 8, 'poems')


class Killed(BaseException):
  pass


@pytest.mark.parametrize('place', ['tfds', 'tokens', 'meta'])
def test_a_kill_leaves_nothing_half_made(corpus, tmp_path, monkeypatch, place):
  whole = open_text(corpus, tmp_path).fingerprint
  shutil.rmtree(tmp_path / 'data')

  def killed(*args, **kwargs):
    raise Killed

  with monkeypatch.context() as patch:
    # A real kill runs no clean-up either.
    patch.setattr('moe_jax.data.files.shutil.rmtree', lambda *args, **kwargs: None)
    if place == 'tfds':
      patch.setattr('moe_jax.data.local_text.LocalText._check_length', killed)
    elif place == 'tokens':
      patch.setattr(token_store.SplitWriter, 'finish', killed)
    else:
      patch.setattr('moe_jax.data.token_store.files.sha256_file', killed)
    with pytest.raises(Killed):
      open_text(corpus, tmp_path)
  dataset = open_text(corpus, tmp_path)
  assert dataset.fingerprint == whole
  left = [name for _, folders, files in os.walk(tmp_path / 'data') for name in folders + files]
  assert not [name for name in left if 'incomplete' in name]


def _store_file(tmp_path, pattern, data_dir='data'):
  (path,) = (tmp_path / data_dir).glob(pattern)
  return path


def test_a_damaged_store_is_made_again(corpus, tmp_path, capsys):
  before = open_text(corpus, tmp_path)
  path = _store_file(tmp_path, 'tokens/*/bytes/train.tokens.npy')
  path.write_bytes(path.read_bytes()[:-10])
  capsys.readouterr()
  after = open_text(corpus, tmp_path)
  assert 'train.tokens.npy should have' in capsys.readouterr().err
  assert after.fingerprint == before.fingerprint
  np.testing.assert_array_equal(after.windows('train', 8)[0]['inputs'].shape, (8,))


def _flip(path):
  content = bytearray(path.read_bytes())
  # The first record starts at byte 64.
  content[200] ^= 0xFF
  path.write_bytes(content)


def _cut(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])


def _content(content):
  return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
  ('pattern', 'damage'),
  [
    ('*train*array_record*', _flip),
    ('*train*array_record*', _cut),
    ('*train*array_record*', _content(b'')),
    ('*train*array_record*', pathlib.Path.unlink),
    ('dataset_info.json', _cut),
    ('dataset_info.json', _content(b'')),
    ('dataset_info.json', _content(b'[]')),
    ('dataset_info.json', _content(b'{"splits": 3}')),
    ('dataset_info.json', _content(b'\xff')),
  ],
)
def test_a_damaged_tfds_data_set_is_built_again(corpus, tmp_path, capsys, pattern, damage):
  before = open_text(corpus, tmp_path)
  shutil.rmtree(tmp_path / 'data' / 'tokens')
  damage(_store_file(tmp_path, f'tfds/*/*/*/{pattern}'))
  after = open_text(corpus, tmp_path)
  assert 'building it again' in capsys.readouterr().err
  assert after.fingerprint == before.fingerprint


def test_a_tfds_data_set_without_its_description_is_not_an_empty_one(corpus, tmp_path):
  before = open_text(corpus, tmp_path)
  shutil.rmtree(tmp_path / 'data' / 'tokens')
  _store_file(tmp_path, 'tfds/*/*/*/dataset_info.json').unlink()
  after = open_text(corpus, tmp_path)
  assert after.num_documents('train') > 0
  assert after.fingerprint == before.fingerprint


def _change_domains(path):
  meta = json.loads(path.read_text())
  path.write_text(json.dumps(meta | {'domains': ['letters', 'mail', 'nuts', 'text']}))


def test_a_changed_meta_is_made_again(corpus, tmp_path, capsys):
  before = open_text(corpus, tmp_path)
  _change_domains(_store_file(tmp_path, 'tokens/*/bytes/meta.json'))
  after = open_text(corpus, tmp_path)
  assert 'meta.json has changed since it was written; making it again' in capsys.readouterr().err
  assert (after.fingerprint, after.domains) == (before.fingerprint, before.domains)


def test_a_store_of_another_text_or_tokenizer_is_made_again(corpus, tmp_path, capsys):
  """Each is whole, and would train on a text or with a tokenizer that nobody asked for."""
  before = open_text(corpus, tmp_path)
  store = _store_file(tmp_path, 'tokens/*/bytes/meta.json').parent
  (corpus / 'letters' / '0.txt').write_text(conftest.prose('another', 6))
  other = open_text(corpus, tmp_path)
  (others,) = {p.parent for p in store.parents[1].glob('*/bytes/meta.json')} - {store}
  assert other.fingerprint != before.fingerprint
  shutil.rmtree(others)
  shutil.copytree(store, others)
  shutil.copytree(store, others.parent / 'bpe-512')
  capsys.readouterr()
  assert data.open_if_prepared(f'text:{corpus}', data_dir=str(tmp_path / 'data')) is None
  assert open_text(corpus, tmp_path).fingerprint == other.fingerprint
  said = capsys.readouterr().err
  assert f'{others} is a copy of another store, of {store.parent.name}; making it again' in said
  assert open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=512).tokenizer.name == 'bpe'
  assert 'bpe-512 is a copy of another store' in capsys.readouterr().err


def _as_before(store):
  """Makes a store one from before its kind was written down."""
  path = store / 'meta.json'
  meta = json.loads(path.read_text())
  del meta['kind']
  path.write_text(json.dumps(meta | {'meta_sha256': token_store._meta_digest(meta)}))


@pytest.mark.parametrize('old', [False, True])
def test_a_store_of_another_vocabulary_is_made_again(corpus, tmp_path, capsys, old):
  # Pairs enough for all of these sizes.
  for file in (corpus / 'letters').iterdir():
    file.write_text(conftest.prose(file.name, 100))
  open_bpe = lambda size: open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=size)  # noqa: E731
  large = open_bpe(530)
  store = _store_file(tmp_path, 'tokens/*/bpe-530/meta.json').parent
  shutil.copytree(store, store.with_name('bpe-520'))
  if old:
    _as_before(store.with_name('bpe-520'))
  capsys.readouterr()
  assert open_bpe(520).tokenizer.vocab_size == 520
  made = 'bpe, 530 tokens' if old else 'bpe-530'
  assert f'bpe-520 is a copy of another store, of {made}; making' in capsys.readouterr().err
  # One that is smaller than its name may be that of a small text, unless its kind is recorded.
  shutil.copytree(store, store.with_name('bpe-540'))
  if old:
    _as_before(store.with_name('bpe-540'))
  assert open_bpe(540).tokenizer.vocab_size == (530 if old else 540)
  # And of another text's tokenizer, whose hash is in the name.
  name, data_dir = f'text:{corpus}', str(tmp_path / 'data')
  mine = data.evaluation_dataset(name, large.tokenizer, data_dir).tokenizer.fingerprint
  other = tokenizer.train_bpe(['abcabc'], 512)
  (whole,) = store.parents[1].glob('*-whole/bpe-*')
  copy = whole.with_name(f'bpe-{other.fingerprint[:16]}')
  shutil.copytree(whole, copy)
  if old:
    _as_before(copy)
  found = data.evaluation_dataset(name, other, data_dir).tokenizer.fingerprint
  assert found == other.fingerprint != mine


def test_a_small_text_keeps_its_small_vocabulary(corpus, tmp_path, capsys):
  for _ in range(2):
    found = open_text(corpus, tmp_path, tokenizer='bpe', vocab_size=60_000)
    assert found.tokenizer.vocab_size < 60_000
  assert capsys.readouterr().err.count('encoding (') == 1


def test_a_store_from_before_the_digest_opens_with_a_note(corpus, tmp_path, capsys):
  before = open_text(corpus, tmp_path)
  path = _store_file(tmp_path, 'tokens/*/bytes/meta.json')
  meta = json.loads(path.read_text())
  del meta['meta_sha256'], meta['vocab_size'], meta['kind']
  path.write_text(json.dumps(meta))
  capsys.readouterr()
  assert open_text(corpus, tmp_path).fingerprint == before.fingerprint
  (line,) = capsys.readouterr().err.splitlines()
  assert 'cannot be checked' in line
  assert str(path.parent) in line


@pytest.mark.parametrize('damage', [pathlib.Path.unlink, _change_domains])
def test_a_damaged_store_without_its_source_is_damage(registry, tmp_path, monkeypatch, damage):
  data.open_dataset('tier1', data_dir=str(tmp_path))
  shutil.rmtree(tmp_path / 'downloads')
  shutil.rmtree(tmp_path / 'tfds')
  damage(_store_file(tmp_path, 'tokens/*/bytes/meta.json', data_dir=''))

  def offline(packages, directory, dataset_name):
    raise errors.UserError('data.name', dataset_name, 'no network')

  monkeypatch.setattr('moe_jax.data.packages._download', offline)
  with pytest.raises(errors.DamagedError, match='cannot be made again.*no network'):
    data.open_dataset('tier1', data_dir=str(tmp_path))


def test_two_processes_prepare_the_same_data_set(corpus, tmp_path):
  script = (
    'import sys; from moe_jax import data;'
    'print(data.open_dataset(sys.argv[1], data_dir=sys.argv[2]).fingerprint)'
  )
  command = [sys.executable, '-c', script, f'text:{corpus}', str(tmp_path / 'data')]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
  results = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], results
  assert len({out for out, _ in results}) == 1
  assert sum('encoding' in err for _, err in results) == 1


def test_the_tiers_are_what_open_dataset_says():
  assert set(sources.TIERS) == {'tier1', 'tier2'}
