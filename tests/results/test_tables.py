"""Tables of hand-made studies: numbers as they must read, and names that no format can break."""

import csv
import dataclasses
import io
import math
import re

import pytest

from moe_jax.errors import UserError
from moe_jax.results import csv_table, latex, methods, number_text, summary, tables
from moe_jax.results.statistics import Interval
from moe_jax.study import Comparison, Metric, Point
from tests.results import made, shown


@pytest.fixture(scope='module')
def broken():
  return made.make_broken()


def test_arms_in_markdown():
  values = {'dense': [3.0, 5.0, 7.0], 'moe': [2.0, 3.0, 4.0]}
  study = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  text = tables.markdown(summary.summarize(study, made.make_records(values)))
  # Half widths: 4.30265 * 2 / sqrt(3) = 4.968 and half of it. Tokens of an expert: 2 of 8.
  assert '\n| dense | 5.0 ± 5.0 | - |\n' in text
  assert '\n| moe | 3.0 ± 2.5 | -2.0 ± 2.5 |\n' in text
  assert 'FLOPs / token 2.4M, tokens 800k, tokens / expert 200k.' in text
  # p = 1 - sqrt(12 / 14).
  assert '\n| moe | dense | undecided | 3 | -2.0 ± 2.5 | 0.074 | 0.074 |\n' in text
  assert text.startswith('Does it help?\n\n| arm | bits per byte | minus dense |')
  assert 'dropless/bits\\_per\\_byte in bits per byte on the test split (lower is better)' in text
  for title in ('Trials without', 'Arms that were not run', 'Warnings'):
    assert title not in text


def test_nothing_is_left_out_of_markdown(broken):
  text = tables.markdown(broken)
  for row in shown.markdown_rows(text):
    assert len(row) in (5, 7)
  names = [row[0] for row in shown.markdown_rows(text) if len(row) == 5][2:]
  assert names == ['dense', made.HOSTILE, 'single', 'dead']
  plain = shown.markdown_shown(text)
  assert f'- {made.HOSTILE}, seed 2: diverged at step 40 of 100: loss is nan: x_1 ^ ' in plain
  assert '- single, seed 0: missing: no record\n' in plain
  assert plain.count('- dead, seed ') == 3 and '- [none] \\: K_2 > E & more\n' in plain
  for warning in broken.warnings:
    assert f'- {warning}\n' in plain
  assert '| single | 1 of 3 | 1.235 | -0.8654 | - |' in text
  assert '| dead | 0 of 3 | - | - | - |' in text
  # Dead has no tokens, and those of the others are the same.
  same = 'parameters 1.2M, active 400k, FLOPs / token 2.4M, tokens 800k, tokens / expert 200k'
  assert f'The same for all arms: {same}.' in text
  # Differences -0.5 and -0.48: t = 0.49 / 0.01, p = 2 / pi * atan(1 / 49) = 0.0130. Holm's over
  # both, also where nothing is paired and there is no p-value.
  assert re.search(r'\| dense \| better \| 2 \| -0.49 ± 0.13 \| 0.013 \| 0.026 \|\n', text)
  assert re.search(r'\| dead \| .* \| untested \| 0 \| - \| - \| - \|\n', text)


def test_columns_that_are_the_same_for_all_arms_are_said_below():
  values = {'dense': [3.0, 5.0, 7.0], 'moe': [2.0, 3.0, 4.0]}
  records = made.make_records(values)
  of = summary.summarize(made.make_study(), records)
  assert [column.key for column in tables.columns(of)] == ['metric']
  same = 'seeds 3, parameters 1.2M, active 400k, FLOPs / token 2.4M, tokens 800k'
  assert f'The same for all arms: {same}, tokens / expert 200k.' in tables.markdown(of)
  # One arm of another size, with one seed less.
  other = [dataclasses.replace(r, parameters={'total': 7, 'active': 7}) for r in records[3:5]]
  of = summary.summarize(made.make_study(), records[:3] + other)
  assert [column.key for column in tables.columns(of)] == [
    'seeds', 'metric', 'parameters', 'active'
  ]  # fmt: skip
  assert '| 2 of 3 | 2.5 ± 6.4 | 7 | 7 |' in tables.markdown(of)


def test_columns_are_those_that_are_asked_for(broken):
  drops = 'capacity/router/drop_share'
  rows = shown.markdown_rows(tables.markdown(broken, [drops, 'tokens', 'metric']))
  assert rows[0] == ['arm', 'drop share', 'tokens', 'bits per byte']
  # 0.25 and 0.5: deviation 0.177, standard error 0.125, half width 12.7062 * 0.125.
  assert rows[3] == [made.HOSTILE, '0.4 ± 1.6', '800k', '1.56 ± 0.76']
  for key in ('capacity/drop_share', 'drop_share', 'router/drop_shar'):
    with pytest.raises(UserError, match='did you mean .*capacity/router/drop_share') as caught:
      tables.columns(broken, ['tokens', key])
    assert str(caught.value).startswith(f'--columns={key!r}: no such column')
  for key in ('zzzz', ''):
    with pytest.raises(UserError, match='must be among seeds, metric, .*, as ') as caught:
      tables.columns(broken, [key])
    # A single path stands for all of them.
    assert str(caught.value).count('capacity/') + str(caught.value).count('dropless/') == 1
  with pytest.raises(UserError, match='--columns='):
    tables.columns(summary.summarize(made.make_study(), []), ['difference'])


def test_a_metric_by_its_path_is_named_with_its_own_unit():
  name = 'dropless/router/max_violation/mean'
  records = [
    dataclasses.replace(
      record,
      metrics={name: 0.5 + record.seed, 'capacity/router/max_violation': [1.0, 2.0]},
    )
    for record in made.make_records({'dense': [1.0, 2.0, 3.0]})
  ]
  study = made.make_study(['dense'], metric=Metric(name))
  of = summary.summarize(study, records)
  (column,) = tables.columns(of, ['metric'])
  assert column.title == 'MaxVio'
  assert tables.notes(of)[0].startswith(f'{name} on the test split (lower is better)')
  both = tables.columns(of, ['metric', 'capacity/router/max_violation/max'])
  assert [c.title for c in both] == ['MaxVio', 'MaxVio, max of layers']
  study = made.make_study(['dense'], metric=Metric(name, 'of the mean load'))
  (column,) = tables.columns(summary.summarize(study, records), ['metric'])
  assert column.title == 'MaxVio (of the mean load)'


def test_comparisons_show_the_margin():
  values = {'dense': [3.0, 4.0, 5.0], 'moe': [3.0005, 4.0015, 5.0]}
  study = made.make_study(comparisons=(Comparison('moe', 'dense'),), equivalence_margin=0.1)
  of = summary.summarize(study, made.make_records(values))
  header, row = tables.comparisons(of)
  assert header[-2:] == ['90% interval', 'adjusted p of equivalence']
  # Mean 0.0006667, deviation 0.000764, standard error 0.000441; t of 0.95 is 2.920.
  assert row[2] == 'equivalent' and row[-2:] == ['[-0.0006, +0.0020]', '<0.001']
  assert 'below 0.1 in size' in tables.markdown(of)


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
  assert number_text.interval(interval) == text
  if not math.isnan(mean):
    sign = '' if text.startswith('-') else '+'
    assert number_text.interval(interval, '+') == sign + text


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, '0'), (999, '999'), (999.4, '999'), (999.6, '1k'), (1234, '1.23k'), (999_600, '1M'),
    (3.28e6, '3.28M'), (1.5e9, '1.5G'), (2e12, '2T'), (4096.5, '4.1k'),
  ],
)  # fmt: skip
def test_counts(number, text):
  assert number_text.count(number) == text


@pytest.mark.parametrize(
  ('p', 'text'), [(math.nan, '-'), (0.0004, '<0.001'), (0.0123, '0.012'), (1.0, '1.000')]
)
def test_p_values(p, text):
  assert number_text.p_value(p) == text


def test_csv_has_every_arm_and_every_digit(broken):
  rows = list(csv.DictReader(io.StringIO(csv_table.csv_text(broken))))
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


def gap(trial):
  return trial.seed


def test_own_metrics_have_a_column_and_their_errors_a_warning():
  study = made.make_study(metrics={'gap_of_loss': gap, 'other': gap}, baseline='dense')
  further = {'capacity/router/dead_experts': [0.0, 0.0]}
  records = [
    made.make_record(arm, seed, 2.0 + seed * (1 + index), further | {'user/gap_of_loss': index})
    for index, arm in enumerate(('dense', 'moe'))
    for seed in range(3)
  ]
  broken = [
    dataclasses.replace(r, metric_errors={'user/other': f'ValueError: seed {r.seed}'})
    for r in records[1:]
  ]
  of = summary.summarize(study, [records[0], *broken])
  text = tables.markdown(of)
  assert '| arm | bits per byte | minus dense | gap of loss |' in text
  assert '| moe | 4.0 ± 5.0 | +1.0 ± 2.5 | 1 ± 0 |' in text
  # A mean of zeros has an interval that says nothing.
  assert 'The same for all arms: seeds 3, dead experts 0, parameters' in text
  warning = 'user/other: no value for 5 of 6 finished trials: ValueError: seed 1'
  assert warning in of.warnings and warning in shown.markdown_shown(text)
  rows = shown.check_latex(latex.latex(of))
  assert [row[-1] for row in rows][-2:] == [r'$0_{\pm 0}$', r'$1_{\pm 0}$']
  # Without an evaluation at capacity further metrics are not sought among own ones.
  alone = [dataclasses.replace(r, metrics={'user/gap_of_loss': r.seed}) for r in records]
  own = dataclasses.replace(study, metric=Metric('user/gap_of_loss', 'seeds'))
  assert tables.further_evaluation(summary.summarize(own, alone)) == ''


def test_an_arm_is_called_by_its_label_and_named_once():
  arms = (Point('num_experts=1', {}, label='one'), 'num_experts=2')
  values = {'num_experts=1': [1.0, 2.0, 3.0], 'num_experts=2': [2.0, 3.0]}
  planned = (Comparison('num_experts=2', 'num_experts=1'),)
  study = made.make_study(arms, baseline='num_experts=1', comparisons=planned)
  of = summary.summarize(study, made.make_records(values))
  text = shown.markdown_shown(tables.markdown(of))
  rows = [row[0] for row in shown.markdown_rows(tables.markdown(of))]
  assert [r for r in rows if r != '---'] == ['arm', 'one', 'num_experts=2', 'arm', 'num_experts=2']
  assert '| minus one |' in text and '\n| num_experts=2 | one | untested' in text
  assert 'Differences to one are paired' in text
  assert 'num_experts=2 minus one: unpaired seeds' in text and text.count('num_experts=1') == 1
  assert 'Labels: one is num_experts=1.' in text
  tex = latex.latex(of)
  assert '% Labels: one is num_experts=1.' in tex and 'Differences to one are' in tex


def test_a_study_without_records():
  empty = summary.summarize(made.make_study(), [])
  shown.check_latex(latex.latex(empty))
  shown.check_latex(methods.methods(empty))
  assert tables.markdown(empty).count('missing: no record') == 6
  assert csv_table.csv_text(empty).count('\n') == 3
  assert 'commit = {unknown}' in methods.bibtex(empty)
  assert csv_table.csv_text(summary.summarize(made.make_study(()), [])) == 'arm\n'
