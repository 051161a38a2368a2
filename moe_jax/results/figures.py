"""Figures of a study: each function draws one from records, or returns None if they lack it.

Only finished trials enter means; the others are counted in a note below. Intervals are of 95%, of
Student's t over seeds.
"""

import io
import pathlib
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import matplotlib
import matplotlib.transforms
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.field_names import split_field
from moe_jax.files import write_atomically
from moe_jax.results.expert_figures import domain_load, load, specialization
from moe_jax.results.loss_figure import loss_curves
from moe_jax.results.names import deciding_title
from moe_jax.results.panels import (
  STYLE,
  by_arm,
  draw_points,
  field_of,
  label_panels,
  make_panels,
  mean_and_interval,
  metric_label,
  note,
  put_legend,
  set_title,
  styles,
  values_of,
  wrapped,
)
from moe_jax.results.records import FINISHED, Record
from moe_jax.results.size_figure import iso_flops
from moe_jax.results.style import COLUMN_WIDTH, SEED
from moe_jax.study import Study, labels_of

# Of PNG files, for a screen; a paper takes the PDF.
_DOTS_PER_INCH = 240
# Of files: the same records give the same bytes.
_METADATA: dict[str, dict[str, Any]] = {'.pdf': {'CreationDate': None}, '.png': {'Software': None}}


def save_all(
  study: Study,
  records: Sequence[Record],
  out: str | pathlib.Path,
  *,
  only: Collection[str] | None = None,
) -> dict[pathlib.Path, float]:
  """Writes each figure that the records carry as PDF and PNG; returns the width of each in inches.

  The same records give the same bytes.

  Args:
    study: of the records.
    records: of all trials.
    out: directory; made if a figure is written.
    only: names of files, as 'loss.png'; all by default.
  """
  out = pathlib.Path(out)
  widths: dict[pathlib.Path, float] = {}
  for name, draw in _FIGURES.items():
    suffixes = [s for s in _METADATA if only is None or name + s in only]
    figure = draw(study, records) if suffixes else None
    if figure is None:
      continue
    out.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
      path = out / (name + suffix)
      with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A box stands for what the font lacks, once for each size of text.
        warnings.filterwarnings('ignore', r'Glyph \d+ .* missing from font')
        content = io.BytesIO()
        kind = suffix.removeprefix('.')
        figure.savefig(content, format=kind, dpi=_DOTS_PER_INCH, metadata=_METADATA[suffix])
      write_atomically(path, content.getvalue())
      widths[path] = float(figure.get_figwidth())
  return widths


@matplotlib.rc_context(STYLE)
def metric(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the deciding metric against `study.x`, a line for each value of `study.lines`.

  Arms that share both are told apart by the other fields in which they differ. An arm without
  experts is a horizontal line where x is a field of `moe`, which means nothing to it. Without
  `study.x` arms stand below each other.
  """
  arms = {
    arm: (next(r for r in trials if r.status == FINISHED), values)
    for arm, trials in by_arm(study, records).items()
    if (values := values_of(trials, study.metric.name))
  }
  if not arms:
    return None
  level = {
    arm
    for arm, (record, _) in arms.items()
    if study.x.startswith('moe.') and field_of(record, 'moe.num_experts') == 0
  }
  placed = {arm: pair for arm, pair in arms.items() if arm not in level}
  if not study.x or not placed:
    figure = _dots(
      study, records, {arm: {'': v} for arm, (_, v) in arms.items()}, metric_label(study)
    )
    set_title(figure, study, deciding_title(study.metric))
    return figure
  # In the study's order of values even where the first arm with one has not finished.
  order = [arm.changes.get(study.lines) for arm in study.arms]
  order += [field_of(record, study.lines) for record, _ in placed.values()]
  keys = _line_keys(study, {arm: record for arm, (record, _) in placed.items()})
  lines: dict[str, list[tuple[Any, list[float]]]] = {}
  for arm, (record, values) in sorted(
    placed.items(), key=lambda item: order.index(field_of(item[1][0], study.lines))
  ):
    lines.setdefault(keys[arm], []).append((field_of(record, study.x), values))
  labels = {arm: arm for arm in arms} | labels_of(study)
  levels = {labels[arm]: arms[arm][1] for arm in arms if arm in level}
  figure, panels = make_panels([*lines, *levels])
  position = _Positions([x for points in lines.values() for x, _ in points])
  for axes, names in panels:
    for index, (name, style) in enumerate(zip(names, styles(), strict=False)):
      if name in levels:
        _level_line(axes, name, levels[name], style)
        continue
      points = sorted((position(x), values) for x, values in lines[name])
      # Apart by 3 points each, whatever the scale: error bars of lines would hide each other.
      shift = 3 / 72 * (index - (len(names) - 1) / 2)
      apart = matplotlib.transforms.ScaledTranslation(shift, 0, figure.dpi_scale_trans)
      draw_points(axes, points, name, style=style, transform=axes.transData + apart)
    position.set_axis(axes)
  label_panels(panels, study.x, metric_label(study))
  set_title(figure, study, deciding_title(study.metric))
  note(figure, records)
  return figure


def _line_keys(study: Study, arms: dict[str, Record]) -> dict[str, str]:
  """Returns the line of each arm, as 'num_selected_experts=2'."""
  place = {arm: repr([field_of(r, f) for f in (study.x, study.lines)]) for arm, r in arms.items()}
  fields = [study.lines] if study.lines else []
  for arm, record in arms.items():
    # By fields that vary along x no line is split.
    others = [other for name, other in arms.items() if place[name] == place[arm]]
    for field in record.changes:
      if field not in fields and any(field_of(o, field) != field_of(record, field) for o in others):
        fields.append(field)
  return {
    arm: ', '.join(f'{split_field(field)[1]}={field_of(record, field)}' for field in fields)
    or deciding_title(study.metric)
    for arm, record in arms.items()
  }


class _Positions:
  """Positions of the values of a field on an axis: by size if they are numbers, else in order."""

  def __init__(self, values: Sequence[Any]):
    self._numeric = all(type(value) in (int, float) for value in values)
    self._values: list[Any] = (
      sorted(set(values)) if self._numeric else list(dict.fromkeys(map(str, values)))
    )

  def __call__(self, value: Any) -> float:
    return float(value) if self._numeric else float(self._values.index(str(value)))

  def set_axis(self, axes: Axes) -> None:
    values = self._values
    if not self._numeric:
      axes.set_xticks(range(len(values)), values)
      axes.set_xlim(-0.5, len(values) - 0.5)
      return
    positive = [value for value in values if value > 0]
    if values[0] >= 0 and positive and positive[-1] >= 4 * positive[0]:
      if len(positive) == len(values):
        axes.set_xscale('log')
      else:
        axes.set_xscale('symlog', linthresh=positive[0])
        # Or a wide part of nothing stands left of 0.
        axes.set_xlim(-positive[0] / 2, 2 * positive[-1])
    if len(values) <= 10:
      axes.set_xticks(values, [f'{value:g}' for value in values])
      axes.set_xticks([], minor=True)


def _level_line(axes: Axes, label: str, values: list[float], style: dict[str, Any]) -> None:
  mean, half = mean_and_interval(values)
  axes.axhline(float(mean), label=wrapped(label), **style)
  if np.isfinite(half):
    axes.axhspan(mean - half, mean + half, color=style['color'], alpha=0.12, lw=0)


@matplotlib.rc_context(STYLE)
def drop_share(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the share of assignments without a slot, by arm and evaluation.

  Evaluations in which no trial drops anything, as dropless ones, are left out if another remains.
  """
  names = sorted({name for record in records for name in record.metrics})
  names = [name for name in names if name.endswith('/router/drop_share')]
  arms = {
    arm: {name.partition('/')[0]: v for name in names if (v := values_of(trials, name))}
    for arm, trials in by_arm(study, records).items()
  }
  kinds = list(dict.fromkeys(kind for values in arms.values() for kind in values))
  if not kinds:
    return None
  shown = [k for k in kinds if any(any(v.get(k, ())) for v in arms.values())] or kinds[:1]
  arms = {arm: {k: v[k] for k in shown if k in v} for arm, v in arms.items()}
  arms = {arm: values for arm, values in arms.items() if values}
  label = f'share of assignments dropped ({", ".join(shown)}; {study.split} split)'
  figure = _dots(study, records, arms, label)
  figure.axes[0].set_xlim(left=0)
  set_title(figure, study, 'share of assignments dropped')
  return figure


def _dots(
  study: Study, records: Sequence[Record], arms: dict[str, dict[str, list[float]]], label: str
) -> Figure:
  """Draws means, intervals and seeds, arms below each other; a colour for each kind of value."""
  kinds = list(dict.fromkeys(kind for values in arms.values() for kind in values))
  labels = labels_of(study)
  names = [wrapped(labels.get(arm, arm), 20) for arm in arms]
  row_height = 0.1 + 0.12 * max(name.count('\n') + 1 for name in names)
  figure = Figure(figsize=(COLUMN_WIDTH, 1.1 + row_height * len(arms)), layout='constrained')
  axes = figure.subplots()
  for index, (kind, style) in enumerate(zip(kinds, styles(), strict=False)):
    shift = 0.5 * ((index + 0.5) / len(kinds) - 0.5)
    rows = [(row, v[kind]) for row, v in enumerate(arms.values()) if kind in v]
    for row, values in rows:
      mean, half = mean_and_interval(values)
      y = row + shift
      axes.errorbar(mean, y, xerr=half, marker='o', markersize=4, capsize=3, color=style['color'])
      axes.plot(
        values,
        [y] * len(values),
        color=style['color'],
        **SEED,
      )
    axes.plot([], [], marker='o', markersize=4, label=kind, color=style['color'])
  axes.set_yticks(range(len(arms)), names)
  axes.set_ylim(len(arms) - 0.5, -0.5)
  axes.locator_params(axis='x', nbins=5)
  axes.set_xlabel(wrapped(label, 36))
  if len(kinds) > 1:
    put_legend(axes, kinds)
  note(figure, records)
  return figure


_FIGURES: dict[str, Callable[[Study, Sequence[Record]], Figure | None]] = {
  'loss': loss_curves,
  'metric': metric,
  'drop_share': drop_share,
  'iso_flops': iso_flops,
  'load': load,
  'specialization': specialization,
  'domain_load': domain_load,
}
