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


def test_other_format_and_absence(store_dir):
  meta = json.loads((store_dir / 'meta.json').read_text())
  (store_dir / 'meta.json').write_text(json.dumps(meta | {'format': 99}))
  with pytest.raises(errors.DamagedError, match='format 99'):
    token_store.open_store(str(store_dir))
  with pytest.raises(FileNotFoundError):
    token_store.open_store(str(store_dir / 'nothing'))
