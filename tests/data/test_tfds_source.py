"""Any TFDS data set with a text feature, by name; here some that the test registers."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax import data, errors
from moe_jax.data import tfds_source

from . import conftest


class _Base(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version('1.0.0')
  # TFDS would look for checksums and metadata beside this file.
  code_path = None
  FEATURES = {'text': tfds.features.Text(), 'label': tfds.features.Scalar(np.int64)}
  SPLITS = {'train': 20, 'validation': 3, 'test': 4}
  TEXT = 'text'

  def _info(self):
    features = tfds.features.FeaturesDict(self.FEATURES)
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {split: self._examples(split, count) for split, count in self.SPLITS.items()}

  def _generate_examples(self):
    raise NotImplementedError

  def _examples(self, split, count):
    for i in range(count):
      example = {key: 'x' if key != 'label' else i for key in self.FEATURES}
      # The last is empty, which happens in public data sets.
      yield i, example | {self.TEXT: conftest.prose(f'{split}{i}', 4) if i != 1 else ''}


class MoeJaxTestPlain(_Base):
  pass


class MoeJaxTestTrainOnly(_Base):
  FEATURES = {'body': tfds.features.Text(), 'label': tfds.features.Scalar(np.int64)}
  SPLITS = {'train': 40}
  TEXT = 'body'


class MoeJaxTestTwoTexts(_Base):
  FEATURES = {'question': tfds.features.Text(), 'answer': tfds.features.Text()}
  TEXT = 'answer'


class MoeJaxTestNoText(_Base):
  FEATURES = {'label': tfds.features.Scalar(np.int64)}


class MoeJaxTestNoTrain(_Base):
  SPLITS = {'test': 4}


class MoeJaxTestOffline(_Base):
  def _split_generators(self, dl_manager):
    raise ConnectionError('no route\nto host')


class MoeJaxTestFar(_Base):
  url_infos = {'https://data.invalid/a.zip': None}

  def _split_generators(self, dl_manager):
    raise AssertionError('TFDS was left to try')


def open_named(name, tmp_path):
  return data.open_dataset(f'tfds:{name}', data_dir=str(tmp_path))


def test_its_own_splits(tmp_path, capsys):
  dataset = open_named('moe_jax_test_plain', tmp_path)
  counts = [dataset.num_documents(split) for split in ('train', 'valid', 'test')]
  assert counts == [19, 2, 3]
  assert 'left out 3 documents' in capsys.readouterr().err
  assert dataset.domains == ('moe_jax_test_plain',)
  assert conftest.prose('validation0', 4).encode() in set(dataset.document_text('valid'))
  assert dataset.provenance['dataset'] == 'tfds:moe_jax_test_plain/1.0.0'
  again = open_named('moe_jax_test_plain:1.0.0', tmp_path)
  assert [again.num_documents(split) for split in ('train', 'valid', 'test')] == counts


def test_missing_splits_are_held_out_by_hash(tmp_path):
  dataset = open_named('moe_jax_test_train_only', tmp_path)
  texts = {split: set(dataset.document_text(split)) for split in ('train', 'valid', 'test')}
  assert all(texts.values())
  assert sum(map(len, texts.values())) == 39
  assert not texts['train'] & (texts['valid'] | texts['test'])


def test_evaluation_takes_every_split_and_needs_no_train(tmp_path):
  def whole(name):
    return data.evaluation_dataset(f'tfds:{name}', tokenizer, str(tmp_path))

  tokenizer = data.ByteTokenizer()
  assert whole('moe_jax_test_no_train').num_documents(data.EVALUATION_SPLIT) == 3
  every = whole('moe_jax_test_plain')
  assert every.num_documents(data.EVALUATION_SPLIT) == 19 + 2 + 3
  assert every.domains == ('moe_jax_test_plain',)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('moe_jax_no_such_name', 'a name that TFDS knows'),
    ('moe_jax_test_plain:9.9.9', 'TFDS cannot open it'),
    ('moe_jax_test_plain/no_config', 'TFDS cannot open it'),
    ('moe_jax_test_two_texts', "it has \\['answer', 'question'\\]"),
    ('moe_jax_test_no_text', "it has \\['label'\\]"),
    ('moe_jax_test_no_train', 'a split "train"'),
    ('moe_jax_test_offline', 'TFDS cannot prepare it: ConnectionError: no route to host'),
  ],
)
def test_bad_names_are_one_line(tmp_path, name, message):
  with pytest.raises(errors.UserError, match=message) as error:
    open_named(name, tmp_path)
  assert error.value.field == 'data.name'
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name',
  [
    *('huggingface:glue', 'huggingface:glue/cola:1.0.0', 'kubric:x', 'a:b:1.0.0'),
    *('moe_jax_test_plain/data_dir=x', 'gs://bucket/x', '../x', '/etc', 'a b', 'a:1.0', '\udcff'),
  ],
)
def test_other_hubs_are_refused_before_tfds_is_asked(tmp_path, monkeypatch, name):
  def asked(*args, **kwargs):
    raise AssertionError('TFDS was asked')

  monkeypatch.setattr(tfds_source.tfds, 'builder', asked)
  with pytest.raises(errors.UserError, match='other hubs .* are not read') as error:
    open_named(name, tmp_path)
  assert error.value.value == f'tfds:{name}'


@pytest.mark.parametrize('content', [None, b'', b'{"spl', b'[]', b'{"splits": 3}', b'\xff'])
def test_a_damaged_description_is_damage(tmp_path, content):
  before = open_named('moe_jax_test_plain', tmp_path)
  path = tmp_path / 'tfds' / 'moe_jax_test_plain' / '1.0.0' / 'dataset_info.json'
  path.write_bytes(content) if content is not None else path.unlink()
  # The token store needs it no more.
  assert open_named('moe_jax_test_plain', tmp_path).fingerprint == before.fingerprint
  shutil.rmtree(tmp_path / 'tokens')
  with pytest.raises(errors.DamagedError, match='dataset_info.json.*downloaded again') as error:
    open_named('moe_jax_test_plain', tmp_path)
  assert '\n' not in str(error.value)


def test_without_name_resolution_it_fails_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds_source.urllib.request, 'getproxies', dict)

  def unknown(host, port):
    raise OSError(-2, 'Name or service not known')

  monkeypatch.setattr(tfds_source.socket, 'getaddrinfo', unknown)
  with pytest.raises(errors.UserError, match='data.invalid cannot be reached'):
    open_named('moe_jax_test_far', tmp_path)
