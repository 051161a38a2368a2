"""The figure of the metric by size: models of equal training FLOPs on a line."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.results.names import deciding_title
from moe_jax.results.number_text import count
from moe_jax.results.panels import (
  STYLE,
  by_arm,
  draw_points,
  label_panels,
  make_panels,
  metric_label,
  note,
  set_title,
  styles,
  values_of,
)
from moe_jax.results.records import FINISHED, Record
from moe_jax.study import Study

# What the label of a size takes of the width of a panel.
_ROOM_OF_TICK = 0.14


@matplotlib.rc_context(STYLE)
def iso_flops(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the deciding metric against total parameters, with lines of equal training FLOPs.

  Equal is within 1%, of sizes too. Arms whose FLOPs no arm of another size shares are left out; a
  line goes through the best arm of each size. A study that scales nothing (no `x`, no `lines`, no
  `scaling`) has no such figure.
  """
  if not (study.x or study.lines or study.scaling):
    return None
  points = []
  for trials in by_arm(study, records).values():
    values = values_of(trials, study.metric.name)
    record = next((r for r in trials if r.status == FINISHED), None)
    if values and record and record.flops_per_token and record.parameters.get('total'):
      points.append((record.flops_per_token * record.tokens, record.parameters['total'], values))
  sizes = _sizes([total for _, total, _ in points])
  points = [(flops, sizes[total], values) for flops, total, values in points]
  groups: list[list[tuple[int, int, list[float]]]] = []
  for point in sorted(points):
    if groups and point[0] <= 1.01 * groups[-1][0][0]:
      groups[-1].append(point)
    else:
      groups.append([point])
  groups = [group for group in groups if len({total for _, total, _ in group}) > 1]
  if not groups:
    return None
  lines = {f'{group[0][0]:.4g} FLOPs': group for group in groups}
  figure, panels = make_panels(list(lines))
  for axes, names in panels:
    for name, style in zip(names, styles(), strict=False):
      best: dict[int, float] = {}
      for _, total, values in lines[name]:
        draw_points(axes, [(total, values)], '', style=style, transform=axes.transData)
        better = min if study.metric.lower_is_better else max
        mean = float(np.mean(values))
        best[total] = better(best.get(total, mean), mean)
      axes.plot(*zip(*sorted(best.items()), strict=True), label=name, marker='o', ms=4, **style)
    axes.set_xscale('log')
    _mark_sizes(axes, sorted({total for name in names for _, total, _ in lines[name]}))
  label_panels(panels, 'total parameters', metric_label(study))
  set_title(figure, study, f'{deciding_title(study.metric)} at equal training FLOPs')
  note(figure, records)
  return figure


def _sizes(totals: Sequence[int]) -> dict[int, int]:
  """Returns the size that stands for each number of parameters: the smallest within 1%."""
  sizes: dict[int, int] = {}
  for total in sorted(totals):
    last = next(reversed(sizes.values()), 0)
    sizes[total] = last if total <= 1.01 * last else total
  return sizes


def _mark_sizes(axes: Axes, sizes: Sequence[int]) -> None:
  """Labels sizes on a logarithmic axis, those that fit next to each other."""
  if sizes[0] == sizes[-1]:
    axes.set_xlim(sizes[0] / 1.1, sizes[0] * 1.1)
  low, high = np.log(axes.get_xlim())
  shown: list[int] = []
  for size in sizes:
    if not shown or np.log(size / shown[-1]) >= _ROOM_OF_TICK * (high - low):
      shown.append(size)
  axes.set_xticks(shown, [count(size) for size in shown])
  axes.set_xticks([], minor=True)
