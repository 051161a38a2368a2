"""From a name to documents: the tiers, TFDS data sets by name, and a user's own text.

A source is opened either divided into train, valid and test, or undivided, with every
document in one split, to evaluate on.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import local_text, overlap, progress, tier1, tier2
from moe_jax.data import packages as packages_lib

TIERS: dict[str, ModuleType] = {'tier1': tier1, 'tier2': tier2}

Reader = Callable[[], Iterable[documents_lib.Document]]

_TFDS_NAME = re.compile(r'[A-Za-z]\w*(/[\w.+-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?', re.ASCII)

# Holds every document of an undivided source.
WHOLE = documents_lib.TEST

# (share for validation, share for test), or None for an undivided source.
Fractions = tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Source:
  """A source of documents.

  Attributes:
    key: a directory name, one per content and split.
    lock: a file name; sources with equal locks write the same files.
    open: (rebuild) -> (reader per split, provenance); downloads and builds what is missing.
    own: whether we built it, so that `open` repairs damage where `rebuild` is true.
    skip_short: whether documents of fewer than two tokens are left out, not an error.
  """

  key: str
  lock: str
  open: Callable[[bool], tuple[dict[str, Reader], dict[str, Any]]]
  own: bool
  skip_short: bool


def find_source(name: str, data_dir: str, fractions: Fractions) -> Source:
  """Returns the source of a name, without preparing it.

  Args:
    name: the user's `data.name`; see `prepare.open_dataset`.
    data_dir: where everything is kept; absolute.
    fractions: of each domain's bytes that validation and test hold out, where the source does not
      say itself what they are; None puts every document of every split into `WHOLE`.

  Raises:
    errors.UserError: if there is no such source.
  """
  kind, _, rest = name.partition(':')
  suffix = 'whole' if fractions is None else f'{fractions[0]:g}-{fractions[1]:g}'
  if name in TIERS:
    lock = f'{name}-{TIERS[name].VERSION}'
    return Source(
      key=f'{lock}-whole' if fractions is None else lock,
      lock=lock,
      open=functools.partial(_open_tier, name, data_dir, fractions),
      own=True,
      skip_short=False,
    )
  if kind == 'tfds' and rest:
    if not _TFDS_NAME.fullmatch(rest):
      raise errors.UserError(
        'data.name',
        name,
        'must be tfds:NAME[/CONFIG][:VERSION]; other hubs (tfds:huggingface:NAME) are not read: '
        'save the texts as .jsonl and give text:PATH',
      )
    # The hash distinguishes names that the readable part does not, such as 'a/b' and 'a-b'.
    short_hash = hashlib.sha256(rest.encode()).hexdigest()[:8]
    slug = f'{re.sub(r"[^A-Za-z0-9_.]+", "-", rest)}-{short_hash}'
    return Source(
      key=f'tfds-{slug}-{suffix}',
      lock=f'tfds-{slug}',
      open=functools.partial(_open_tfds, name, data_dir, fractions),
      own=False,
      # One cannot fix somebody else's data set; the few are counted in meta.json and on stderr.
      skip_short=True,
    )
  if kind == 'text' and rest:
    text = local_text.LocalText(expand('data.name', name, rest), name, say)
    key = f'text-{text.fingerprint[:16]}-{suffix}'
    return Source(
      key=key,
      lock=key,
      open=functools.partial(_open_local, text, key, data_dir, fractions),
      own=True,
      skip_short=False,
    )
  raise errors.UserError(
    'data.name',
    name,
    f'must be one of {", ".join(TIERS)}, tfds:NAME[/CONFIG][:VERSION], text:PATH'
    f'{errors.did_you_mean(name, TIERS)}',
  )


def expand(field: str, value: str, path: str) -> str:
  """Returns a path of the user's with `~` and `~name` as the home folders that they stand for.

  Raises:
    errors.UserError: if there is no such home folder, or the path can't be one; names `field`.
  """
  if not documents_lib.is_text(path) or '\0' in path:
    raise errors.UserError(field, value, 'must be a path in UTF-8')
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    user = expanded.partition('/')[0]
    raise errors.UserError(field, value, f'must be a path; {user} is no home folder here')
  return expanded


def say(message: str) -> None:
  """Prints what takes time, on stderr."""
  print(f'data: {message}', file=sys.stderr, flush=True)


def _open_tier(
  name: str, data_dir: str, fractions: Fractions, rebuild: bool
) -> tuple[dict[str, Reader], dict[str, Any]]:
  tier = TIERS[name]

  @functools.cache
  def pairs() -> list[tuple[str, documents_lib.Document]]:
    say(f'{name}: fetching {", ".join(f"{p.name} {p.version}" for p in tier.PACKAGES)}')
    paths = packages_lib.fetch(tier.PACKAGES, os.path.join(data_dir, 'downloads'), name)
    kept, num_removed = overlap.remove_held_out_lines(tier.read(paths))
    say(f'{name}: {num_removed} bytes that stand in held-out works left out of training')
    return kept

  def reader(split: str) -> Reader:
    return lambda: (document for split_, document in pairs() if split_ == split)

  read = {split: reader(split) for split in documents_lib.SPLITS}
  readers = _build(read, name, tier.VERSION, data_dir, rebuild)
  return _undivided(readers) if fractions is None else readers, {
    'dataset': name,
    'version': tier.VERSION,
    'packages': [package.provenance() for package in tier.PACKAGES],
  }


def _open_local(
  text: local_text.LocalText, key: str, data_dir: str, fractions: Fractions, rebuild: bool
) -> tuple[dict[str, Reader], dict[str, Any]]:
  provenance: dict[str, Any] = {'dataset': f'text:{text.path}', 'sha256': text.fingerprint}
  if text.left_out:
    say(
      f'{text.path}: {len(text.left_out)} links to what is read under another name left out '
      f'(first: {text.left_out[0]})'
    )
    provenance['num_links_left_out'] = len(text.left_out)
  if fractions is None:
    return _build({WHOLE: lambda: text}, key, '1.0.0', data_dir, rebuild), provenance
  read = _with_splits(lambda: text, fractions, documents_lib.SPLITS)
  readers = _build(read, key, '1.0.0', data_dir, rebuild)
  return readers, provenance | {'valid_fraction': fractions[0], 'test_fraction': fractions[1]}


def _build(
  readers: dict[str, Reader], config_name: str, version: str, data_dir: str, rebuild: bool
) -> dict[str, Reader]:
  """Puts documents through TFDS and returns what reads them back."""
  from moe_jax.data import tfds_source

  def watched(split: str) -> Reader:
    return lambda: progress.watched(readers[split](), f'{config_name}: storing {split}', say)

  builder = tfds_source.build(
    {split: watched(split) for split in readers},
    config_name,
    version,
    os.path.join(data_dir, 'tfds'),
    rebuild=rebuild,
  )
  return {
    split: functools.partial(tfds_source.read, builder, split, config_name)
    for split in builder.info.splits
  }


def _open_tfds(
  name: str, data_dir: str, fractions: Fractions, rebuild: bool
) -> tuple[dict[str, Reader], dict[str, Any]]:
  del rebuild
  from moe_jax.data import tfds_source

  builder = tfds_source.open_named(name, os.path.join(data_dir, 'tfds'))
  if fractions is None:
    every = list(builder.info.splits)
    whole: dict[str, Reader] = {
      split: functools.partial(tfds_source.read, builder, split, name) for split in every
    }
    return _undivided(whole), {'dataset': f'tfds:{builder.info.full_name}', 'splits': every}
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


def _undivided(readers: dict[str, Reader]) -> dict[str, Reader]:
  """Returns one reader of every document, split after split."""
  return {WHOLE: lambda: itertools.chain.from_iterable(read() for read in readers.values())}


def _with_splits(
  read: Reader, fractions: tuple[float, float], splits: Iterable[str]
) -> dict[str, Reader]:
  """Splits whole documents, reading them twice and holding none."""
  splits = tuple(splits)

  @functools.cache
  def assigned() -> list[str]:
    keys, domains, sizes = [], [], []
    for document in progress.watched(read(), 'dividing into splits', say):
      keys.append(documents_lib.content_key(document.text))
      domains.append(document.domain)
      sizes.append(len(document.text.encode()))
    valid = fractions[0] if documents_lib.VALID in splits else 0.0
    test = fractions[1] if documents_lib.TEST in splits else 0.0
    return documents_lib.assign_splits(keys, domains, sizes, valid, test)

  def reader(split: str) -> Reader:
    return lambda: (d for d, s in zip(read(), assigned(), strict=True) if s == split)

  return {split: reader(split) for split in splits}
