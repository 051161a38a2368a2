"""A summary as tables: which columns, their cells in plain text, and as Markdown.

Numbers are the mean and half the width of its interval, rounded to two digits of the latter.
Columns that are the same for every arm are said below the table. Whatever is not averaged is listed
there with its reason.
"""

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

from moe_jax.errors import UserError
from moe_jax.results.markup import escape_markdown
from moe_jax.results.names import deciding_title, metric_titles, unit_of
from moe_jax.results.number_text import NOTHING, count, interval, limits, p_value
from moe_jax.results.statistics import EQUIVALENCE_LEVEL, LEVEL, Interval
from moe_jax.results.summary import SIGNIFICANCE, Absent, ArmSummary, Summary
from moe_jax.study import own_labels

_LONGEST_BASELINE = 20

# Next to the metric that decides, where an arm has them: of the evaluation at the capacity of
# training, else of that of the metric.
_FURTHER = (
  'router/drop_share',
  'router/max_violation/mean',
  'router/dead_experts/mean',
  'router/expert_domain_mi/mean',
  'router/expert_token_mi/mean',
  'bits_per_byte',
)
# What columns are called that are no metrics, with their titles.
SEEDS, METRIC, DIFFERENCE = 'seeds', 'metric', 'difference'
_COUNTS = {
  'parameters': 'parameters',
  'active': 'active',
  'flops_per_token': 'FLOPs / token',
  'tokens': 'tokens',
  'tokens_per_expert': 'tokens / expert',
}


# Where the metrics of the study file stand.
_OWN = 'user'


class Column(NamedTuple):
  """A column of the table of arms.

  Attributes:
    key: as in `--columns`: 'seeds', 'metric', 'difference', a count, or the path of a metric.
    title: its head.
    cells: of the arms that are run, in the order of the study: what is shown, plain.
    values: of the same, to sort by.
  """

  key: str
  title: str
  cells: tuple[str, ...]
  values: tuple[float | int | None, ...]


def shown_arms(summary: Summary) -> list[ArmSummary]:
  """Returns the arms that have a row: those that the study runs."""
  return [arm for arm in summary.arms if not arm.dropped]


def columns(summary: Summary, keys: Sequence[str] = ()) -> list[Column]:
  """Returns the columns of the table of arms.

  Args:
    summary: of a study.
    keys: what they show, as in `Column.key`; all that are known by default, without those that are
      the same for every arm.

  Raises:
    UserError: for a key that is none.
  """
  if keys:
    return _made(summary, list(keys))
  every = _made(summary, _default_keys(summary))
  return [column for column in every if column.key in (METRIC, DIFFERENCE) or _varies(column)]


def constants(summary: Summary) -> list[Column]:
  """Returns the columns that `columns` leaves out, with the same value for every arm."""
  every = _made(summary, _default_keys(summary))
  same = [c for c in every if c.key not in (METRIC, DIFFERENCE) and not _varies(c)]
  return [column for column in same if set(column.cells) - {NOTHING}]


def said_once(column: Column) -> str:
  """Returns title and value of a column of `constants`."""
  value = next(cell for cell in column.cells if cell != NOTHING)
  return f'{column.title} {value.removesuffix(" ± 0")}'


def _varies(column: Column) -> bool:
  # An arm that never began has no counts, which makes those of the others no less alike.
  nothing = {NOTHING} if column.key in _COUNTS else set()
  return len(set(column.cells) - nothing) > 1


def further_evaluation(summary: Summary) -> str:
  """Returns the evaluation that further metrics are of by default; '' if no arm has one."""
  known = {name.partition('/')[0] for arm in summary.arms for name in arm.metrics}
  known.discard(_OWN)
  for evaluation in ('capacity', summary.study.metric.name.partition('/')[0]):
    if evaluation in known:
      return evaluation
  return min(known, default='')


def _default_keys(summary: Summary) -> list[str]:
  known = {name for arm in summary.arms for name in arm.metrics}
  further = [f'{_OWN}/{name}' for name in summary.study.metrics]
  further += [f'{further_evaluation(summary)}/{path}' for path in _FURTHER]
  return [
    SEEDS,
    METRIC,
    *([DIFFERENCE] if summary.study.baseline else []),
    *(name for name in further if name in known and name != summary.study.metric.name),
    *_COUNTS,
  ]


def _made(summary: Summary, keys: Sequence[str]) -> list[Column]:
  known = {name for arm in summary.arms for name in arm.metrics}
  possible = [SEEDS, METRIC, DIFFERENCE, *_COUNTS, *sorted(known)]
  if not summary.study.baseline:
    possible.remove(DIFFERENCE)
  for key in keys:
    if key not in possible:
      raise UserError('--columns', key, _nearest_columns(key, possible))
  titles = metric_titles([summary.study.metric.name, *(key for key in keys if key in known)])
  return [_column(summary, key, titles) for key in keys]


def _nearest_columns(key: str, possible: Sequence[str]) -> str:
  """Returns suggestions for an unknown column: the nearest, or those without /.

  A path may be near by only its last parts: 'drop_share' to 'capacity/router/drop_share'.
  """
  endings = {
    '/'.join(path.split('/')[first:]): path
    for path in reversed(possible)
    for first in range(path.count('/') + 1)
  }
  near = difflib.get_close_matches(key, endings, 3, 0.6)
  names = list(dict.fromkeys(endings[ending] for ending in near))
  if names:
    return f'no such column; did you mean {" or ".join(names)}?'
  plain = ', '.join(name for name in possible if '/' not in name)
  paths = [name for name in possible if '/' in name]
  example = f', as {paths[0]}' if paths else ''
  return f'must be among {plain}, or the path of a metric{example}; table.csv names them all'


def _column(summary: Summary, key: str, titles: dict[str, str]) -> Column:
  arms = shown_arms(summary)
  if key == SEEDS:
    cells = tuple(_averaged(arm) for arm in arms)
    return Column(key, 'seeds', cells, tuple(len(arm.values) for arm in arms))
  if key in _COUNTS:
    counts = tuple(_count_of(arm, key) for arm in arms)
    return Column(
      key, _COUNTS[key], tuple(NOTHING if n is None else count(n) for n in counts), counts
    )
  if key == METRIC:
    title, sign = deciding_title(summary.study.metric), ''
    intervals: list[Interval | None] = [arm.interval for arm in arms]
  elif key == DIFFERENCE:
    title, sign = difference_title(own_labels(summary.study)[summary.study.baseline]), '+'
    intervals = [arm.difference.interval if arm.difference else None for arm in arms]
  else:
    title, sign = titles[key], ''
    intervals = [arm.metrics.get(key) for arm in arms]
  values = tuple(None if i is None or math.isnan(i.mean) else i.mean for i in intervals)
  return Column(key, title, tuple(interval(i, sign) for i in intervals), values)


def difference_title(baseline: str) -> str:
  """Returns the head of the column of differences to an arm, by what the rows call it."""
  return f'minus {baseline if len(baseline) <= _LONGEST_BASELINE else "baseline"}'


def _averaged(arm: ArmSummary) -> str:
  num, absent = len(arm.values), len(arm.absent)
  return f'{num} of {num + absent}' if absent else str(num)


def _count_of(arm: ArmSummary, key: str) -> int | float | None:
  return {
    'parameters': arm.parameters.get('total'),
    'active': arm.parameters.get('active'),
    'flops_per_token': arm.flops_per_token,
    'tokens': arm.tokens,
    'tokens_per_expert': arm.tokens_per_expert,
  }[key]


def markdown(summary: Summary, keys: Sequence[str] = ()) -> str:
  """Returns the tables of arms and of planned comparisons, what is not in them, and warnings.

  Args:
    summary: of a study.
    keys: of `columns`.

  Raises:
    UserError: for a column that there is not.
  """
  parts = [f'{escape_markdown(summary.study.question)}\n']
  shown = columns(summary, keys)
  rows = [['arm', *(column.title for column in shown)]]
  names = [own_labels(summary.study)[arm.name] for arm in shown_arms(summary)]
  rows += [list(row) for row in zip(names, *(column.cells for column in shown), strict=True)]
  parts.append(_markdown_table(rows, 1))
  if summary.comparisons:
    parts.append(_markdown_table(comparisons(summary), 3))
  parts.append(' '.join(escape_markdown(sentence) for sentence in notes(summary, keys)) + '\n')
  for title, items in [*not_averaged(summary), ('Warnings', summary.warnings)]:
    if items:
      lines = ''.join(f'- {escape_markdown(item)}\n' for item in items)
      parts.append(f'{title}:\n\n{lines}')
  return '\n'.join(parts)


def _markdown_table(rows: list[list[str]], num_left: int) -> str:
  header, *others = [[escape_markdown(cell) for cell in row] for row in rows]
  rule = ['---'] * num_left + ['---:'] * (len(header) - num_left)
  return ''.join(f'| {" | ".join(row)} |\n' for row in [header, rule, *others])


def comparisons(summary: Summary) -> list[list[str]]:
  """Returns the table of planned comparisons as plain text, its header first; [] without any."""
  if not summary.comparisons:
    return []
  margin = summary.study.equivalence_margin is not None
  rows = [
    ['arm', 'minus', 'verdict', 'pairs', deciding_title(summary.study.metric), 'p', 'adjusted p']
  ]
  if margin:
    rows[0] += [f'{EQUIVALENCE_LEVEL:.0%} interval', 'adjusted p of equivalence']
  names = own_labels(summary.study)
  for comparison in summary.comparisons:
    difference = comparison.difference
    row = [
      names[comparison.arm],
      names[comparison.baseline],
      comparison.verdict,
      str(difference.interval.num),
      interval(difference.interval, '+'),
      p_value(difference.p_value),
      p_value(comparison.adjusted_p_value),
    ]
    if margin:
      row += [limits(difference.within), p_value(comparison.adjusted_equivalence_p_value)]
    rows.append(row)
  return rows


def notes(summary: Summary, keys: Sequence[str] = ()) -> list[str]:
  """Returns notes on the tables, a sentence or two each, as plain text."""
  study = summary.study
  said = [
    f'{metric(summary)}: mean ± half the width of the {LEVEL:.0%} interval of Student t over '
    'seeds; a single seed has no interval.'
  ]
  if study.baseline:
    said.append(
      f'Differences to {own_labels(study)[study.baseline]} are paired by seed and not corrected '
      'for their number.'
    )
  if study.comparisons:
    said.append(
      'Planned comparisons: two-sided paired t-test, adjusted by Holm for '
      f'{len(study.comparisons)}; the arm is better or worse if the adjusted p is below '
      f'{SIGNIFICANCE}, undecided if not, untested with fewer than 2 pairs or equal differences.'
    )
  if study.comparisons and study.equivalence_margin is not None:
    said.append(
      f'Equivalent: the difference is below {study.equivalence_margin:g} in size by two one-sided '
      f'paired t-tests, adjusted by Holm, whose larger p is below {SIGNIFICANCE}; unadjusted, that '
      f'is a {EQUIVALENCE_LEVEL:.0%} interval within the margin.'
    )
  evaluation = further_evaluation(summary)
  if any(c.key.startswith(f'{evaluation}/') for c in columns(summary, keys)) and not keys:
    said.append(f'Further metrics are of the {evaluation} evaluation, means over layers.')
  if not keys and (same := constants(summary)):
    said.append(f'The same for all arms: {", ".join(map(said_once, same))}.')
  labelled = [f'{arm.label} is {arm.name}' for arm in study.arms if arm.label not in ('', arm.name)]
  return said + ([f'Labels: {"; ".join(labelled)}.'] if labelled else [])


def not_averaged(summary: Summary) -> list[tuple[str, Sequence[str]]]:
  """Returns the trials that the tables do not average, by title."""
  names = own_labels(summary.study)
  absent = [
    f'{names[arm.name]}, {absent_text(trial)}' for arm in summary.arms for trial in arm.absent
  ]
  dropped = [f'{names[arm.name]}: {arm.dropped}' for arm in summary.arms if arm.dropped]
  return [('Trials without a value', absent), ('Arms that were not run', dropped)]


def absent_text(trial: Absent) -> str:
  """Returns seed, status and reason of a trial without a value."""
  where = f' at step {trial.step} of {trial.num_steps}' if trial.num_steps else ''
  reason = f': {trial.reason}' if trial.reason else ''
  return f'seed {trial.seed}: {trial.status}{where}{reason}'


def metric(summary: Summary) -> str:
  """Returns the metric that decides, its unit, split and direction."""
  study = summary.study
  better = 'lower' if study.metric.lower_is_better else 'higher'
  unit = unit_of(study.metric)
  said = f'{study.metric.name} in {unit}' if unit else study.metric.name
  return f'{said} on the {study.split} split ({better} is better)'
