"""The tables of a paper: `table.tex`, which any class takes and no column is too narrow for.

The arms stand in one `table`, the planned comparisons in a second one. Names wrap; how many columns
of numbers fit next to them follows from widths of characters of Computer Modern at 8 points, with
column widths of the narrowest common class.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moe_jax.results import number_text, tables
from moe_jax.results.markup import break_latex, latex_number, one_line
from moe_jax.results.names import deciding_title, unit_of
from moe_jax.results.statistics import EQUIVALENCE_LEVEL, LEVEL
from moe_jax.results.summary import SIGNIFICANCE, Summary
from moe_jax.study import labels_of

# In points: a column of article in two columns on A4, and the text of article in one.
_COLUMN_WIDTH, _TEXT_WIDTH = 221.0, 345.0
# Names wrap in no less than that; \tabcolsep is half of the space between columns.
_LEAST_FOR_NAMES, _SPACE = 56.0, 6.0
# Widths at 8 points, rounded up; what is not here is as wide as a digit. Scripts are at 6 points.
_WIDTHS = (
  dict.fromkeys(".,:;'|ijl![]()", 2.5)
  | dict.fromkeys('fIrst-/ ', 3.4)
  | dict.fromkeys('bdhknpquvxy', 5.0)
  | dict.fromkeys('ABCDEFGHJKLNOPQRSTUVXYZw+<>±', 6.4)
  | dict.fromkeys('mMW%@&', 7.8)
)
_DIGIT, _SCRIPT = 4.4, 0.8
_WRAPPED = r'>{\raggedright\arraybackslash\hspace{0pt}}'


class _Column(NamedTuple):
  """Head and cells, plain; words in the cells wrap if `wraps`, as names always do."""

  title: str
  cells: tuple[str, ...]
  wraps: bool = False


def latex(summary: Summary, keys: Sequence[str] = (), *, wide: bool = False) -> str:
  r"""Returns `table` environments with captions and labels, to \input into a paper.

  Of the default columns those stay that fit next to each other; of requested columns all do, in a
  second tabular below the first if need be. Warnings and what is not averaged are
  comments: they are for the author to deal with.

  Args:
    summary: of a study.
    keys: of the columns, as in `tables.columns`.
    wide: `table*`, over both columns of a page.

  Raises:
    UserError: for an unknown column.
  """
  shown = [_as_shown(summary, column) for column in tables.columns(summary, keys)]
  labels = labels_of(summary.study)
  names = _names(summary)
  width = _TEXT_WIDTH if wide else _COLUMN_WIDTH
  available = _space(names, width)
  blocks = _blocks(shown, available) if keys else [_first(shown, available)]
  head = [f'% {one_line(summary.study.question)}', r'% Needs \usepackage{booktabs,tabularx}.']
  missing = left_out(summary, keys, wide=wide)
  if missing:
    head.append(
      '% Not wide enough for these columns; --columns and --wide_table show them: '
      f'{one_line("; ".join(column.title for column in missing))}.'
    )
  longer = '; '.join(f'{short} is {name}' for name, short in labels.items() if short != name)
  head += [f'% Labels: {one_line(longer)}.'] if longer else []
  head += [f'% Warning: {one_line(warning)}' for warning in summary.warnings]
  for title, items in tables.not_averaged(summary):
    head += [f'% {title}: {one_line(item)}' for item in items]
  label = re.sub(r'[^A-Za-z0-9]+', '-', summary.study.name).strip('-')
  tabulars = [_tabular(names, block, width) for block in blocks]
  parts = [_environment(_caption(summary), label, tabulars, wide)]
  if summary.comparisons:
    tabular = _tabular(*_comparisons(summary, labels), width)
    parts.append(_environment(_planned(summary), f'{label}-comparisons', [tabular], wide))
  return '\n'.join(head) + '\n' + '\n'.join(parts)


def left_out(
  summary: Summary, keys: Sequence[str] = (), *, wide: bool = False
) -> list[tables.Column]:
  """Returns the default columns that do not fit in `latex`; none of columns that are named."""
  if keys:
    return []
  columns = tables.columns(summary)
  available = _space(_names(summary), _TEXT_WIDTH if wide else _COLUMN_WIDTH)
  shown = [_as_shown(summary, column) for column in columns]
  taken = {column.title for column in _first(shown, available)}
  return [c for c, column in zip(columns, shown, strict=True) if column.title not in taken]


def _as_shown(summary: Summary, column: tables.Column) -> _Column:
  """Returns a column of the table, which calls the baseline by its label, as the rows do."""
  title = column.title
  if column.key == tables.DIFFERENCE:
    title = tables.difference_title(labels_of(summary.study)[summary.study.baseline])
  return _Column(title, column.cells)


def _names(summary: Summary) -> _Column:
  labels = labels_of(summary.study)
  return _Column('', tuple(labels[arm.name] for arm in tables.shown_arms(summary)))


def _space(names: _Column, width: float) -> float:
  """Returns the width left for numbers next to the names, in points."""
  return width - min(_LEAST_FOR_NAMES, max(map(_width, names.cells), default=0.0))


def _environment(caption: str, label: str, tabulars: Sequence[str], wide: bool) -> str:
  name = 'table*' if wide else 'table'
  body = '\\par\\medskip\n'.join(tabulars)
  return (
    f'\\begin{{{name}}}[tb]\n\\centering\\emergencystretch=3em\n'
    f'\\caption{{{break_latex(caption)}}}\n\\label{{tab:{label}}}\\smallskip\n'
    f'\\footnotesize\\setlength{{\\tabcolsep}}{{{_SPACE / 2:g}pt}}\n{body}\\end{{{name}}}\n'
  )


def _tabular(names: _Column, numbers: Sequence[_Column], width: float) -> str:
  r"""Returns a tabular, or a tabularx of \linewidth if the names must wrap."""
  left = width - sum(_width_of(column) + _SPACE for column in numbers)
  fits = max(map(_width, (names.title, *names.cells)), default=0) <= left
  aligned = 'l' if fits else rf'{_WRAPPED}X'
  aligned += ''.join(f'{_WRAPPED}p{{{_width_of(c):.0f}pt}}' if c.wraps else 'r' for c in numbers)
  environment = 'tabular' if fits else 'tabularx'
  size = '' if fits else r'{\linewidth}'
  heads = [_lines(names.title, left)] + [_lines(c.title, _width_of(c)) for c in numbers]
  deepest = max(map(len, heads))
  # The last line of each head stands right above its column.
  padded = [[''] * (deepest - len(head)) + head for head in heads]
  rows = [' & '.join(break_latex(head[line]) for head in padded) for line in range(deepest)]
  body = [
    ' & '.join([break_latex(name), *(_cell(column.cells[row]) for column in numbers)])
    for row, name in enumerate(names.cells)
  ]
  lines = [
    rf'\begin{{{environment}}}{size}{{@{{}}{aligned}@{{}}}}',
    r'\toprule',
    *(rf'{row} \\' for row in rows),
    r'\midrule',
    *(rf'{row} \\' for row in body),
    r'\bottomrule',
    rf'\end{{{environment}}}',
  ]
  return '\n'.join(lines) + '\n'


def _blocks(columns: Sequence[_Column], available: float) -> list[list[_Column]]:
  """Returns the columns in parts, each no wider than the space next to the names."""
  blocks: list[list[_Column]] = [[]]
  left = available
  for column in columns:
    need = _width_of(column) + _SPACE
    if need > left and blocks[-1]:
      blocks.append([])
      left = available
    blocks[-1].append(column)
    left -= need
  return blocks


def _first(columns: Sequence[_Column], available: float) -> list[_Column]:
  """Returns the columns that fit, the number of seeds after what it is of."""
  taken: list[_Column] = []
  for column in sorted(columns, key=lambda column: column.title == tables.SEEDS):
    need = _width_of(column) + _SPACE
    if need > available and taken:
      break
    taken.append(column)
    available -= need
  return taken


def _lines(title: str, width: float) -> list[str]:
  """Returns the words of a head in lines of at most the given width, where words allow it."""
  lines: list[str] = []
  for word in title.split() or ['']:
    if lines and _width(f'{lines[-1]} {word}') <= width:
      lines[-1] += f' {word}'
    else:
      lines.append(word)
  return lines


def _width_of(column: _Column) -> float:
  words = ' '.join((column.title, *column.cells) if column.wraps else (column.title,)).split()
  cells = () if column.wraps else column.cells
  return max(*map(_width, words), *map(_cell_width, cells), 0.0, 0.0)


def _width(text: str) -> float:
  return sum((_WIDTHS.get(char, _DIGIT) for char in text), 0.0)


def _cell_width(cell: str) -> float:
  base, script = _split(cell)
  return _width(base) + _SCRIPT * _width(script)


def _split(cell: str) -> tuple[str, str]:
  """Returns the text on the line, and that of the subscript: half a width, or limits."""
  base, sign, rest = cell.partition(' ± ')
  if sign:
    return base, f'±{rest}'
  base, sign, rest = cell.partition(' [')
  return base, f'[{rest}' if sign else ''


def _cell(cell: str) -> str:
  """Returns a cell; an interval as a subscript, which takes less space."""
  base, script = _split(cell)
  if cell == tables.NOTHING:
    return '--'
  if script:
    shown = script.replace('±', r'\pm ')
    return f'${base}_{{{shown}}}$'
  if re.fullmatch(r'[-+<]?\d+(\.\d+)?(e[-+]\d+)?', cell):
    return latex_number(cell)
  return break_latex(cell)


def _caption(summary: Summary) -> str:
  study = summary.study
  better = 'lower' if study.metric.lower_is_better else 'higher'
  evaluation = study.metric.name.partition('/')[0]
  counts = sorted({len(arm.values) for arm in tables.shown_arms(summary)})
  seeds = (
    ' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else 0
  )
  sentences = [
    study.question if study.question.endswith(('?', '.', '!')) else f'{study.question}.',
    f'{_capital(deciding_title(study.metric))} of the {evaluation} evaluation on the {study.split} '
    f'split ({better} is better): mean and half the width of the {LEVEL:.0%} interval of Student t '
    f'over {seeds} seeds.',
  ]
  if study.baseline:
    baseline = labels_of(study)[study.baseline]
    sentences.append(f'Differences to {baseline} are paired by seed.')
  return ' '.join([*sentences, *_counts(summary)])


def _counts(summary: Summary) -> Iterator[str]:
  arms = tables.shown_arms(summary)
  absent = sum(len(arm.absent) for arm in arms)
  if absent:
    total = absent + sum(len(arm.values) for arm in arms)
    yield f'{absent} of {total} trials have no value and are in no mean.'
  same = [tables.said_once(c) for c in tables.constants(summary) if c.key != tables.SEEDS]
  if same:
    yield f'The same for all: {", ".join(same)}.'


def _planned(summary: Summary) -> str:
  study = summary.study
  unit = unit_of(study.metric) or deciding_title(study.metric)
  margin = study.equivalence_margin
  shown = f'half the width of the {LEVEL:.0%} interval'
  if margin is not None:
    shown = f'the {EQUIVALENCE_LEVEL:.0%} interval'
  to = _one_baseline(summary)
  sentences = [
    f'Planned comparisons of study {study.name}{f" to {labels_of(study)[to]}" if to else ""}: '
    f'difference in {unit}, paired by seed, with {shown}, and p of the two-sided t-test after Holm '
    f'for {len(study.comparisons)}; better or worse if below {SIGNIFICANCE}.'
  ]
  if margin is not None:
    sentences.append(
      f'Equivalent if two one-sided t-tests, after Holm, show that it is below {margin:g}.'
    )
  return ' '.join(sentences)


def _one_baseline(summary: Summary) -> str:
  """Returns the one baseline of all planned comparisons; '' if they differ."""
  baselines = {comparison.baseline for comparison in summary.comparisons}
  return baselines.pop() if len(baselines) == 1 else ''


def _comparisons(summary: Summary, labels: dict[str, str]) -> tuple[_Column, list[_Column]]:
  """Returns the names and the columns of numbers of the planned comparisons."""
  of = summary.comparisons
  margin, to = summary.study.equivalence_margin, _one_baseline(summary)
  names = tuple(labels[c.arm] if to else f'{labels[c.arm]} vs. {labels[c.baseline]}' for c in of)
  differences = []
  for c in of:
    shown = number_text.interval(
      c.difference.interval if margin is None else c.difference.within, '+'
    )
    if margin is not None and shown != tables.NOTHING:
      shown = f'{shown.partition(" ± ")[0]} {number_text.limits(c.difference.within)}'
    differences.append(shown)
  return _Column('', names), [
    _Column('difference', tuple(differences)),
    _Column('p', tuple(number_text.p_value(c.adjusted_p_value) for c in of)),
    _Column('verdict', tuple(c.verdict for c in of), wraps=True),
  ]


def _capital(text: str) -> str:
  return text[:1].upper() + text[1:]
