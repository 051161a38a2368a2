"""Examines a source that is not prepared: properties known without a network and encoding."""

import collections
import dataclasses
import os
from collections.abc import Mapping

from moe_jax.data import documents as documents_lib
from moe_jax.data import local_text, sources


@dataclasses.dataclass(frozen=True)
class Examined:
  """Properties of a source that is not prepared.

  Attributes:
    name: the user's `data.name`.
    counts: by split, documents of each domain; None if only preparing it tells.
    note: in a few words, what is known and what is not.
  """

  name: str
  counts: Mapping[str, Mapping[str, int]] | None
  note: str

  @property
  def domains(self) -> tuple[str, ...]:
    """Sorted, as in `Dataset`; none if they are not known."""
    return tuple(sorted({domain for split in (self.counts or {}).values() for domain in split}))

  def num_documents(self, split: str, domain: str | None = None) -> int:
    """Returns how many documents a split will hold, of one domain or all.

    Raises:
      ValueError: if that is not known.
    """
    if self.counts is None:
      raise ValueError(f'{self.name}: {self.note}')
    return sum(n for name, n in self.counts[split].items() if domain in (None, name))


def examine(name: str, *, data_dir: str, valid_fraction: float, test_fraction: float) -> Examined:
  """Reads a user's own text, and divides it as preparing it would; asks TFDS whether a name is its.

  Takes and raises what `prepare.open_dataset` does, and writes nothing.
  """
  data_dir = os.path.abspath(sources.expand('data.data_dir', data_dir, data_dir))
  sources.find_source(name, data_dir, (valid_fraction, test_fraction))
  kind, _, rest = name.partition(':')
  if kind == 'tfds':
    from moe_jax.data import tfds_source

    tfds_source.check_name(name)
    return Examined(name, None, 'is known to TFDS; what it holds is checked when it is prepared')
  if kind != 'text':
    return Examined(name, None, 'is fetched, and checked, when it is prepared')
  text = local_text.LocalText(sources.expand('data.name', name, rest), name)
  keys, domains, sizes = [], [], []
  for document in text:
    keys.append(documents_lib.content_key(document.text))
    domains.append(document.domain)
    sizes.append(len(document.text.encode()))
  splits = documents_lib.assign_splits(keys, domains, sizes, valid_fraction, test_fraction)
  pairs = collections.Counter(zip(splits, domains, strict=True))
  counts = {
    split: {domain: n for (s, domain), n in pairs.items() if s == split}
    for split in documents_lib.SPLITS
  }
  shown = ', '.join(f'{splits.count(split)} {split}' for split in documents_lib.SPLITS)
  note = f'was read, documents: {shown}; its tokens are counted when it is prepared'
  return Examined(name, counts, note)
