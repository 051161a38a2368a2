"""Tables of hand-made studies: numbers as they must read, and names that no format can break."""

import csv
import io
import math
import re
import shutil
import subprocess

import pytest

from moe_jax.errors import UserError
from moe_jax.results import markup, methods, summary, tables
from moe_jax.results.statistics import Interval
from moe_jax.study import Comparison
from tests.results import made, shown

NUMBER = tables._Style(str, str, '-')


@pytest.fixture(scope='module')
def broken():
  return made.make_broken()


def test_arms_in_markdown():
  values = {'dense': [3.0, 5.0, 7.0], 'moe': [2.0, 3.0, 4.0]}
  study = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  text = tables.markdown(summary.summarize(study, made.make_records(values)))
  # Half widths: 4.30265 * 2 / sqrt(3) = 4.968 and half of it. Tokens of an expert: 2 of 8.
  rest = '1.2M | 400k | 2.4M | 800k | 200k |\n'
  assert f'\n| dense | 3 of 3 | 5.0 ± 5.0 | - | {rest}' in text
  assert f'\n| moe | 3 of 3 | 3.0 ± 2.5 | -2.0 ± 2.5 | {rest}' in text
  # p = 1 - sqrt(12 / 14).
  assert '\n| moe | dense | open | 3 | -2.0 ± 2.5 | 0.074 | 0.074 |\n' in text
  assert text.startswith('Does it help?\n\n| arm | averaged | bits per byte | minus dense |')
  assert 'dropless/bits\\_per\\_byte in bits per byte on the test split (lower is better)' in text
  for title in ('Trials without', 'Arms that were not run', 'Warnings'):
    assert title not in text


def test_nothing_is_left_out_of_markdown(broken):
  text = tables.markdown(broken)
  for row in shown.markdown_rows(text):
    assert len(row) in (9, 7)
  names = [row[0] for row in shown.markdown_rows(text) if len(row) == 9][2:]
  assert names == ['dense', made.HOSTILE, 'single', 'dead']
  plain = shown.markdown_shown(text)
  assert f'- {made.HOSTILE}, seed 2: diverged at step 40 of 100: loss is nan: x_1 ^ ' in plain
  assert '- single, seed 0: missing: no record\n' in plain
  assert plain.count('- dead, seed ') == 3 and '- [none] \\: K_2 > E & more\n' in plain
  for warning in broken.warnings:
    assert f'- {warning}\n' in plain
  assert '| single | 1 of 3 | 1.235 | -0.8654 |' in text
  assert '| dead | 0 of 3 | - | - | 1.2M | 400k | 2.4M | - | - |' in text
  # Differences -0.5 and -0.48: t = 0.49 / 0.01, p = 2 / pi * atan(1 / 49) = 0.0130. Holm's over
  # both, also where nothing is paired and there is no p-value.
  assert re.search(r'\| dense \| better \| 2 \| -0.49 ± 0.13 \| 0.013 \| 0.026 \|\n', text)
  assert re.search(r'\| dead \| .* \| untested \| 0 \| - \| - \| - \|\n', text)


def test_nothing_is_left_out_of_latex(broken):
  text = tables.latex(broken)
  cells = shown.check_latex(text)
  arms, planned = _joined(cells)
  assert list(arms) == ['arm', 'dense', made.HOSTILE, 'single', 'dead']
  assert [len(row) for row in arms.values()] == [8] * 5
  assert [row[:2] for row in planned.values()] == [
    ['minus', 'verdict'],
    ['dense', 'better'],
    [made.HOSTILE, 'untested'],
  ]
  assert list(planned) == ['arm', made.HOSTILE, 'dead']
  assert arms['single'][:3] == ['1 of 3', '$1.235$', '$-0.8654$']
  assert arms['dense'][1] == r'$2.10 \pm 0.25$'
  items = [shown.latex_shown(item) for item in re.findall(r'^\\item (.*)$', text, re.MULTILINE)]
  assert items[0] == (
    f'{made.HOSTILE}, seed 2: diverged at step 40 of 100: loss is nan: x_1 ^ \\end{{tabular}} & %'
  )
  assert items[1] == 'single, seed 0: missing: no record'
  assert items[3] == 'dead, seed 0: failed at step 100 of 100: [U+03BB][U+0000]é'
  assert items[-1] == '[none] \\: K_2 > E & more' and len(items) == 7
  comments = [line for line in text.split('\n') if line.startswith('%')]
  assert comments[2:] == [f'% Warning: {warning}' for warning in broken.warnings]


def test_a_wide_latex_table_goes_on_in_a_second_one(broken):
  text = tables.latex(broken)
  assert text.count(r'\begin{tabular}') > 2
  for row in shown.check_latex(text):
    # With the two characters between columns. Beside names that long one column is not too many.
    width = sum(len(cell.strip('$').replace(r'\pm', '±')) + 2 for cell in row)
    assert width <= 88 or len(row) in (2, 4)
  # An arm of a short name needs one.
  narrow = made.make_study()
  assert tables.latex(summary.summarize(narrow, [])).count(r'\begin{tabular}') == 2


def _joined(cells: list[list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
  """Returns cells beside the name of an arm, of all parts: of arms, of planned comparisons."""
  arms: dict[str, list[str]] = {}
  planned: dict[str, list[str]] = {}
  first = cells.index(next(row for row in cells if row[:2] == ['arm', 'minus']))
  for number, (name, *others) in enumerate(cells):
    (arms if number < first else planned).setdefault(name, []).extend(others)
  return arms, planned


def test_further_columns(broken):
  name = 'capacity/router/drop_share'
  row = shown.markdown_rows(tables.markdown(broken, {name: 'drops'}))[3]
  # 0.25 and 0.5: deviation 0.177, standard error 0.125, half width 12.7062 * 0.125.
  assert row[0] == made.HOSTILE and row[9] == '0.4 ± 1.6'
  cells = shown.check_latex(tables.latex(broken, {name: 'drops'}))
  arms, _ = _joined(cells)
  assert [row[-1] for row in arms.values()][:3] == ['drops', '--', r'$0.4 \pm 1.6$']
  for table in (tables.markdown, tables.latex):
    with pytest.raises(UserError, match='metrics=.*capacity/router/drop_share'):
      table(broken, {'capacity/drop_share': 'drops'})


@pytest.mark.parametrize(
  ('mean', 'half', 'text'),
  [
    (2.28234, 0.01214, '2.282 ± 0.012'),
    (2.28234, 0.0996, '2.282 ± 0.100'),
    (2.28234, 1.26, '2.3 ± 1.3'),
    (123.456, 34.4, '123 ± 34'),
    (12345.6, 678.9, '12346 ± 679'),
    (-0.0001, 0.01, '0.000 ± 0.010'),
    (1e-6, 2.5e-7, '0.00000100 ± 0.00000025'),
    (2.0, 1e-17, '2.000000000000 ± 0.000000000000'),
    (2.0, 0.0, '2 ± 0'),
    (1.23456, math.nan, '1.235'),
    (math.nan, math.nan, '-'),
  ],
)
def test_digits_come_from_the_interval(mean, half, text):
  interval = Interval(mean, mean - half, mean + half, 3)
  if half == 1e-17:
    interval = Interval(0.0, -half, half, 3)
    text = text.replace('2.0', '0.0')
  assert tables._interval(interval, NUMBER) == text
  if not math.isnan(mean):
    sign = '' if text.startswith('-') else '+'
    assert tables._interval(interval, NUMBER, '+') == sign + text


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, '0'), (999, '999'), (999.4, '999'), (999.6, '1k'), (1234, '1.23k'), (999_600, '1M'),
    (3.28e6, '3.28M'), (1.5e9, '1.5G'), (2e12, '2T'), (4096.5, '4.1k'),
  ],
)  # fmt: skip
def test_counts(number, text):
  assert tables.count(number) == text


@pytest.mark.parametrize(
  ('p', 'text'), [(math.nan, '-'), (0.0004, '<0.001'), (0.0123, '0.012'), (1.0, '1.000')]
)
def test_p_values(p, text):
  assert tables._p_value(p, NUMBER) == text


def test_csv_has_every_arm_and_every_digit(broken):
  rows = list(csv.DictReader(io.StringIO(tables.csv_text(broken))))
  assert [row['arm'] for row in rows] == [arm.name for arm in broken.arms]
  by_name = {row['arm']: row for row in rows}
  hostile, arm = by_name[made.HOSTILE], broken.arms[1]
  assert float(hostile['mean']) == arm.interval.mean
  assert float(hostile['low']) == arm.interval.low
  assert float(hostile['high']) == arm.interval.high
  assert float(hostile['bootstrap_low']) == 1.5 and float(hostile['bootstrap_high']) == 1.62
  assert float(hostile['difference']) == arm.difference.interval.mean
  assert float(hostile['difference_low']) == arm.difference.interval.low
  assert float(hostile['difference_p']) == arm.difference.p_value
  assert hostile['difference_pairs'] == '2' and hostile['trials'] == '3'
  assert (hostile['seed 0'], hostile['seed 1'], hostile['seed 2']) == ('1.5', '1.62', '')
  assert hostile['capacity/router/drop_share'] == '0.375'
  assert hostile['without_value'].startswith('seed 2: diverged at step 40 of 100: loss is nan')
  assert hostile['parameters_total'] == '1200000' and hostile['tokens_per_expert'] == '200000.0'
  single, none, dead = by_name['single'], by_name['[none] \\'], by_name['dead']
  assert single['mean'] == '1.23456789' and single['low'] == single['difference_p'] == ''
  assert none['dropped'] == 'K_2 > E & more' and none['mean'] == '' and none['averaged'] == '0'
  assert dead['mean'] == '' and dead['without_value'].count('failed') == 3
  assert all(None not in row and None not in row.values() for row in rows)


def test_a_study_without_records():
  empty = summary.summarize(made.make_study(), [])
  shown.check_latex(tables.latex(empty))
  shown.check_latex(methods.methods(empty))
  assert tables.markdown(empty).count('missing: no record') == 6
  assert tables.csv_text(empty).count('\n') == 3
  assert 'note = {Git commit unknown}' in methods.bibtex(empty)
  assert tables.csv_text(summary.summarize(made.make_study(()), [])) == 'arm\n'


@pytest.mark.slow
def test_compilers_at_hand_take_it(broken, tmp_path):
  # In addition to the checks above, which need none.
  document = '\n'.join(
    [
      r'\documentclass{article}',
      r'\usepackage{booktabs}',
      r'\begin{document}',
      r'\begin{table}',
      tables.latex(broken, {'capacity/router/drop_share': 'drops'}),
      r'\end{table}',
      methods.methods(broken),
      # Everything of ASCII, and the accents that are let through.
      markup.escape_latex(''.join(map(chr, range(0x180)))),
      r'\end{document}',
    ]
  )
  (tmp_path / 'paper.tex').write_text(document, encoding='utf-8')
  options = {
    'pdflatex': ['-halt-on-error', '-interaction=nonstopmode', '-draftmode'],
    'tectonic': [],
  }
  for compiler, flags in options.items():
    if shutil.which(compiler):
      done = subprocess.run(
        [compiler, *flags, 'paper.tex'], cwd=tmp_path, capture_output=True, timeout=300, check=False
      )
      assert done.returncode == 0, done.stdout[-2000:]
