"""The token store: what is written is read back, and damage is noticed."""

import hashlib
import json

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import token_store
from moe_jax.data import tokenizer as tokenizer_lib

DOCUMENTS = {
  'train': [documents_lib.Document(f'Tëxt {i}' * i, 'ba'[i % 2], str(i)) for i in range(1, 6)],
  'test': [documents_lib.Document('test', 'c', 'x')],
}


@pytest.fixture
def store_dir(tmp_path):
  token_store.write(
    str(tmp_path), DOCUMENTS, tokenizer_lib.ByteTokenizer(), identity='me', provenance={'a': 1}
  )
  return tmp_path


def test_reads_back(store_dir):
  store = token_store.open_store(str(store_dir))
  assert store.meta['domains'] == ['a', 'b', 'c']
  assert store.meta['provenance'] == {'a': 1}
  train = store.splits['train']
  assert train.tokens.dtype == np.uint16
  for i, document in enumerate(DOCUMENTS['train']):
    tokens = train.tokens[train.offsets[i] : train.offsets[i + 1]]
    assert (tokens[0], tokens[-1]) == (256, 257)
    assert store.tokenizer.decode(tokens) == document.text
    assert train.num_bytes[i] == len(document.text.encode())
    assert store.meta['domains'][train.domain_ids[i]] == document.domain
  assert len(store.splits['valid'].domain_ids) == 0


def test_fingerprint_depends_on_text_split_domain_and_tokenizer(store_dir, tmp_path_factory):
  def fingerprint(documents, tokenizer=None, identity='me'):
    directory = str(tmp_path_factory.mktemp('other'))
    tokenizer = tokenizer or tokenizer_lib.ByteTokenizer()
    token_store.write(directory, documents, tokenizer, identity=identity, provenance={})
    return token_store.open_store(directory).meta['fingerprint']

  document = DOCUMENTS['test'][0]
  others = [
    fingerprint(DOCUMENTS),
    fingerprint(DOCUMENTS, identity='you'),
    fingerprint(DOCUMENTS, tokenizer_lib.train_bpe(['some text some text'], 512)),
    fingerprint(DOCUMENTS | {'test': [documents_lib.Document('tesT', 'c', 'x')]}),
    fingerprint(DOCUMENTS | {'test': [documents_lib.Document('test', 'd', 'x')]}),
    fingerprint(DOCUMENTS | {'test': [], 'valid': [document]}),
  ]
  assert others[0] == token_store.open_store(str(store_dir)).meta['fingerprint']
  assert len(set(others)) == len(others)


def test_large_vocabularies_take_four_bytes(tmp_path):
  tokenizer = tokenizer_lib.ByteTokenizer()
  tokenizer.vocab_size = 2**16 + 1
  writer = token_store.SplitWriter(str(tmp_path), 'train', tokenizer, skip_short=False)
  writer.write(DOCUMENTS['train'], hashlib.sha256())
  assert np.load(tmp_path / 'train.tokens.npy', allow_pickle=False).dtype == np.uint32


@pytest.mark.parametrize('text', ['', 'x'])
def test_short_documents(tmp_path, text):
  documents = {'train': [documents_lib.Document(text, 'a', 'the short one'), *DOCUMENTS['train']]}
  arguments = (documents, tokenizer_lib.ByteTokenizer())
  (tmp_path / 'a').mkdir()
  with pytest.raises(token_store.ShortDocumentError, match='the short one'):
    token_store.write(str(tmp_path / 'a'), *arguments, identity='', provenance={})
  (tmp_path / 'b').mkdir()
  skipped = token_store.write(
    str(tmp_path / 'b'), *arguments, identity='', provenance={}, skip_short=True
  )
  assert skipped == 1
  assert len(token_store.open_store(str(tmp_path / 'b')).splits['train'].domain_ids) == 5


FILES = ['train.tokens.npy', 'train.offsets.npy', 'test.domains.npy', 'tokenizer.json', 'meta.json']


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', ['cut', 'flip', 'remove'])
def test_damage_is_noticed(store_dir, name, damage):
  path = store_dir / name
  content = bytearray(path.read_bytes())
  if damage == 'remove':
    path.unlink()
  elif damage == 'cut':
    path.write_bytes(content[: len(content) // 2])
  else:
    content[len(content) // 2 if name != 'meta.json' else 0] ^= 1
    path.write_bytes(content)
  with pytest.raises(errors.DamagedError, match=str(store_dir)):
    token_store.open_store(str(store_dir))


def test_absence(store_dir):
  with pytest.raises(FileNotFoundError):
    token_store.open_store(str(store_dir / 'nothing'))


def _set(**changes):
  return lambda meta: meta | changes


def _renamed(meta):
  return meta | {'domains': ['a', 'b', 'd']}


def _entry(name, **changes):
  return lambda meta: meta | {'files': meta['files'] | {name: meta['files'][name] | changes}}


# Changes of meta.json that only its digest shows.
HIDDEN = {
  'renamed domain': _renamed,
  'fingerprint': _set(fingerprint='0' * 64),
  'identity': _set(identity='you'),
  'provenance': _set(provenance={'a': 2}),
  'skipped': _set(num_skipped_short_documents=3),
}
# Those that don't fit what else is there.
VISIBLE = {
  'format': _set(format=99),
  'swapped domains': _set(domains=['b', 'a', 'c']),
  'equal domains': _set(domains=['a', 'a', 'b']),
  'too few domains': _set(domains=['a', 'b']),
  'no domains': _set(domains=[]),
  'domains are numbers': _set(domains=[1, 2, 3]),
  'domains are an object': _set(domains={'a': 0, 'b': 1, 'c': 2}),
  'tokenizer': _set(tokenizer_fingerprint='0' * 64),
  'no files': _set(files={}),
  'files are a list': _set(files=[]),
  'a file less': lambda meta: (
    meta | {'files': {k: v for k, v in meta['files'].items() if k != 'test.bytes.npy'}}
  ),
  'a file elsewhere': lambda meta: meta | {'files': meta['files'] | {'../x': {}}},
  'size': _entry('test.bytes.npy', size=1),
  'size is text': _entry('test.bytes.npy', size='1'),
  'hash': _entry('test.bytes.npy', sha256='0' * 64),
  'an entry is a number': lambda meta: meta | {'files': meta['files'] | {'test.bytes.npy': 3}},
  'a key less': lambda meta: {k: v for k, v in meta.items() if k != 'fingerprint'},
  'a key renamed': lambda meta: {k.replace('identity', 'idenTity'): v for k, v in meta.items()},
  'a list': lambda meta: [meta],
  'nothing': lambda meta: None,
}


def _without_digest(meta):
  """Returns meta.json as it was written before it had a digest."""
  meta = dict(meta)
  del meta['meta_sha256'], meta['vocab_size'], meta['kind']
  return meta


def _change_meta(store_dir, *changes):
  meta = json.loads((store_dir / 'meta.json').read_text())
  for change in changes:
    meta = change(meta)
  (store_dir / 'meta.json').write_text(json.dumps(meta))


@pytest.mark.parametrize('change', [*HIDDEN.values(), *VISIBLE.values()], ids=[*HIDDEN, *VISIBLE])
def test_a_changed_meta_is_noticed(store_dir, change):
  _change_meta(store_dir, change)
  with pytest.raises(errors.DamagedError, match=str(store_dir)) as error:
    token_store.open_store(str(store_dir))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', VISIBLE.values(), ids=VISIBLE)
def test_an_old_meta_that_does_not_fit_is_noticed(store_dir, change):
  _change_meta(store_dir, _without_digest, change)
  with pytest.raises(errors.DamagedError, match=str(store_dir)):
    token_store.open_store(str(store_dir))


def test_an_old_store_is_read_and_known_as_old(store_dir):
  new = token_store.open_store(str(store_dir))
  assert new.has_digest
  assert new.meta['vocab_size'] == 258
  _change_meta(store_dir, _without_digest)
  old = token_store.open_store(str(store_dir))
  assert not old.has_digest
  assert old.meta['fingerprint'] == new.meta['fingerprint']
  np.testing.assert_array_equal(old.splits['train'].tokens, new.splits['train'].tokens)
  # What is checked is the content, not how it is set: an editor may have put it in other lines.
  assert old.meta == {k: v for k, v in new.meta.items() if k in old.meta}


def test_a_digest_that_lost_its_name_does_not_make_a_store_old(store_dir):
  _change_meta(store_dir, lambda meta: {k.replace('meta_s', 'metaXs'): v for k, v in meta.items()})
  with pytest.raises(errors.DamagedError, match='lacks meta_sha256'):
    token_store.open_store(str(store_dir))


@pytest.mark.parametrize(
  'content', ['', '{', '[' * 20_000, '{"format": ' + '1' * 5000 + '}', '\xff', 'null', '\0']
)
def test_a_meta_that_is_no_json_is_damage(store_dir, content):
  (store_dir / 'meta.json').write_bytes(content.encode('latin-1'))
  with pytest.raises(errors.DamagedError, match=str(store_dir)):
    token_store.open_store(str(store_dir))


@pytest.mark.parametrize(
  ('kind', 'array'),
  [
    ('offsets', [0, 9, 6]),
    ('offsets', [1, 6]),
    ('offsets', [0, 5]),
    ('offsets', []),
    ('bytes', []),
    ('domains', [3]),
    ('domains', [-1]),
    ('domains', [2, 2]),
  ],
)
def test_arrays_that_do_not_fit_together_are_damage(store_dir, kind, array):
  path = store_dir / f'test.{kind}.npy'
  np.save(path, np.array(array, np.load(path).dtype))
  content = path.read_bytes()
  entry = {'size': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
  _change_meta(store_dir, _without_digest, _entry(path.name, **entry))
  with pytest.raises(errors.DamagedError, match=str(store_dir)):
    token_store.open_store(str(store_dir))


class _Counted(str):
  """A text that counts how often its length is asked for."""

  asked = 0

  def __len__(self):
    _Counted.asked += 1
    return super().__len__()


def _lengths_asked(directory, num_documents, monkeypatch):
  monkeypatch.setattr(_Counted, 'asked', 0)
  writer = token_store.SplitWriter(
    str(directory), 'train', tokenizer_lib.ByteTokenizer(), skip_short=False
  )
  documents = [documents_lib.Document(_Counted('tiny'), 'a', str(i)) for i in range(num_documents)]
  writer.write(documents, hashlib.sha256())
  return _Counted.asked


def test_work_per_document_does_not_grow_with_their_number(tmp_path, monkeypatch):
  few, many = (_lengths_asked(tmp_path, count, monkeypatch) for count in (100, 1000))
  assert 0 < few <= 3 * 100
  assert many == 10 * few


def test_batches_end_when_they_are_large_enough(tmp_path, monkeypatch):
  sizes = []

  class Tokenizer(tokenizer_lib.ByteTokenizer):
    def encode_batch(self, texts):
      sizes.append(len(texts))
      return super().encode_batch(texts)

  monkeypatch.setattr(token_store, '_BATCH_CHARACTERS', 12)
  writer = token_store.SplitWriter(str(tmp_path), 'train', Tokenizer(), skip_short=False)
  writer.write([documents_lib.Document('tiny', 'a', str(i)) for i in range(8)], hashlib.sha256())
  # 3 x 4 characters fill a batch, and the next begins at 0.
  assert sizes == [3, 3, 2]
