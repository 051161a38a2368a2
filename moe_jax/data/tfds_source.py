"""TFDS data sets without TensorFlow: builds ours, and reads any that has a text feature.

Import this module late: TFDS takes a second, and a prepared token store does not need it.
"""

import contextlib
import io
import os
import re
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from google.protobuf import json_format

from moe_jax import errors
from moe_jax.data import documents as documents_lib

FILE_FORMAT = 'array_record'
VALID_NAMES = ('valid', 'validation')

# Written last by TFDS.
_INFO = 'dataset_info.json'

_UNKNOWN = 'must be a name that TFDS knows'
# What a builder of somebody else may raise for lack of a network, a disk, TensorFlow or a file.
_PREPARE_ERRORS = (OSError, ImportError, ValueError, RuntimeError, AssertionError, AttributeError)


class MoeJaxText(tfds.core.GeneratorBasedBuilder):
  """Documents with their domain and name; one builder config per data set."""

  BUILDER_CONFIGS: list[tfds.core.BuilderConfig] = []
  # TFDS looks for checksums next to the code; ours are in `packages` and checked before.
  code_path = None

  def __init__(
    self,
    documents: dict[str, Callable[[], Iterable[documents_lib.Document]]],
    config_name: str,
    version: str,
    data_dir: str,
  ):
    self.documents = documents
    config = tfds.core.BuilderConfig(name=config_name, version=version, description=config_name)
    super().__init__(data_dir=data_dir, config=config, file_format=FILE_FORMAT)

  def _info(self) -> tfds.core.DatasetInfo:
    # Not dataset_info_from_configs(), which wants metadata files next to the code.
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({'text': text(), 'domain': text(), 'name': text()}),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
    del dl_manager
    return {split: self._examples(read()) for split, read in self.documents.items()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, str]]]:
    raise NotImplementedError  # Abstract in TFDS; _split_generators calls _examples.

  def _examples(
    self, documents: Iterable[documents_lib.Document]
  ) -> Iterator[tuple[str, dict[str, str]]]:
    for i, document in enumerate(documents):
      yield (
        f'{i:09d}',
        {'text': document.text, 'domain': document.domain, 'name': document.name},
      )


def build(
  documents: dict[str, Callable[[], Iterable[documents_lib.Document]]],
  config_name: str,
  version: str,
  data_dir: str,
  *,
  rebuild: bool = False,
) -> Any:
  """Returns the prepared builder of our own documents; TFDS makes its directory appear atomically.

  Args:
    documents: per split, what reads its documents; called only if they must be read.
    config_name: one name per data set and content.
    version: three numbers.
    data_dir: where TFDS keeps data sets.
    rebuild: drop what is there.

  Raises:
    OSError: if what is there is damaged; `rebuild=True` repairs it.
  """
  parent = os.path.join(data_dir, MoeJaxText.name, config_name)
  path = os.path.join(parent, version)
  if rebuild or not os.path.isfile(os.path.join(path, _INFO)):
    # TFDS takes a directory without its description for a data set without splits. The caller holds
    # the data set's lock.
    shutil.rmtree(path, ignore_errors=True)
  with _quiet(), _damage_as_os_error(path):
    builder = MoeJaxText(documents, config_name, version, data_dir)
  if not _is_prepared(builder):
    # What a killed build left behind.
    for entry in os.listdir(parent) if os.path.isdir(parent) else ():
      if entry.startswith('incomplete.'):
        shutil.rmtree(os.path.join(parent, entry))
    # TFDS builds no empty split. And the user's mistakes come up here, before TFDS can wrap them.
    builder.documents = {
      split: read for split, read in documents.items() if any(True for _ in read())
    }
    with _quiet():
      builder.download_and_prepare()
  if not builder.info.splits:
    raise OSError(f'{path} has no splits')
  return builder


def check_name(name: str) -> None:
  """Checks that TFDS has code or files of a data set, without a network.

  Args:
    name: the user's `data.name`, 'tfds:NAME[/CONFIG][:VERSION]'.

  Raises:
    errors.UserError: if it has not.
  """
  spec = name.removeprefix('tfds:')
  try:
    tfds.builder_cls(re.split('[/:]', spec)[0])
  except tfds.core.DatasetNotFoundError:
    try:
      tfds.builder(spec, try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
      raise errors.UserError('data.name', name, _UNKNOWN) from error


def open_named(name: str, data_dir: str) -> Any:
  """Returns the prepared builder of a TFDS data set, downloading it if need be.

  A version that TFDS already has in its own directory (TFDS_DATA_DIR) is used where it is.

  Args:
    name: the user's `data.name`, 'tfds:NAME[/CONFIG][:VERSION]'.
    data_dir: where a new data set goes.

  Raises:
    errors.UserError: if the name is unknown or the data set can't be obtained.
    errors.DamagedError: if its files are there but can't be read.
  """
  spec = name.removeprefix('tfds:')
  try:
    with _damage_as_os_error(f'{name} below {data_dir} or TFDS_DATA_DIR'):
      present = tfds.builder(spec, try_gcs=False)
      if _is_prepared(present) and present.info.file_format.value == FILE_FORMAT:
        return present
      builder = tfds.builder(spec, data_dir=data_dir, file_format=FILE_FORMAT, try_gcs=False)
  except _DescriptionError as error:
    raise errors.DamagedError(f'{error}; remove its folder to have it downloaded again') from error
  except tfds.core.DatasetNotFoundError as error:
    raise errors.UserError('data.name', name, _UNKNOWN) from error
  except _PREPARE_ERRORS as error:
    reason = _one_line(error)
    raise errors.UserError('data.name', name, f'TFDS cannot open it: {reason}') from error
  text_feature(builder, name)
  if not _is_prepared(builder):
    if os.path.isdir(str(builder.data_path)):
      # TFDS would take it for a data set without splits.
      raise errors.DamagedError(
        f'{builder.data_path} has no {_INFO}; remove this folder to have it downloaded again'
      )
    try:
      _check_network(builder)
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
    except _PREPARE_ERRORS as error:
      reason = _one_line(error)
      raise errors.UserError('data.name', name, f'TFDS cannot prepare it: {reason}') from error
  return builder


def text_feature(builder: Any, name: str) -> str:
  """Returns the feature to read: 'text', or else the only text feature.

  Raises:
    errors.UserError: if there is none, or several.
  """
  features = builder.info.features
  found = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
  if 'text' in found:
    return 'text'
  if len(found) != 1:
    raise errors.UserError(
      'data.name',
      name,
      'must be a data set with a feature "text" or one text feature; it has '
      f'{sorted(found or features)}',
    )
  return found[0]


def split_names(builder: Any, name: str) -> dict[str, str]:
  """Returns, by our names, those of the splits that the data set has.

  Raises:
    errors.UserError: if it has no 'train'.
  """
  there = list(builder.info.splits)
  if documents_lib.TRAIN not in there:
    raise errors.UserError('data.name', name, f'must have a split "train"; it has {there}')
  names = {documents_lib.TRAIN: documents_lib.TRAIN}
  for valid in VALID_NAMES:
    if valid in there:
      names.setdefault(documents_lib.VALID, valid)
  if documents_lib.TEST in there:
    names[documents_lib.TEST] = documents_lib.TEST
  return names


def read(builder: Any, split: str, name: str) -> Iterator[documents_lib.Document]:
  """Yields a split's documents; their domain is the data set's name unless it has the feature.

  Raises:
    errors.UserError: if a text is not UTF-8.
    OSError, RuntimeError, ValueError, IndexError: if the files are damaged; their own checksums
      tell.
  """
  key = text_feature(builder, name)
  for i, example in enumerate(builder.as_data_source(split)):
    if example[key] is None:
      # What array_record gives for records behind the end of a file that was cut short.
      raise OSError(f'example {i} of {split} is missing')
    try:
      yield documents_lib.Document(
        text=example[key].decode(),
        domain=_string(example.get('domain')) or builder.name,
        name=_string(example.get('name')) or f'{split}/{i}',
      )
    except UnicodeDecodeError as error:
      raise errors.UserError('data.name', name, f'{split} example {i} is not UTF-8') from error


def _is_prepared(builder: Any) -> bool:
  # TFDS's own is_prepared() logs a warning when the answer is no.
  return os.path.isfile(os.path.join(str(builder.data_path), _INFO))


class _DescriptionError(OSError):
  """The description of a TFDS data set can't be read."""


@contextlib.contextmanager
def _damage_as_os_error(what: str) -> Iterator[None]:
  """Gives the errors of a damaged description one type; they come from three libraries."""
  try:
    yield
  except Exception as error:
    cause: BaseException | None = error
    while cause is not None:
      # TFDS asserts other things, too.
      asserts = isinstance(cause, AssertionError) and 'restored proto version' in str(cause)
      if asserts or isinstance(cause, json_format.Error | UnicodeDecodeError):
        reason = f'{what} has a damaged {_INFO} ({_one_line(error)})'
        raise _DescriptionError(reason) from error
      cause = cause.__cause__
    raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides TFDS's bars and notes on what takes a second; its errors still come up."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)


def _string(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else ''


def _check_network(builder: Any) -> None:
  """Fails at once where TFDS would retry for three minutes: without any name resolution."""
  if urllib.request.getproxies():
    return
  for url in list(builder.url_infos or ())[:1]:
    host = urllib.parse.urlparse(url).hostname
    try:
      socket.getaddrinfo(host, None)
    except OSError as error:
      raise OSError(f'{host} cannot be reached ({error.strerror})') from error


def _one_line(error: BaseException) -> str:
  text = re.sub(r'\s+', ' ', f'{type(error).__name__}: {error}')
  return text if len(text) <= 300 else text[:297] + '...'
