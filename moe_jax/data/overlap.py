"""Text that stands in two splits at once: finds it, and takes it out of the training side.

A compilation may quote a held-out poem whole, and parallel books (Kings and Chronicles, the
synoptic Gospels) repeat each other verse by verse. A model that has read such lines in training is
measured on memory, not on the language.
"""

import re
import zlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, UInt64

from moe_jax.data import documents as documents_lib

# Shorter runs are formulas of the language ("and it came to pass in those days").
RUN_WORDS = 8
RUN_CHARACTERS = 60

_WORD = re.compile(r'[^\W_]+')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def remove_held_out_lines(
  documents: Iterable[tuple[str, documents_lib.Document]],
) -> tuple[list[tuple[str, documents_lib.Document]], int]:
  """Drops from training documents the lines that held-out documents also contain.

  A line is dropped when every word of it lies in a run of at least `RUN_WORDS` words and
  `RUN_CHARACTERS` letters and digits that also occurs in a held-out document, whatever its case,
  punctuation or line breaks. A training document of which less than half is left is dropped as a
  whole, and so is every document of the same split whose text has been seen before.

  Args:
    documents: (split, document) pairs.

  Returns:
    The pairs that stay, in order, and the number of bytes dropped.
  """
  pairs = list(documents)
  held_out = [_shingles(_words(d.text)) for split, d in pairs if split != documents_lib.TRAIN]
  known = np.unique(np.concatenate(held_out)) if held_out else np.zeros(0, np.uint64)
  seen: set[str] = set()
  kept, removed = [], 0
  for split, document in pairs:
    key = documents_lib.content_key(document.text)
    text = document.text if key not in seen else ''
    seen.add(key)
    if split == documents_lib.TRAIN and text:
      text = _without_known_lines(text, known)
    if len(text) < 0.5 * len(document.text):
      removed += len(document.text.encode())
      continue
    removed += len(document.text.encode()) - len(text.encode())
    if len(text) != len(document.text):
      document = documents_lib.Document(text, document.domain, document.name)
    kept.append((split, document))
  return kept, removed


def _words(text: str) -> list[str]:
  return _WORD.findall(documents_lib.folded(text))


def _shingles(words: list[str]) -> UInt64[np.ndarray, 'N']:
  """Hashes every run of RUN_WORDS words; empty when there are fewer."""
  codes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
  count = max(len(words) - RUN_WORDS + 1, 0)
  result = np.zeros(count, np.uint64)
  for i in range(RUN_WORDS):
    # Wraps around on purpose: a polynomial hash modulo 2**64.
    result = result * _MULTIPLIER + codes[i : i + count]
  return result ^ (result >> np.uint64(29))


def _covered(words: list[str], known: UInt64[np.ndarray, 'M']) -> Bool[np.ndarray, 'N']:
  """Marks the words that lie in a long enough run that `known` contains."""
  marks = np.zeros(len(words), bool)
  shingles = _shingles(words)
  if not len(known) or not len(shingles):
    return marks
  # np.isin would sort `known` again for every document.
  nearest = np.minimum(np.searchsorted(known, shingles), len(known) - 1)
  for start in np.flatnonzero(known[nearest] == shingles):
    marks[start : start + RUN_WORDS] = True
  edges = np.flatnonzero(np.diff(marks, prepend=False, append=False))
  for start, stop in edges.reshape(-1, 2):
    if sum(len(word) for word in words[start:stop]) + stop - start - 1 < RUN_CHARACTERS:
      marks[start:stop] = False
  return marks


def _without_known_lines(text: str, known: UInt64[np.ndarray, 'M']) -> str:
  words = _words(text)
  marks = _covered(words, known)
  if not marks.any():
    return text
  unknown_before = np.concatenate([[0], np.cumsum(~marks)])
  lines, start = [], 0
  for line in text.splitlines(keepends=True):
    stop = start + len(_words(line))
    if stop == start or unknown_before[stop] > unknown_before[start]:
      lines.append(line)
    start = stop
  return ''.join(lines)
