"""Shared parts of the figures of a study: colours, panels, labels, and the values of its trials."""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from moe_jax.field_names import split_field
from moe_jax.results.names import deciding_title
from moe_jax.results.records import FINISHED, STATUSES, Record
from moe_jax.results.statistics import half_width
from moe_jax.results.style import (
  COLORS,
  COLUMN_WIDTH,
  DASHES,
  MEDIUM_PER_INCH,
  SEED,
  SMALL_PER_INCH,
)
from moe_jax.results.style import STYLE as STYLE
from moe_jax.study import Study

# More cannot be told apart; further ones get a panel of their own.
_MOST_IN_PANEL = 12

_OVER_LAYERS: dict[str, Callable[[list], Any]] = {'mean': np.mean, 'max': np.max}

Trials = list[Record]


def by_arm(study: Study, records: Sequence[Record]) -> dict[str, Trials]:
  """Returns the trials of each arm by seed, arms in the order of the study, unknown ones last."""
  names = [arm.name for arm in study.arms] + [record.arm for record in records]
  arms: dict[str, Trials] = {name: [] for name in names}
  for record in sorted(records, key=lambda r: r.seed):
    arms[record.arm].append(record)
  return {name: trials for name, trials in arms.items() if trials}


def mean_and_interval(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean over the first axis and half the width of its 95% t interval.

  The latter is NaN of a single value.
  """
  return np.asarray(np.mean(np.asarray(values, np.float64), 0)), half_width(values)


def values_of(trials: Trials, name: str) -> list[float]:
  """Returns a metric of the finished trials that have it."""
  values = (number_of(r, name) for r in trials if r.status == FINISHED)
  return [value for value in values if value is not None]


def number_of(record: Record, name: str) -> float | None:
  """Returns a number by its path: as it stands in the record, or 'NAME/mean', 'NAME/max' of a list.

  None if the record has no such finite number.
  """
  value: Any = record.metrics.get(name)
  stem, _, statistic = name.rpartition('/')
  layers: Any = record.metrics.get(stem)
  is_list = isinstance(layers, list) and layers and all(map(_is_number, layers))
  if value is None and statistic in _OVER_LAYERS and is_list:
    value = float(_OVER_LAYERS[statistic](layers))
  return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def field_of(record: Record, field: str) -> Any:
  """Returns a config field, as 'moe.num_experts', None if there is none."""
  section, name = split_field(field)
  value = record.config.get(section, {}).get(name)
  return record.changes.get(field) if value is None else value


def styles() -> Iterator[dict[str, Any]]:
  """Returns colours and dashes of lines, each once."""
  return ({'color': color, 'ls': dash, 'lw': 1.4} for dash in DASHES for color in COLORS)


def make_panels(names: list[str]) -> tuple[Figure, list[tuple[Axes, list[str]]]]:
  """Returns a figure, and its panels below each other with the names that each shows."""
  count = -(-len(names) // _MOST_IN_PANEL)
  size = -(-len(names) // count)
  chunks = [names[at : at + size] for at in range(0, len(names), size)]
  height = 1.9 + max(_legend_shape(chunk)[1] for chunk in chunks)
  figure = Figure(figsize=(COLUMN_WIDTH, 0.7 + height * len(chunks)), layout='constrained')
  axes = figure.subplots(len(chunks), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
  return figure, list(zip(axes, chunks, strict=True))


def wrapped(name: str, width: int = 34) -> str:
  """Returns a name in lines of `width` characters, broken between words, else within one."""
  lines = []
  for line in textwrap.wrap(name, width, break_long_words=False):
    lines += [line] if len(line) <= width else _broken(line, width)
  # A dollar sign would begin a formula.
  return '\n'.join(lines).replace('$', r'\$')


def _broken(word: str, width: int) -> list[str]:
  """Returns the lines of a long word, broken after what joins its parts where that is enough."""
  lines = ['']
  for part in re.split(r'(?<=[_=,/.])', word):
    for piece in textwrap.wrap(part, width):
      if lines[-1] and len(lines[-1] + piece) > width:
        lines.append('')
      lines[-1] += piece
  return lines


def draw_points(
  axes: Axes, points: Any, label: str, *, style: dict[str, Any], transform: Any
) -> None:
  """Draws a line of means with intervals, and each seed."""
  xs = [x for x, _ in points]
  summaries = [mean_and_interval(values) for _, values in points]
  axes.errorbar(
    xs,
    [mean for mean, _ in summaries],
    [half for _, half in summaries],
    label=wrapped(label),
    marker='o',
    markersize=4,
    capsize=3,
    transform=transform,
    **style,
  )
  for x, values in points:
    axes.plot(
      [x] * len(values),
      values,
      color=style['color'],
      transform=transform,
      **SEED,
    )
  # What is drawn under a transform of its own does not enter the limits by itself.
  ends = [
    (x, y)
    for (x, values), (mean, half) in zip(points, summaries, strict=True)
    for y in [*values, *(() if np.isnan(half) else (mean - half, mean + half))]
  ]
  axes.update_datalim(ends)
  axes.autoscale_view()


def label_panels(panels: list[tuple[Axes, list[str]]], x: str, y: str) -> None:
  """Names the axes, and puts a legend above each panel."""
  for axes, names in panels:
    axes.set_ylabel(wrapped(y, 38))
    put_legend(axes, names)
  panels[-1][0].set_xlabel(wrapped(x, 40))


def put_legend(axes: Axes, names: Sequence[str]) -> None:
  """Puts a legend above a panel as wide as a column: of lines labelled by their wrapped names."""
  labels = [wrapped(name) for name in names]
  handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
  axes.legend(
    [handles[label] for label in labels],
    labels,
    loc='lower left',
    bbox_to_anchor=(0, 1.02),
    borderaxespad=0,
    ncols=_legend_shape(names)[0],
  )


def _legend_shape(names: Sequence[str]) -> tuple[int, float]:
  """Returns the columns of a legend above a panel, and its height in inches."""
  labels = [wrapped(name) for name in names]
  longest = max(len(line) for label in labels for line in label.split('\n'))
  # Left of the names is about half an inch of line.
  columns = max(1, int((COLUMN_WIDTH - 0.6) / (0.45 + longest / SMALL_PER_INCH)))
  columns = min(columns, len(labels))
  deepest = max(label.count('\n') + 1 for label in labels)
  return columns, -(-len(labels) // columns) * (0.05 + 0.115 * deepest)


def set_title(figure: Figure, study: Study, text: str) -> None:
  """Heads a figure with the study and what is shown of it."""
  width = int(MEDIUM_PER_INCH * figure.get_figwidth())
  figure.suptitle(wrapped(f'{study.name}: {text}', width), fontsize='medium')


def note(figure: Figure, records: Sequence[Record], shown: str = '') -> None:
  """Notes below a figure how many trials are not in its means."""
  counts = [(s, sum(r.status == s for r in records)) for s in STATUSES if s != FINISHED]
  text = ', '.join(f'{count} {status}' for status, count in counts if count)
  if text:
    text = wrapped(f'{shown}not in the means: {text}', int(SMALL_PER_INCH * figure.get_figwidth()))
    figure.supxlabel(text, color='0.35', x=0.98, ha='right')


def metric_label(study: Study) -> str:
  """Returns the name of an axis of the metric that decides."""
  evaluation = study.metric.name.partition('/')[0]
  return f'{deciding_title(study.metric)} ({evaluation}, {study.split} split)'
