"""The paragraph on methods and the citation, of hand-made studies."""

import pathlib
import re

import pytest

from moe_jax.errors import DamagedError, UserError
from moe_jax.results import methods, summary
from moe_jax.study import Point
from tests.results import made, shown

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def broken():
  return made.make_broken()


def test_methods_say_what_was_done(broken):
  text = methods.methods(broken)
  assert shown.check_latex(text) == [] and text.count('\n') == 2
  text = text.replace(r'\allowbreak{}', '')
  for words in (
    'my\\_study (4 arms): Is 50\\% of',
    '2 blocks, width 128, 4 heads; they have 1.2M parameters, of which 400k',
    'differ in moe.num\\_experts.',
    'tier1 (fingerprint ffffffffffffffff) as bytes for 1000 steps, 32 sequences a step',
    'seeds 0, 1, 2,',
    'dropless/bits\\_per\\_byte in bits per byte on the test split (lower is better)',
    '2 planned comparisons: mean difference paired by seed',
    # dense 3, hostile 2, single 1.
    '6 of 12 trials have no value and are in no mean (1 diverged, 2 missing, 3 failed)',
    f'moe\\_jax at commit {made.COMMIT[:12]}, on 8 x cpu (cpu).',
  ):
    assert words in text, (words, text)
  assert 'uncommitted' not in text and 'causal' not in text


def test_methods_say_what_is_wrong():
  records = [
    made.make_record(
      'dense',
      seed,
      config=made.make_config(router='expert_choice', num_experts=4 + 4 * seed),
      git_dirty=True,
      git_commit=commit,
      parameters={'total': 1000 + seed, 'active': 1000 * (1 + seed)},
    )
    for seed, commit in enumerate(['a1', 'b2'])
  ]
  made_of = summary.summarize(made.make_study(['dense'], seeds=(0, 1)), records)
  text = methods.methods(made_of).replace(r'\allowbreak{}', '')
  assert (
    'dense is not causal: a token can depend on later ones (moe.router=expert\\_choice)' in text
  )
  assert 'commits a1, b2 with uncommitted changes' in text
  assert 'Arms differ' not in text and 'planned' not in text and 'no value' not in text
  text = methods.bibtex(made_of)
  assert 'note = {Version 0.1.0, Git commits a1, b2, with uncommitted changes}' in text
  assert 'year' not in text


def test_bibtex_is_what_citation_says(broken):
  citation = (REPOSITORY / 'CITATION.cff').read_text(encoding='utf-8')
  of = dict(re.findall(r'^(?:  - )?(\w[\w-]*): (.+)$', citation, re.MULTILINE))
  assert (of['title'], of['name']) == (methods.TITLE, methods.AUTHOR)
  assert (of['version'], of['license']) == (methods.VERSION, methods.LICENSE)
  assert len(re.findall(r'^  - name:', citation, re.MULTILINE)) == 1
  text = methods.bibtex(broken)
  assert text.startswith('@misc{moe_jax,\n') and text.count('{') == text.count('}')
  assert 'author = {{The moe\\_jax maintainers}}' in text and f'commit = {{{made.COMMIT}}}' in text
  assert methods.repository() == of.get('repository-code', '')


def test_a_fork_says_in_citation_where_it_is(broken, tmp_path):
  path = tmp_path / 'CITATION.cff'
  address = 'https://example.org/a_b/moe?x=1%20#y'
  for line, url in (
    (f'repository-code: {address}', address),
    (f'repository-code: "{address}"  # the fork', address),
    ('repository-code: ""', ''),
    ('repository-code:', ''),
    ('version: 1', ''),
  ):
    path.write_text(f'cff-version: 1.2.0\n{line}\n', encoding='utf-8')
    assert methods.repository(path) == url, line
  assert methods.repository(tmp_path / 'none') == ''
  assert f'\n  url = {{{address}}},\n' in methods.bibtex(broken, address)
  assert 'url' not in methods.bibtex(broken)
  for value in ('somewhere', '[https://a.b]', 'https://a.b/{c}', '3'):
    path.write_text(f'repository-code: {value}\n', encoding='utf-8')
    with pytest.raises(UserError, match='repository-code='):
      methods.repository(path)
  for content in (b'a: [', b'\xff\xfe', b'', b'- a'):
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r'CITATION\.cff'):
      methods.repository(path)


def test_bibtex_is_of_the_day_of_the_last_commit():
  records = [
    made.make_record('dense', seed, git_commit=commit, git_date=date)
    for seed, (commit, date) in enumerate(
      [('b' * 40, '2026-11-30'), ('a' * 40, '2026-12-01'), ('c' * 40, '')]
    )
  ]
  text = methods.bibtex(summary.summarize(made.make_study(['dense']), records))
  assert '  year = {2026},\n  month = {12},\n  date = {2026-12-01},\n' in text
  dated = f'{"a" * 12} (2026-12-01), {"b" * 12} (2026-11-30), {"c" * 12}'
  assert f'Git commits {dated}}}' in text.replace(r'\allowbreak{}', '')


def test_arms_differ_in_fields_whose_values_do():
  none = {'moe.renormalize': 'none'}
  same = {'moe.mlp_dim': made.make_config()['moe']['mlp_dim']}
  arms = (Point('few', none | {'moe.num_experts': 4} | same), Point('many', none))
  text = methods.methods(summary.summarize(made.make_study(arms), []))
  # Many has the base's 8 experts, and the base's width.
  assert 'Arms differ in moe.num\\_experts.' in text.replace(r'\allowbreak{}', '')
