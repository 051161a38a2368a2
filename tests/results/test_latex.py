"""table.tex: which columns stand in it, and that no name breaks it."""

import dataclasses
import re

import pytest

from moe_jax.results import latex, summary, tables
from moe_jax.study import Comparison
from tests.results import example, made, shown

DROPS = 'capacity/router/drop_share'


@pytest.fixture(scope='module')
def broken():
  return made.make_broken()


def _planned(text):
  """The rows of the table of arms, and those of planned comparisons."""
  rows = shown.check_latex(text)
  first = next(i for i, row in enumerate(rows) if row[:3] == ['', 'difference', 'p'])
  return rows[:first], rows[first + 1 :]


def test_one_table_of_arms_and_one_of_comparisons(broken):
  text = latex.latex(broken)
  assert text.count(r'\begin{table}[tb]') == text.count(r'\caption{') == 2
  labels = re.findall(r'\\label\{(.*?)\}', text)
  assert labels == ['tab:my-study', 'tab:my-study-comparisons']
  arms, planned = _planned(text)
  # Heads of more than one line stand in rows of their own.
  assert [row[0] for row in arms if row[0]] == ['dense', made.HOSTILE, 'single', 'dead']
  assert arms[-2][1:3] == ['$1.235$', '$-0.8654$'] and arms[-1][1:3] == ['--', '--']
  assert [row[0] for row in planned] == [f'{made.HOSTILE} vs. dense', f'dead vs. {made.HOSTILE}']
  assert [row[-1] for row in planned] == ['better', 'untested']
  assert planned[0][1:3] == [r'$-0.49_{\pm 0.13}$', '$0.026$']
  caption = re.findall(r'\\caption\{(.*)\}', text)[0].replace(r'\allowbreak{}', '')
  assert caption.startswith(r'Is 50\% of \$5 \{enough\}? Bits per byte of the dropless evaluation')
  assert 'over 0 to 3 seeds' in caption and '6 of 12 trials have no value' in caption


def test_what_an_author_must_deal_with_is_a_comment(broken):
  comments = [line[2:] for line in latex.latex(broken).split('\n') if line.startswith('% ')]
  assert [c for c in comments if c.startswith('Warning')] == [
    f'Warning: {warning}' for warning in broken.warnings
  ]
  assert 'Trials without a value: single, seed 0: missing: no record' in comments
  assert 'Arms that were not run: [none] \\: K_2 > E & more' in comments


def test_columns_that_do_not_fit_are_named_or_stand_below():
  of = _of_example()
  every = [column.key for column in tables.columns(of)]
  text = latex.latex(of)
  assert text.count(r'\begin{tabular') == 2
  left_out = re.search('% Not wide enough for these columns; .* show them: (.*)\\.', text)[1]
  titles = {column.title for column in tables.columns(of)}
  assert titles > set(left_out.split('; ')) != set()
  assert left_out.split('; ') == [column.title for column in latex.left_out(of)]
  assert latex.left_out(of, every) == [] and len(latex.left_out(of, wide=True)) < len(
    latex.left_out(of)
  )
  asked = latex.latex(of, every)
  rows = [row for row in shown.check_latex(asked) if row[0] == 'dense']
  # All of them, once each, next to the name of the arm.
  assert sum(len(row) - 1 for row in rows) == len(every) and len(rows) > 1
  assert 'Not wide enough' not in asked
  wide = latex.latex(of, every, wide=True)
  assert wide.count(r'\begin{table*}[tb]') == wide.count(r'\end{table*}') == 2
  assert len([row for row in shown.check_latex(wide) if row[0] == 'dense']) < len(rows)


def test_names_lack_what_all_arms_share():
  arms = ('a=1, b=2', 'a=1, b=3')
  study = made.make_study(arms, baseline=arms[0], comparisons=(Comparison(arms[1], arms[0]),))
  records = made.make_records({arms[0]: [1.0, 2.0, 3.0], arms[1]: [2.0, 3.0, 5.0]})
  rows = shown.check_latex(latex.latex(summary.summarize(study, records)))
  assert [row[0] for row in rows if row[0]] == ['b=2', 'b=3', 'b=3']
  text = latex.latex(summary.summarize(study, records)).replace(r'\allowbreak{}', '')
  assert 'Differences to b=2 are paired by seed' in text


def _of_example():
  study = dataclasses.replace(example.study(), may_differ=('compute',))
  return summary.summarize(study, example.records())
