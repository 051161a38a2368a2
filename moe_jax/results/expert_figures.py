"""Figures of experts, each of all arms on one scale: load, load by domain, specialisation."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.results.names import metric_title
from moe_jax.results.panels import (
  by_arm,
  mean_and_interval,
  note,
  set_title,
  values_of,
  wrapped,
)
from moe_jax.results.records import FINISHED, Record
from moe_jax.results.style import (
  BALANCE,
  COLORS,
  COLUMN_WIDTH,
  DEAD,
  LOAD_COLORS,
  PAGE_WIDTH,
  SEED,
  SMALL_PER_INCH,
  STYLE,
  load_bar,
  load_norm,
)
from moe_jax.study import Study, labels_of

_MOST_LAYERS = 4
_MOST_ARMS = 12
_MOST_COLUMNS = 3
# Panels next to each other that fit in a column of a paper.
_MOST_IN_COLUMN = 2
# From this load on, in units of 1/E, the scale is logarithmic above 1.
_WIDE = 4.0
SPECIALIZATION = (
  'router/expert_domain_mi',
  'router/expert_token_mi',
  'router/domain_load_overlap',
  'router/expert_similarity',
  'router/coactivation',
)


@matplotlib.rc_context(STYLE)
def load(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the load of every expert at the end of training: a row for each arm.

  A point is an expert of one seed, in units of 1/E; a cross at 0 is an expert without any
  assignment. A panel for each MoE layer, of more than 4 the first, the last and two between.
  """
  arms = {
    arm: loads
    for arm, trials in by_arm(study, records).items()
    if (loads := [r.load[-1][1] for r in trials if r.status == FINISHED and r.load])
  }
  if not arms:
    return None
  num_layers = max(len(load) for loads in arms.values() for load in loads)
  layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, _MOST_LAYERS)).round())
  labels = _labels(study, arms)
  rows = sum(max(0.24, 0.08 + 0.12 * (label.count('\n') + 1)) for label in labels)
  figure = Figure(figsize=(_width(len(layers)), 1.0 + rows), layout='constrained')
  panels = figure.subplots(1, len(layers), squeeze=False, sharex=True, sharey=True)[0]
  highest = 0.0
  for layer, axes in zip(layers.astype(int), panels, strict=True):
    for row, loads in enumerate(arms.values()):
      for seed, layer_loads in enumerate(loads):
        if layer < len(layer_loads):
          relative_E = np.asarray(layer_loads[layer], np.float64) * len(layer_loads[layer])
          highest = max(highest, float(relative_E.max()))
          # Seeds of an arm below each other, so that they are told apart.
          y = row + 0.5 * ((seed + 0.5) / len(loads) - 0.5)
          _strip(axes, relative_E, y)
    axes.axvline(1, **BALANCE)
    axes.set_title(f'MoE layer {layer}', fontsize='small')
  if highest > _WIDE:
    panels[0].set_xscale('symlog', linthresh=1, linscale=0.7)
    powers = range(0, int(np.log2(highest)) + 1, 1 if highest < 8 else 2)
    ticks = [0, *(2.0**power for power in powers)]
    panels[0].set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    panels[0].set_xticks([], minor=True)
  else:
    panels[0].locator_params(axis='x', nbins=4)
  panels[0].set_yticks(range(len(arms)), labels)
  panels[0].set_ylim(len(arms) - 0.5, -0.5)
  figure.supxlabel('load of an expert at the last step, in units of 1/E')
  set_title(figure, study, 'load of experts; cross: no assignment')
  return figure


def _strip(axes: Axes, relative_E: np.ndarray, y: float) -> None:
  some = relative_E[relative_E > 0]
  axes.plot(some, np.full(len(some), y), **SEED | {'markersize': 2.2}, color=COLORS[0], alpha=0.6)
  dead = int((relative_E == 0).sum())
  if dead:
    axes.plot(np.zeros(dead), np.full(dead, y), **DEAD | {'markersize': 4}, clip_on=False)


@matplotlib.rc_context(STYLE)
def domain_load(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the load of each expert in each domain, in the last MoE layer: a panel for each arm.

  Of the first finished seed, as experts of different seeds have nothing to do with each other;
  experts are ordered by the domain that loads them most. Of more than 12 arms the first ones.
  """
  found: dict[str, tuple[int, str, dict[str, Any]]] = {}
  for arm, trials in by_arm(study, records).items():
    record = next((r for r in trials if r.status == FINISHED and _loads(r)[1]), None)
    if record and len(found) < _MOST_ARMS:
      found[arm] = (record.seed, *_loads(record))
  if not found:
    return None
  maps = {}
  for arm, (_, _, loads) in found.items():
    load_NE = np.array([load[-1] for load in loads.values()], np.float64)
    order = np.lexsort((-load_NE.max(0), load_NE.argmax(0)))
    maps[arm] = load_NE[:, order] * load_NE.shape[1]
  columns = min(_MOST_COLUMNS, len(found))
  rows = -(-len(found) // columns)
  domains = max(len(load_NE) for load_NE in maps.values())
  figure = Figure(
    figsize=(_width(columns), 1.3 + rows * (0.45 + 0.16 * domains)), layout='constrained'
  )
  panels = figure.subplots(rows, columns, squeeze=False)
  # Left of the panels stand the names of domains.
  across = int(SMALL_PER_INCH * (_width(columns) - 0.8) / columns) - 1
  norm = load_norm(maps.values())
  labels = labels_of(study)
  for index, (axes, (arm, load_NE)) in enumerate(zip(panels.flat, maps.items(), strict=False)):
    image = axes.imshow(load_NE, aspect='auto', cmap=LOAD_COLORS, norm=norm, rasterized=True)
    axes.set_title(wrapped(labels.get(arm, arm), across), fontsize='small', loc='left')
    names = [wrapped(name, 14) for name in found[arm][2]] if index % columns == 0 else []
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.grid(False)
  for axes in list(panels.flat)[len(maps) :]:
    axes.set_visible(False)
  assert norm.vmax is not None
  exceeded = any(bool((load_NE > norm.vmax).any()) for load_NE in maps.values())
  load_bar(figure, image, panels, exceeded, location='bottom', aspect=40)
  seeds = ', '.join(str(seed) for seed in sorted({seed for seed, _, _ in found.values()}))
  evaluations = ', '.join(sorted({evaluation for _, evaluation, _ in found.values()}))
  set_title(
    figure, study, f'load of experts (across) by domain, last layer, seed {seeds} ({evaluations})'
  )
  return figure


@matplotlib.rc_context(STYLE)
def specialization(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws each measure of specialisation: mean over layers, with interval and seeds, by arm."""
  evaluations = [study.metric.name.partition('/')[0], *study.evaluations]
  known = {name for record in records for name in record.metrics}
  evaluation = next((e for e in evaluations if f'{e}/{SPECIALIZATION[0]}' in known), None)
  if evaluation is None:
    return None
  names = [f'{evaluation}/{path}' for path in SPECIALIZATION if f'{evaluation}/{path}' in known]
  arms = {
    arm: values
    for arm, trials in by_arm(study, records).items()
    if any(values := {name: values_of(trials, f'{name}/mean') for name in names})
    and any(values.values())
  }
  if not arms:
    return None
  labels = _labels(study, arms)
  rows = sum(max(0.24, 0.08 + 0.12 * (label.count('\n') + 1)) for label in labels)
  figure = Figure(figsize=(_width(len(names)), 1.2 + rows), layout='constrained')
  panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
  for axes, name in zip(panels, names, strict=True):
    for row, values in enumerate(arms.values()):
      if values[name]:
        mean, half = mean_and_interval(values[name])
        axes.errorbar(mean, row, xerr=half, marker='o', markersize=4, capsize=3, color=COLORS[0])
        axes.plot(values[name], [row] * len(values[name]), **SEED, color=COLORS[0])
    axes.locator_params(axis='x', nbins=3)
    axes.set_xlabel(wrapped(metric_title(name), 18))
  panels[0].set_yticks(range(len(arms)), labels)
  panels[0].set_ylim(len(arms) - 0.5, -0.5)
  set_title(figure, study, f'specialisation, mean over layers ({evaluation}, {study.split} split)')
  note(figure, records)
  return figure


def _labels(study: Study, arms: Any) -> list[str]:
  labels = labels_of(study)
  return [wrapped(labels.get(arm, arm), 20) for arm in arms]


def _width(panels: int) -> float:
  """Returns the width of a figure with this number of panels next to each other."""
  return COLUMN_WIDTH if panels <= _MOST_IN_COLUMN else PAGE_WIDTH


def _loads(record: Record) -> tuple[str, dict[str, Any]]:
  """Returns an evaluation with the [L][E] load of each of its domains; {} if it has none."""
  for name, domains in record.domains.items():
    loads = {domain: m['router/load'] for domain, m in domains.items() if 'router/load' in m}
    if loads:
      return name, loads
  return '', {}
