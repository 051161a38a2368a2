"""A summary as tables in Markdown, LaTeX and CSV.

Numbers are the mean and half the width of its interval, rounded to two digits of the latter.
Whatever is not averaged is listed below the table with its reason.
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.results.markup import escape_latex, escape_markdown, latex_number, one_line
from moe_jax.results.statistics import LEVEL, Difference, Interval
from moe_jax.results.summary import SIGNIFICANCE, Absent, ArmSummary, Summary

_SCALES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
# Characters of a row in LaTeX, which \small fits on a page of text, and of a name in a title.
_WIDEST = 88
_LONGEST_BASELINE = 20
# Half widths below come of rounding.
_MOST_DECIMALS = 12
_NOTHING = Interval(math.nan, math.nan, math.nan, 0)


class _Style(NamedTuple):
  """How a format writes words, numbers as '-1.2 ± 0.1', and what is not there."""

  text: Callable[[str], str]
  number: Callable[[str], str]
  nothing: str


class _Table(NamedTuple):
  """Cells as a format writes them; the first `num_left` columns are words."""

  header: list[str]
  rows: list[list[str]]
  num_left: int


_PLAIN = _Style(one_line, lambda text: text, '-')


def markdown(summary: Summary, metrics: Mapping[str, str] | None = None) -> str:
  """Returns the tables of arms and of planned comparisons, what is not in them, and warnings.

  Args:
    summary: of a study.
    metrics: further columns: names as in `ArmSummary.metrics`, with their titles.

  Raises:
    UserError: for a metric that no arm has.
  """
  style = _Style(escape_markdown, lambda text: text, '-')
  parts = [f'{style.text(summary.study.question)}\n']
  for table in _tables(summary, style, metrics or {}):
    rule = ['---'] * table.num_left + ['---:'] * (len(table.header) - table.num_left)
    rows = [table.header, rule, *table.rows]
    parts.append(''.join(f'| {" | ".join(row)} |\n' for row in rows))
  parts.append(' '.join(style.text(sentence) for sentence in notes(summary)) + '\n')
  for title, items in _lists(summary) + [('Warnings', summary.warnings)]:
    if items:
      lines = ''.join(f'- {style.text(item)}\n' for item in items)
      parts.append(f'{title}:\n\n{lines}')
  return '\n'.join(parts)


def latex(summary: Summary, metrics: Mapping[str, str] | None = None) -> str:
  r"""Returns the same as tabulars with the rules of booktabs, to \input into a table.

  A table wider than a page of text goes on in a second one, which names the arms again. Warnings
  are comments: they are for the author to deal with.

  Args:
    summary: of a study.
    metrics: further columns: names as in `ArmSummary.metrics`, with their titles.

  Raises:
    UserError: for a metric that no arm has.
  """
  style = _Style(escape_latex, latex_number, '--')
  head = [f'% {one_line(summary.study.question)}', r'% Needs \usepackage{booktabs}.']
  head += [f'% Warning: {one_line(warning)}' for warning in summary.warnings]
  parts = []
  plain = _tables(summary, _PLAIN, metrics or {})
  tables = zip(_tables(summary, style, metrics or {}), plain, strict=True)
  for table in [part for whole, shown in tables for part in _split(whole, shown)]:
    columns = 'l' * table.num_left + 'r' * (len(table.header) - table.num_left)
    header, *rows = [' & '.join(row) + r' \\' for row in [table.header, *table.rows]]
    lines = [rf'\begin{{tabular}}{{{columns}}}', r'\toprule', header, r'\midrule', *rows]
    parts.append('\n'.join([*lines, r'\bottomrule', r'\end{tabular}']))
  parts.append(' '.join(style.text(sentence) for sentence in notes(summary)))
  body = '\n\n\\medskip\\noindent\n'.join(parts) + '\n'
  for title, items in _lists(summary):
    if items:
      listed = ''.join(f'\\item {style.text(item)}\n' for item in items)
      body += f'\n\\medskip\\noindent\n{title}:\n'
      body += f'\\begin{{itemize}}\n{listed}\\end{{itemize}}\n'
  return '\n'.join(head) + '\n' + body


def comparisons(summary: Summary) -> list[list[str]]:
  """Returns the table of planned comparisons as plain text, its header first; [] without any."""
  if not summary.comparisons:
    return []
  table = _comparisons_table(summary, _PLAIN)
  return [table.header, *table.rows]


def csv_text(summary: Summary) -> str:
  """Returns a row for each arm, dropped ones too, with all digits; empty where nothing is known."""
  names = sorted({name for arm in summary.arms for name in arm.metrics})
  rows = [_csv_row(summary, arm, names) for arm in summary.arms]
  file = io.StringIO()
  writer = csv.DictWriter(file, list(rows[0]) if rows else ['arm'], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def _tables(summary: Summary, style: _Style, metrics: Mapping[str, str]) -> list[_Table]:
  tables = [_arms_table(summary, style, metrics)]
  if summary.comparisons:
    tables.append(_comparisons_table(summary, style))
  return tables


def _arms_table(summary: Summary, style: _Style, metrics: Mapping[str, str]) -> _Table:
  known = sorted({name for arm in summary.arms for name in arm.metrics})
  for name in metrics:
    if name not in known:
      raise UserError('metrics', name, f'must be one of {", ".join(known) or "none"}')
  study = summary.study
  header = ['arm', 'averaged', study.metric.unit]
  if study.baseline:
    short = len(study.baseline) <= _LONGEST_BASELINE
    header.append(f'minus {study.baseline}' if short else 'minus baseline')
  header += ['parameters', 'active', 'FLOPs / token', 'tokens', 'tokens / expert']
  header += metrics.values()
  rows = []
  for arm in summary.arms:
    if arm.dropped:
      continue
    cells = [style.text(arm.name), f'{len(arm.values)} of {len(arm.values) + len(arm.absent)}']
    cells.append(_interval(arm.interval, style))
    if study.baseline:
      difference = arm.difference
      cells.append(_interval(difference.interval if difference else None, style, '+'))
    counts: list[int | float | None] = [
      arm.parameters.get('total'),
      arm.parameters.get('active'),
      arm.flops_per_token,
    ]
    counts += [arm.tokens, arm.tokens_per_expert]
    cells += [style.nothing if n is None else count(n) for n in counts]
    cells += [_interval(arm.metrics.get(name), style) for name in metrics]
    rows.append(cells)
  return _Table([style.text(name) for name in header], rows, 1)


def _split(table: _Table, shown: _Table) -> list[_Table]:
  """Returns the table in parts that are not too wide, each with the columns of words.

  Args:
    table: as the format writes it.
    shown: the same as a reader will see it.
  """
  widths = [2 + max(map(len, cells)) for cells in zip(shown.header, *shown.rows, strict=True)]
  left = list(range(table.num_left))
  parts, width = [list(left)], sum(widths[: table.num_left])
  for column in range(table.num_left, len(widths)):
    if width + widths[column] > _WIDEST and len(parts[-1]) > len(left):
      parts.append(list(left))
      width = sum(widths[: table.num_left])
    parts[-1].append(column)
    width += widths[column]
  return [
    _Table(
      [table.header[i] for i in part], [[row[i] for i in part] for row in table.rows], len(left)
    )
    for part in parts
  ]


def _comparisons_table(summary: Summary, style: _Style) -> _Table:
  header = ['arm', 'minus', 'verdict', 'pairs', summary.study.metric.unit, 'p', 'adjusted p']
  rows = []
  for comparison in summary.comparisons:
    difference = comparison.difference
    rows.append(
      [
        style.text(comparison.arm),
        style.text(comparison.baseline),
        comparison.verdict,
        str(difference.interval.num),
        _interval(difference.interval, style, '+'),
        _p_value(difference.p_value, style),
        _p_value(comparison.adjusted_p_value, style),
      ]
    )
  return _Table([style.text(name) for name in header], rows, 3)


def _interval(interval: Interval | None, style: _Style, sign: str = '') -> str:
  """Returns the mean and half the width of the interval; the mean alone of a single value."""
  if interval is None or math.isnan(interval.mean):
    return style.nothing
  mean, half = interval.mean, interval.half_width
  if math.isnan(half) or half == 0:
    return style.number(f'{mean:{sign}.4g}' + (' ± 0' if half == 0 else ''))
  decimals = min(max(1 - math.floor(math.log10(half)), 0), _MOST_DECIMALS)
  return style.number(f'{mean:{sign}z.{decimals}f} ± {half:.{decimals}f}')


def count(number: int | float) -> str:
  """Returns three digits and a suffix: 1.23M."""
  for scale, suffix in _SCALES:
    # What rounds up to it as well.
    if number >= 0.9995 * scale:
      return f'{number / scale:.3g}{suffix}'
  return f'{number:.3g}'


def _p_value(p: float, style: _Style) -> str:
  if math.isnan(p):
    return style.nothing
  return style.number('<0.001' if p < 0.001 else f'{p:.3f}')


def notes(summary: Summary) -> list[str]:
  """Returns what must be said of the tables, a sentence or two each, as plain text."""
  study = summary.study
  said = [
    f'{metric(summary)}: mean ± half the width of the {LEVEL:.0%} interval of Student t over '
    'seeds; a single seed has no interval.'
  ]
  if study.baseline:
    said.append(
      f'Differences to {study.baseline} are paired by seed and not corrected for their number.'
    )
  if study.comparisons:
    said.append(
      'Planned comparisons: two-sided paired t-test, adjusted by Holm for '
      f'{len(study.comparisons)}; the arm is better or worse if the adjusted p is below '
      f'{SIGNIFICANCE}, open if not, untested with fewer than 2 pairs or equal differences.'
    )
  return said


def _lists(summary: Summary) -> list[tuple[str, Sequence[str]]]:
  """Returns what the tables do not average, by title."""
  absent = [f'{arm.name}, {_absent(trial)}' for arm in summary.arms for trial in arm.absent]
  dropped = [f'{arm.name}: {arm.dropped}' for arm in summary.arms if arm.dropped]
  return [('Trials without a value', absent), ('Arms that were not run', dropped)]


def _absent(trial: Absent) -> str:
  where = f' at step {trial.step} of {trial.num_steps}' if trial.num_steps else ''
  reason = f': {trial.reason}' if trial.reason else ''
  return f'seed {trial.seed}: {trial.status}{where}{reason}'


def metric(summary: Summary) -> str:
  """Returns the metric that decides, its unit, split and direction."""
  study = summary.study
  better = 'lower' if study.metric.lower_is_better else 'higher'
  return (
    f'{study.metric.name} in {study.metric.unit} on the {study.split} split ({better} is better)'
  )


def _csv_row(summary: Summary, arm: ArmSummary, names: Sequence[str]) -> dict[str, Any]:
  difference = arm.difference or Difference(_NOTHING, _NOTHING, math.nan, ())
  row: dict[str, Any] = {'arm': arm.name, 'dropped': arm.dropped}
  row |= {'averaged': len(arm.values), 'trials': len(arm.values) + len(arm.absent)}
  row |= {
    'mean': arm.interval.mean,
    'low': arm.interval.low,
    'high': arm.interval.high,
    'bootstrap_low': arm.bootstrap.low,
    'bootstrap_high': arm.bootstrap.high,
    'difference': difference.interval.mean,
    'difference_low': difference.interval.low,
    'difference_high': difference.interval.high,
    'difference_bootstrap_low': difference.bootstrap.low,
    'difference_bootstrap_high': difference.bootstrap.high,
    'difference_p': difference.p_value,
    'difference_pairs': difference.interval.num if arm.difference else None,
    'parameters_total': arm.parameters.get('total'),
    'parameters_active': arm.parameters.get('active'),
    'flops_per_token': arm.flops_per_token,
    'tokens': arm.tokens,
    'tokens_per_expert': arm.tokens_per_expert,
  }
  row |= {f'seed {seed}': arm.values.get(seed) for seed in summary.study.seeds}
  row |= {name: arm.metrics[name].mean if name in arm.metrics else None for name in names}
  row['without_value'] = '; '.join(_absent(trial) for trial in arm.absent)
  return {
    name: '' if isinstance(value, float) and math.isnan(value) else value
    for name, value in row.items()
  }
