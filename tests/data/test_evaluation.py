"""Any text to evaluate on: all of it, in one split, in the tokens of the trained model."""

import json

import numpy as np
import pytest

from moe_jax import data, errors
from moe_jax.data import tokenizer as tokenizer_lib

from . import conftest

LETTERS = [conftest.prose(f'letter{i}', 4) for i in range(3)]
NOTE = 'One note, the only one of its domain.\n'
BPE = tokenizer_lib.train_bpe([conftest.prose('trained on', 60)], 600)


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'own' / 'letters').mkdir(parents=True)
  for i, text in enumerate(LETTERS):
    (tmp_path / 'own' / 'letters' / f'{i}.txt').write_text(text)
  (tmp_path / 'own' / 'a.jsonl').write_text(json.dumps({'text': NOTE, 'domain': 'notes'}))
  return tmp_path / 'own'


@pytest.mark.parametrize('tokenizer', [BPE, tokenizer_lib.ByteTokenizer()], ids=['bpe', 'bytes'])
def test_all_documents_stand_in_one_split_in_the_given_tokens(folder, tmp_path, tokenizer):
  def opened():
    return data.evaluation_dataset(f'text:{folder}', tokenizer, str(tmp_path / 'data'))

  dataset = opened()
  assert dataset.tokenizer.fingerprint == tokenizer.fingerprint
  assert [dataset.num_documents(split) for split in data.SPLITS] == [0, 0, 4]
  assert dataset.domains == ('letters', 'notes')
  # Nothing is held out: a domain of one document is evaluated on, too.
  assert list(dataset.document_text(data.EVALUATION_SPLIT, 'notes')) == [NOTE.encode()]
  letters = {text.encode() for text in LETTERS}
  assert set(dataset.document_text(data.EVALUATION_SPLIT, 'letters')) == letters
  row = dataset.windows(data.EVALUATION_SPLIT, 512, 'notes')[0]
  expected = [tokenizer.bos_id, *tokenizer.encode(NOTE).tolist()]
  np.testing.assert_array_equal(row['inputs'][: len(expected)], expected)
  assert opened().fingerprint == dataset.fingerprint


def test_each_tokenizer_has_a_store_of_its_own(folder, tmp_path):
  def fingerprint(tokenizer):
    name, data_dir = f'text:{folder}', str(tmp_path / 'data')
    found = data.evaluation_dataset(name, tokenizer, data_dir)
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    return found.fingerprint

  other = tokenizer_lib.train_bpe([conftest.prose('something else', 60)], 600)
  assert fingerprint(BPE) != fingerprint(other)
  # What a run trains on is another data set, held out documents and all.
  trained = data.open_dataset(f'text:{folder}', data_dir=str(tmp_path / 'data'))
  assert trained.num_documents('train') < 4


def test_a_tier_is_taken_whole(registry, tmp_path):
  divided = data.open_dataset('tier1', data_dir=str(tmp_path))
  whole = data.evaluation_dataset('tier1', divided.tokenizer, str(tmp_path))
  assert whole.domains == divided.domains
  for domain in whole.domains:
    assert list(whole.document_text(data.EVALUATION_SPLIT, domain)) == [
      text for split in data.SPLITS for text in divided.document_text(split, domain)
    ]
  # It reads what is already prepared.
  assert len(registry) == 1


@pytest.mark.parametrize('source', ['text:{}/nowhere', 'tier9', '', 'text:', 'tfds:', 'nonsense:x'])
def test_bad_sources_name_the_flag(tmp_path, source):
  source = source.format(tmp_path)
  with pytest.raises(errors.UserError, match='^--data=') as error:
    data.evaluation_dataset(source, BPE, str(tmp_path / 'data'))
  assert (error.value.field, error.value.value) == ('--data', source)
  assert not (tmp_path / 'data').exists()


def test_damage_is_made_good(folder, tmp_path, capsys):
  name, data_dir = f'text:{folder}', str(tmp_path / 'data')
  before = data.evaluation_dataset(name, BPE, data_dir).fingerprint
  (path,) = (tmp_path / 'data').glob('tokens/*-whole/bpe-*/tokenizer.json')
  path.write_text('{}')
  after = data.evaluation_dataset(name, BPE, data_dir)
  assert 'making it again' in capsys.readouterr().err
  assert (after.fingerprint, after.tokenizer.fingerprint) == (before, BPE.fingerprint)
