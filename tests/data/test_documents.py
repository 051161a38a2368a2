"""Splits by whole documents, and text that stands in two splits."""

import unicodedata

import hypothesis
from hypothesis import strategies as st

from moe_jax.data import documents as documents_lib
from moe_jax.data import overlap

from . import conftest

DOCUMENTS = st.lists(
  st.tuples(st.integers(0, 30).map(str), st.sampled_from('ab'), st.integers(1, 50)),
  min_size=1,
  max_size=40,
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(DOCUMENTS, st.randoms())
def test_splits_are_stable_and_by_content(documents, rng):
  def assign(documents):
    keys, domains, sizes = map(list, zip(*documents, strict=True))
    return documents_lib.assign_splits(keys, domains, sizes, 0.2, 0.2)

  splits = assign(documents)
  by_key = {}
  for (key, _, _), split in zip(documents, splits, strict=True):
    assert by_key.setdefault(key, split) == split
  shuffled = rng.sample(documents, len(documents))
  assert {d[0]: s for d, s in zip(shuffled, assign(shuffled), strict=True)} == by_key
  if len({domain for _, domain, _ in documents}) == 1:
    assert 'train' in splits
    assert set(splits) == {'train', 'test', 'valid'} or len(by_key) < 3


def test_shares_are_near_what_was_asked():
  keys = [documents_lib.content_key(str(i)) for i in range(1000)]
  splits = documents_lib.assign_splits(keys, ['a'] * 1000, [10] * 1000, 0.05, 0.1)
  assert splits.count('valid') == 50
  assert splits.count('test') == 100


def test_a_huge_work_is_not_held_out_for_a_small_share():
  keys = [documents_lib.content_key(str(i)) for i in range(10)]
  for huge in range(10):
    sizes = [1000 if i == huge else 10 for i in range(10)]
    splits = documents_lib.assign_splits(keys, ['a'] * 10, sizes, 0.05, 0.05)
    assert splits[huge] == 'train'


# One folded to two letters, one decomposed, one with a ligature, one both decomposed and folded,
# one whose iota becomes a letter, and one square sign for letters.
SAME = (
  ('Straße', 'STRASSE'),
  ('caf\u00e9', 'CAFE\u0301'),
  ('\ufb01n  de\nsi\u00e8cle', 'FIN DE SIE\u0300CLE'),
  ('\u1fb4', '\u0391\u0301\u0399'),
  ('\u1fb4', '\u1fb3\u0301'),
  ('\u3392', 'mhz'),
  # Soft hyphen, byte order mark; zero-width space, joiners, marks of direction; selectors; fillers.
  ('\ufeffStra\u00ad\u00dfe', 'STRASSE'),
  ('un\u200bseen\u200c\u200d\u200e \u2060\u2066sea\u2069', 'unseen sea'),
  ('\u2764\ufe0f \u845b\U000e0100', '\u2764 \u845b'),
  ('a\u034f\u0301', '\u00e1'),
  ('a\u3164\uffa0b', 'ab'),
)
# Shown, though of the category of format characters; and what separates words.
DIFFERENT = (('resume', 'résumé'), ('\u06005', '5'), ('a\u00a0b', 'ab'), ('a\u2009b', 'ab'))


def test_texts_that_differ_in_case_or_unicode_form_are_one_work():
  for one, other in SAME:
    assert documents_lib.content_key(one) == documents_lib.content_key(other)
  for one, other in DIFFERENT:
    assert documents_lib.content_key(one) != documents_lib.content_key(other)
  # Twelve works, each there twice: 7 stood in two splits while only letters were lowered.
  works = [text for i in range(12) for text in (f'Große Straße {i}', f'GROSSE STRASSE {i}')]
  keys = [documents_lib.content_key(text) for text in works]
  splits = documents_lib.assign_splits(keys, ['a'] * 24, [10] * 24, 0.2, 0.2)
  assert splits[::2] == splits[1::2]
  assert set(splits) == {'train', 'valid', 'test'}


def test_held_out_lines_are_found_in_another_unicode_form():
  line = 'Über der stillen Straße geht ein großer Mond und schweigt zu aller Nacht'
  held_out = documents_lib.Document(line, 'a', 'poem')
  rest = 'Something else that only the reader of this very book has ever seen before now.\n'
  decomposed = unicodedata.normalize('NFD', f'{rest}{line}\n{rest}')
  hyphenated = f'{rest}{line}\n{rest}'.replace('still', 'stil\u00adl')
  for text in (f'{rest}{line.upper()}\n{rest}', decomposed, hyphenated):
    document = documents_lib.Document(text, 'a', 'book')
    kept, _ = overlap.remove_held_out_lines([('test', held_out), ('train', document)])
    assert kept[1][1].text == rest + rest


def test_one_document_only_trains():
  assert documents_lib.assign_splits(['k'], ['a'], [10], 0.4, 0.4) == ['train']
  assert sorted(documents_lib.assign_splits(['k', 'l'], ['a'] * 2, [9, 9], 0.4, 0.4)) == [
    'test',
    'train',
  ]


def _document(text, name):
  return documents_lib.Document(text, 'a', name)


def test_quoted_lines_leave_the_training_text_and_nothing_else_does():
  held_out = conftest.prose('held out', 20)
  line, other = held_out.splitlines()[3], held_out.splitlines()[9]
  own = conftest.prose('own', 20)
  # Other case, other punctuation, and broken elsewhere.
  words = other.split()
  quoted = f'{line.upper()}!\n"{" ".join(words[:5])}\n{" ".join(words[5:])}"\n'
  pairs = [('train', _document(own + quoted + own[:50], 'x')), ('test', _document(held_out, 'y'))]
  kept, removed = overlap.remove_held_out_lines(pairs)
  assert kept[0][1].text == own + own[:50]
  assert kept[1] == pairs[1]
  assert removed == len(quoted)


def test_short_formulas_stay():
  held_out = conftest.prose('held out', 5) + 'and it is so in a way of it\n'
  train = conftest.prose('own', 5) + 'and it is so in a way of it\n'
  pairs = [('train', _document(train, 'x')), ('valid', _document(held_out, 'y'))]
  assert overlap.remove_held_out_lines(pairs) == (pairs, 0)


def test_copies_of_held_out_works_and_of_each_other_go():
  held_out, own = conftest.prose('held out', 20), conftest.prose('own', 20)
  pairs = [
    ('train', _document(own, 'own')),
    ('train', _document(own.upper(), 'copy')),
    ('train', _document('Preface.\n' + held_out[: len(held_out) // 2], 'excerpt')),
    ('test', _document(held_out, 'held out')),
  ]
  kept, _ = overlap.remove_held_out_lines(pairs)
  assert [document.name for _, document in kept] == ['own', 'held out']


def test_nothing_held_out_and_empty():
  pairs = [('train', _document(conftest.prose('own', 3), 'x'))]
  assert overlap.remove_held_out_lines(pairs) == (pairs, 0)
  assert overlap.remove_held_out_lines([]) == ([], 0)
