"""Figures of a study: each function draws one from records, or returns None if they lack it.

Only finished trials enter means; the others are counted in a note below. Intervals are of 95%, of
Student's t over seeds.
"""

import pathlib
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import matplotlib.transforms
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.results.records import FINISHED, STATUSES, Record
from moe_jax.study import Study

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that white
# paper swallows; then again dashed.
_COLORS = ('#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9', '#000000')
_DASHES = ('-', '--')
# More cannot be told apart; further ones get a panel of their own.
_MOST_IN_PANEL = 12
# Of arms that get figures of their own.
_MOST_ARMS = 12
_STYLE: dict[Any, Any] = {
  'font.size': 9,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.grid': True,
  'grid.alpha': 0.3,
  'legend.frameon': False,
  'legend.fontsize': 'small',
  'legend.handlelength': 3,
  'pdf.fonttype': 42,
}
# The first part of training, where all losses fall alike, does not set the scale.
_WARMUP_SHARE = 0.1

Trials = list[Record]

# How the value of one seed is marked beside the mean.
_SINGLE_SEED: dict[str, Any] = {
  'ls': 'none',
  'marker': 'o',
  'markersize': 3,
  'markerfacecolor': 'white',
  'markeredgewidth': 0.7,
  'zorder': 3,
}


def save_all(
  study: Study, records: Sequence[Record], out: str | pathlib.Path
) -> list[pathlib.Path]:
  """Writes each figure that the records carry as PDF and PNG, and returns the paths.

  The same records give the same bytes. Load and specialization are drawn for the first 12 arms
  that have them.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  paths: list[pathlib.Path] = []
  for name, figure in _all_figures(study, records):
    for suffix, metadata in (('.pdf', {'CreationDate': None}), ('.png', {'Software': None})):
      path = out / (name + suffix)
      with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A box stands for what the font lacks, once for each size of text.
        warnings.filterwarnings('ignore', r'Glyph \d+ .* missing from font')
        figure.savefig(path, dpi=150, metadata=metadata)
      paths.append(path)
  return paths


def _all_figures(study: Study, records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
  for name, draw in (
    ('loss', loss_curves),
    ('metric', metric),
    ('drop_share', drop_share),
    ('iso_flops', iso_flops),
  ):
    figure = draw(study, records)
    if figure is not None:
      yield name, figure
  for name, draw_arm in (('load', load), ('specialization', specialization)):
    taken: set[str] = set()
    for arm in by_arm(study, records):
      figure = draw_arm(study, records, arm) if len(taken) < _MOST_ARMS else None
      if figure is not None:
        stem = _file_name(f'{name}_{arm}', taken)
        taken.add(stem)
        yield stem, figure


def _file_name(text: str, taken: set[str]) -> str:
  """Returns a name of letters, digits, '-' and '_' that is not taken."""
  # 100 characters: file systems allow 255 bytes.
  stem = re.sub(r'[^A-Za-z0-9_]+', '-', text).strip('-')[:100]
  number, name = 2, stem
  while name.lower() in {other.lower() for other in taken}:
    name, number = f'{stem}-{number}', number + 1
  return name


def by_arm(study: Study, records: Sequence[Record]) -> dict[str, Trials]:
  """Returns the trials of each arm by seed, arms in the order of the study, strangers last."""
  names = [arm.name for arm in study.arms] + [record.arm for record in records]
  arms: dict[str, Trials] = {name: [] for name in names}
  for record in sorted(records, key=lambda r: r.seed):
    arms[record.arm].append(record)
  return {name: trials for name, trials in arms.items() if trials}


def mean_and_interval(values: Any) -> tuple[Any, Any]:
  """Returns the mean over the first axis and half the width of its 95% t interval.

  The latter is NaN of a single value.
  """
  values = np.asarray(values, np.float64)
  count = len(values)
  if count < 2:
    return np.mean(values, 0), np.full(values.shape[1:], np.nan)
  error = np.std(values, 0, ddof=1) / np.sqrt(count)
  return np.mean(values, 0), scipy.stats.t.ppf(0.975, count - 1) * error


@matplotlib.rc_context(_STYLE)
def loss_curves(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the training loss of each arm: mean and interval over finished trials.

  Trials that are not finished are dotted, with a cross at their last step.
  """
  arms = {
    arm: [r for r in trials if len(_curve(r))] for arm, trials in by_arm(study, records).items()
  }
  arms = {arm: trials for arm, trials in arms.items() if trials}
  if not arms:
    return None
  # Strangers to the means set the scale only if there are none.
  means = {
    arm: _mean_curve(curves)
    for arm, trials in arms.items()
    if (curves := [_curve(r) for r in trials if r.status == FINISHED])
  }
  means = {arm: mean for arm, mean in means.items() if len(mean[0])}
  low, high = _loss_range(
    [(steps, mean) for steps, mean, _ in means.values()]
    or [tuple(_curve(r).T) for trials in arms.values() for r in trials]
  )
  figure, panels = _panels(list(arms))
  for axes, names in panels:
    for arm, style in zip(names, _styles(), strict=False):
      axes.plot([], [], label=_wrapped(arm), **style)
      if arm in means:
        steps, mean, half = means[arm]
        axes.plot(steps, mean, **style)
        axes.fill_between(steps, mean - half, mean + half, color=style['color'], alpha=0.2, lw=0)
      for curve in [_curve(r) for r in arms[arm] if r.status != FINISHED]:
        axes.plot(*curve.T, color=style['color'], lw=0.8, ls=':')
        # At the edge if the loss left the panel.
        end = curve[-1:, 0], np.clip(curve[-1:, 1], low, high)
        axes.plot(*end, color=style['color'], ls='none', marker='x', clip_on=False)
  panels[0][0].set_ylim(low, high)
  _label_panels(panels, 'optimizer step', 'training loss (nats per token)')
  _note(figure, [r for trials in arms.values() for r in trials], 'dotted, ')
  return figure


def _curve(record: Record) -> np.ndarray:
  """Returns [step, loss] as an array, without what is not finite."""
  curve = np.array(record.curve, np.float64).reshape(-1, 2)
  return curve[np.isfinite(curve).all(1)]


def _mean_curve(curves: list[np.ndarray]) -> tuple[Any, Any, Any]:
  """Returns steps, mean and half interval at the steps that all curves have."""
  losses = [dict(curve) for curve in curves]
  steps = np.array(sorted(set.intersection(*(set(loss) for loss in losses))))
  mean, half = mean_and_interval([[loss[step] for step in steps] for loss in losses])
  return steps, mean, half


def _loss_range(curves: list[tuple[Any, Any]]) -> tuple[float, float]:
  """Returns the bounds of an axis for the losses after the start."""
  last = max(steps[-1] for steps, _ in curves if len(steps))
  values = np.concatenate([losses[steps >= _WARMUP_SHARE * last] for steps, losses in curves])
  margin = 0.05 * (values.max() - values.min()) or 0.1
  return values.min() - margin, values.max() + margin


@matplotlib.rc_context(_STYLE)
def metric(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the deciding metric against `study.x`, a line for each value of `study.lines`.

  Arms that share both are told apart by the other fields in which they differ. An arm without
  experts is a horizontal line where x is a field of `moe`, which means nothing to it. Without
  `study.x` arms stand below each other.
  """
  arms = {
    arm: (next(r for r in trials if r.status == FINISHED), values)
    for arm, trials in by_arm(study, records).items()
    if (values := _values(trials, study.metric.name))
  }
  if not arms:
    return None
  level = {
    arm
    for arm, (record, _) in arms.items()
    if study.x.startswith('moe.') and _field(record, 'moe.num_experts') == 0
  }
  placed = {arm: pair for arm, pair in arms.items() if arm not in level}
  if not study.x or not placed:
    return _dots(study, records, {arm: {'': v} for arm, (_, v) in arms.items()}, _label(study))
  # In the study's order of values even where the first arm with one has not finished.
  order = [arm.changes.get(study.lines) for arm in study.arms]
  order += [_field(record, study.lines) for record, _ in placed.values()]
  keys = _line_keys(study, {arm: record for arm, (record, _) in placed.items()})
  lines: dict[str, list[tuple[Any, list[float]]]] = {}
  for arm, (record, values) in sorted(
    placed.items(), key=lambda item: order.index(_field(item[1][0], study.lines))
  ):
    lines.setdefault(keys[arm], []).append((_field(record, study.x), values))
  figure, panels = _panels(list(lines) + sorted(level, key=list(arms).index))
  position = _Positions([x for points in lines.values() for x, _ in points])
  for axes, names in panels:
    for index, (name, style) in enumerate(zip(names, _styles(), strict=False)):
      if name in level:
        _level_line(axes, name, arms[name][1], style)
        continue
      points = sorted((position(x), values) for x, values in lines[name])
      # Apart by 3 points each, whatever the scale: error bars of lines would hide each other.
      shift = 3 / 72 * (index - (len(names) - 1) / 2)
      apart = matplotlib.transforms.ScaledTranslation(shift, 0, figure.dpi_scale_trans)
      _points(axes, points, name, style, axes.transData + apart)
    position.set_axis(axes)
  _label_panels(panels, study.x, _label(study))
  _note(figure, records)
  return figure


def _line_keys(study: Study, arms: dict[str, Record]) -> dict[str, str]:
  """Returns the line of each arm, as 'num_selected_experts=2'."""
  place = {arm: repr([_field(r, f) for f in (study.x, study.lines)]) for arm, r in arms.items()}
  fields = [study.lines] if study.lines else []
  for arm, record in arms.items():
    # By fields that vary along x no line is split.
    others = [other for name, other in arms.items() if place[name] == place[arm]]
    for field in record.changes:
      if field not in fields and any(_field(o, field) != _field(record, field) for o in others):
        fields.append(field)
  return {
    arm: ', '.join(f'{field.rpartition(".")[2]}={_field(record, field)}' for field in fields)
    or study.metric.unit
    for arm, record in arms.items()
  }


class _Positions:
  """Where values of a field stand on an axis: by size if they are numbers, else in order."""

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


def _points(axes: Axes, points: Any, label: str, style: dict[str, Any], transform: Any) -> None:
  """Draws a line of means with intervals, and each seed."""
  xs = [x for x, _ in points]
  summaries = [mean_and_interval(values) for _, values in points]
  axes.errorbar(
    xs,
    [mean for mean, _ in summaries],
    [half for _, half in summaries],
    label=_wrapped(label),
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
      **_SINGLE_SEED,
    )
  # What is drawn under a transform of its own does not enter the limits by itself.
  ends = [
    (x, y)
    for (x, values), (mean, half) in zip(points, summaries, strict=True)
    for y in [*values, *(() if np.isnan(half) else (mean - half, mean + half))]
  ]
  axes.update_datalim(ends)
  axes.autoscale_view()


def _level_line(axes: Axes, label: str, values: list[float], style: dict[str, Any]) -> None:
  mean, half = mean_and_interval(values)
  axes.axhline(float(mean), label=_wrapped(label), **style)
  if np.isfinite(half):
    axes.axhspan(mean - half, mean + half, color=style['color'], alpha=0.12, lw=0)


@matplotlib.rc_context(_STYLE)
def drop_share(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the share of assignments without a slot, by arm and evaluation.

  Evaluations in which no trial drops anything, as dropless ones, are left out if another remains.
  """
  names = sorted({name for record in records for name in record.metrics})
  names = [name for name in names if name.endswith('/router/drop_share')]
  arms = {
    arm: {name.partition('/')[0]: v for name in names if (v := _values(trials, name))}
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
  return figure


def _dots(
  study: Study, records: Sequence[Record], arms: dict[str, dict[str, list[float]]], label: str
) -> Figure:
  """Draws means, intervals and seeds, arms below each other; a colour for each kind of value."""
  kinds = list(dict.fromkeys(kind for values in arms.values() for kind in values))
  names = [_wrapped(arm) for arm in arms]
  row_height = 0.14 + 0.16 * max(name.count('\n') + 1 for name in names)
  figure = Figure(figsize=(6.5, 1.2 + row_height * len(arms)), layout='constrained')
  axes = figure.subplots()
  for index, (kind, style) in enumerate(zip(kinds, _styles(), strict=False)):
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
        **_SINGLE_SEED,
      )
    axes.plot([], [], marker='o', markersize=4, label=kind, color=style['color'])
  axes.set_yticks(range(len(arms)), names, fontsize='small')
  axes.set_ylim(len(arms) - 0.5, -0.5)
  axes.set_xlabel(label)
  if len(kinds) > 1:
    figure.legend(loc='outside upper right', ncols=4, title='evaluation')
  _note(figure, records)
  return figure


@matplotlib.rc_context(_STYLE)
def iso_flops(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the deciding metric against total parameters, with lines of equal training FLOPs.

  Equal is within 1%. Arms whose FLOPs no arm of another size shares are left out; a line goes
  through the best arm of each size.
  """
  points = []
  for trials in by_arm(study, records).values():
    values = _values(trials, study.metric.name)
    record = next((r for r in trials if r.status == FINISHED), None)
    if values and record and record.flops_per_token and record.parameters.get('total'):
      points.append((record.flops_per_token * record.tokens, record.parameters['total'], values))
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
  figure, panels = _panels(list(lines))
  for axes, names in panels:
    for name, style in zip(names, _styles(), strict=False):
      best: dict[int, float] = {}
      for _, total, values in lines[name]:
        _points(axes, [(total, values)], '', style, axes.transData)
        better = min if study.metric.lower_is_better else max
        mean = float(np.mean(values))
        best[total] = better(best.get(total, mean), mean)
      axes.plot(*zip(*sorted(best.items()), strict=True), label=name, marker='o', ms=4, **style)
    axes.set_xscale('log')
  _label_panels(panels, 'total parameters', _label(study))
  _note(figure, records)
  return figure


@matplotlib.rc_context(_STYLE)
def load(
  study: Study, records: Sequence[Record], arm: str, seed: int | None = None
) -> Figure | None:
  """Draws the load of each expert over training, a panel for each MoE layer.

  Colour is the share of assignments times the number of experts: 1 at balance.

  Args:
    study: of the records.
    records: of all trials.
    arm: drawn.
    seed: drawn, as experts of different seeds have nothing to do with each other; by default the
      first of a finished trial, else the first with a load.
  """
  record = _one_trial(study, records, arm, seed, lambda r: len(r.load) > 1)
  if record is None:
    return None
  steps = np.array([step for step, _ in record.load])
  load_SLE = np.array([load for _, load in record.load], np.float64)
  num_layers, num_experts = load_SLE.shape[1:]
  columns = min(num_layers, 3)
  rows = -(-num_layers // columns)
  figure = Figure(figsize=(1.5 + 3 * columns, 0.8 + 2.2 * rows), layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  relative_SLE = load_SLE * num_experts
  highest = max(2.0, float(np.quantile(relative_SLE, 0.995)))
  norm = matplotlib.colors.TwoSlopeNorm(1, 0, highest)
  for layer, axes in enumerate(panels.flat):
    if layer >= num_layers:
      axes.set_visible(False)
      continue
    image = axes.pcolormesh(
      steps,
      np.arange(num_experts),
      relative_SLE[:, layer].T,
      cmap='RdBu_r',
      norm=norm,
      shading='nearest',
      rasterized=True,
    )
    axes.set_title(f'MoE layer {layer}', fontsize='medium')
    axes.grid(False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if layer % columns == 0:
      axes.set_ylabel('expert')
    if layer + columns >= num_layers:
      axes.set_xlabel('optimizer step')
      axes.tick_params(labelbottom=True)
  extend = 'max' if relative_SLE.max() > highest else 'neither'
  bar = figure.colorbar(
    image, ax=panels, label='load x experts (1: balance)', extend=extend, aspect=30
  )
  above = np.asarray(matplotlib.ticker.MaxNLocator(3).tick_values(1, highest))
  bar.set_ticks([0, 0.5, 1, *above[(above > 0.8 + 0.2 * highest) & (above <= highest)]])
  _title(figure, record)
  return figure


@matplotlib.rc_context(_STYLE)
def specialization(
  study: Study,
  records: Sequence[Record],
  arm: str,
  seed: int | None = None,
  evaluation: str = '',
  all_layers: bool = False,
) -> Figure | None:
  """Draws the share of each domain's assignments that each expert gets.

  Args:
    study: of the records.
    records: of all trials.
    arm: drawn.
    seed: drawn; as in `load`.
    evaluation: whose loads; the first that has them by default.
    all_layers: a panel for each MoE layer, not only for the last one.
  """
  record = _one_trial(study, records, arm, seed, lambda r: bool(_loads(r, evaluation)[1]))
  if record is None:
    return None
  evaluation, loads = _loads(record, evaluation)
  load_NLE = np.array(list(loads.values()), np.float64)
  num_layers, num_experts = load_NLE.shape[1:]
  layers = range(num_layers) if all_layers else range(num_layers - 1, num_layers)
  width = min(10.0, 3 + 0.15 * num_experts)
  height = 0.9 + len(layers) * (0.5 + 0.25 * len(loads))
  figure = Figure(figsize=(max(width, 5), height), layout='constrained')
  panels = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
  highest = load_NLE[:, layers].max()
  for layer, axes in zip(layers, panels, strict=True):
    image = axes.imshow(
      load_NLE[:, layer], aspect='auto', cmap='viridis', vmin=0, vmax=highest, rasterized=True
    )
    axes.set_title(f'MoE layer {layer}', fontsize='medium')
    axes.set_yticks(range(len(loads)), [_wrapped(domain) for domain in loads])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False)
  panels[-1].set_xlabel('expert')
  figure.colorbar(image, ax=panels, label="share of a domain's\nassignments")
  _title(figure, record, f'; {evaluation} evaluation, {study.split} split')
  return figure


def _loads(record: Record, evaluation: str) -> tuple[str, dict[str, Any]]:
  """Returns an evaluation with the [L][E] load of each of its domains; {} if it has none."""
  for name in [evaluation] if evaluation else record.domains:
    found = record.domains.get(name, {}).items()
    loads = {domain: m['router/load'] for domain, m in found if 'router/load' in m}
    if loads:
      return name, loads
  return evaluation, {}


def _one_trial(
  study: Study, records: Sequence[Record], arm: str, seed: int | None, has: Any
) -> Record | None:
  trials = [r for r in by_arm(study, records).get(arm, []) if has(r) and seed in (None, r.seed)]
  return min(trials, key=lambda r: r.status != FINISHED, default=None)


def _title(figure: Figure, record: Record, rest: str = '') -> None:
  ending = '' if record.status == FINISHED else f', {record.status} at step {record.step:,}'
  text = f'{record.arm}, seed {record.seed}{ending}{rest}'
  # About 13 characters fit in an inch.
  figure.suptitle(_wrapped(text, int(13 * figure.get_figwidth())), fontsize='medium')


def _values(trials: Trials, name: str) -> list[float]:
  """Returns a metric of the finished trials that have it."""
  return [r.metrics[name] for r in trials if r.status == FINISHED and name in r.metrics]


def _field(record: Record, field: str) -> Any:
  """Returns a config field, as 'moe.num_experts', None if there is none."""
  value: Any = record.config
  for name in field.split('.'):
    value = value.get(name) if isinstance(value, dict) else None
  return record.changes.get(field) if value is None else value


def _label(study: Study) -> str:
  evaluation = study.metric.name.rpartition('/')[0]
  return f'{study.metric.unit} ({evaluation}, {study.split} split)'


def _styles() -> Iterator[dict[str, Any]]:
  return ({'color': color, 'ls': dash, 'lw': 1.4} for dash in _DASHES for color in _COLORS)


def _panels(names: list[str]) -> tuple[Figure, list[tuple[Axes, list[str]]]]:
  """Returns a figure, and its panels below each other with the names that each shows."""
  count = -(-len(names) // _MOST_IN_PANEL)
  size = -(-len(names) // count)
  chunks = [names[at : at + size] for at in range(0, len(names), size)]
  # A legend must fit beside its panel: about 0.15 inches for a line, 0.05 between entries.
  legend = max(sum(0.05 + 0.15 * (_wrapped(n).count('\n') + 1) for n in chunk) for chunk in chunks)
  height = max(3.2, legend)
  figure = Figure(figsize=(7.5, 0.6 + height * len(chunks)), layout='constrained')
  axes = figure.subplots(len(chunks), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
  return figure, list(zip(axes, chunks, strict=True))


def _wrapped(name: str, width: int = 34) -> str:
  # A dollar sign would begin a formula.
  return textwrap.fill(name, width).replace('$', r'\$')


def _label_panels(panels: list[tuple[Axes, list[str]]], x: str, y: str) -> None:
  for axes, names in panels:
    axes.set_ylabel(y)
    labels = [_wrapped(name) for name in names]
    handles = {
      label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    axes.legend(
      [handles[label] for label in labels],
      labels,
      loc='upper left',
      bbox_to_anchor=(1.01, 1),
      borderaxespad=0,
    )
  panels[-1][0].set_xlabel(x)


def _note(figure: Figure, records: Sequence[Record], shown: str = '') -> None:
  """Says below a figure how many trials are not in its means."""
  counts = [(s, sum(r.status == s for r in records)) for s in STATUSES if s != FINISHED]
  text = ', '.join(f'{count} {status}' for status, count in counts if count)
  if text:
    figure.supxlabel(
      f'{shown}not in the means: {text}', fontsize='small', color='0.35', x=0.98, ha='right'
    )
