"""The figure of training loss: few arms in one panel, of many each in a panel of its own."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.results.panels import (
  by_arm,
  label_panels,
  make_panels,
  mean_and_interval,
  note,
  set_title,
  styles,
  wrapped,
)
from moe_jax.results.records import FINISHED, Record
from moe_jax.results.style import COLORS, PAGE_WIDTH, STYLE
from moe_jax.study import Study, labels_of

# More in one panel hide each other.
_MOST_TOGETHER = 6
_MOST_COLUMNS = 4
# The first part of training, where all losses fall alike, does not set the scale.
_WARMUP_SHARE = 0.1


@matplotlib.rc_context(STYLE)
def loss_curves(study: Study, records: Sequence[Record]) -> Figure | None:
  """Draws the training loss of each arm: mean and interval over the same seeds for all of them.

  An arm that lacks one of these seeds is dashed, over those it has, without an interval. With more
  than 6 arms each has a panel, in which the others are grey and the baseline black. Trials that are
  not finished are dotted, with a cross at their last step.
  """
  arms = {
    arm: [r for r in trials if len(_curve(r))] for arm, trials in by_arm(study, records).items()
  }
  arms = {arm: trials for arm, trials in arms.items() if trials}
  if not arms:
    return None
  seeds = shared_seeds(arms)
  means = {arm: mean for arm, trials in arms.items() if (mean := _mean_curve(trials, seeds))}
  # Curves that no mean includes set the scale only if there are no means.
  limits = _loss_range(
    [(steps, mean, half) for steps, mean, half in means.values()]
    or [(*_curve(r).T, None) for trials in arms.values() for r in trials]
  )
  labels = {arm: arm for arm in arms} | labels_of(study)
  title = f'training loss, mean of seeds {", ".join(map(str, seeds))}' if seeds else 'training loss'
  if any(not set(seeds) <= _finished(trials) for trials in arms.values()):
    title += '; dashed: of fewer'
  if len(arms) <= _MOST_TOGETHER:
    figure = _together(arms, means, labels, limits)
  else:
    figure = _apart(study.baseline, arms, means, labels, limits)
    title += f'; black: {labels[study.baseline]}' if study.baseline in means else ''
    title += ', grey: others'
  set_title(figure, study, title)
  note(figure, [r for trials in arms.values() for r in trials], 'dotted, ')
  return figure


def shared_seeds(arms: dict[str, list[Record]]) -> tuple[int, ...]:
  """Returns the finished seeds over which means are taken: of the most arms, then the most seeds.

  Each arm's own set is a candidate; it counts for every arm that has all of it.
  """
  sets = [frozenset(_finished(trials)) for trials in arms.values()]
  candidates = sorted({tuple(sorted(seeds)) for seeds in sets if seeds})
  counts = {seeds: sum(set(seeds) <= of for of in sets) * len(seeds) for seeds in candidates}
  return max(candidates, key=lambda seeds: counts[seeds], default=())


def _finished(trials: Sequence[Record]) -> set[int]:
  return {record.seed for record in trials if record.status == FINISHED}


def _together(arms: Any, means: Any, labels: dict[str, str], limits: Any) -> Figure:
  figure, [(axes, names)] = make_panels([labels[arm] for arm in arms])
  for arm, style in zip(arms, styles(), strict=False):
    axes.plot([], [], label=wrapped(labels[arm]), **style)
    _draw(axes, arms[arm], means.get(arm), style, limits)
  axes.set_ylim(limits)
  label_panels([(axes, names)], 'optimizer step', 'training loss (nats per token)')
  return figure


def _apart(baseline: str, arms: Any, means: Any, labels: dict[str, str], limits: Any) -> Figure:
  columns = min(_MOST_COLUMNS, len(arms))
  rows = -(-len(arms) // columns)
  figure = Figure(figsize=(PAGE_WIDTH, 0.7 + 1.3 * rows), layout='constrained')
  panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  for axes, arm in zip(panels.flat, arms, strict=False):
    for steps, mean, _ in (means[other] for other in means if other not in (arm, baseline)):
      axes.plot(steps, mean, color='0.85', lw=0.7, zorder=1)
    if baseline in means and baseline != arm:
      axes.plot(*means[baseline][:2], color='black', lw=0.8, zorder=1.5)
    _draw(axes, arms[arm], means.get(arm), {'color': COLORS[0], 'ls': '-', 'lw': 1.4}, limits)
    axes.set_title(wrapped(labels[arm], 24), fontsize='small', loc='left')
    axes.set_ylim(limits)
  for axes in list(panels.flat)[len(arms) :]:
    axes.set_visible(False)
  for column in range(columns):
    last = max(row for row in range(rows) if row * columns + column < len(arms))
    panels[last, column].set_xlabel('optimizer step')
    panels[last, column].tick_params(labelbottom=True)
  figure.supylabel('training loss (nats per token)')
  return figure


def _draw(axes: Axes, trials: Any, mean: Any, style: dict[str, Any], limits: Any) -> None:
  if mean is not None:
    steps, values, half = mean
    axes.plot(steps, values, **(style if half is not None else style | {'ls': (0, (4, 2))}))
    if half is not None:
      axes.fill_between(steps, values - half, values + half, color=style['color'], alpha=0.2, lw=0)
  for curve in [_curve(r) for r in trials if r.status != FINISHED]:
    axes.plot(*curve.T, color=style['color'], lw=0.8, ls=':')
    # At the edge if the loss left the panel.
    end = curve[-1:, 0], np.clip(curve[-1:, 1], *limits)
    axes.plot(*end, color=style['color'], ls='none', marker='x', clip_on=False)


def _curve(record: Record) -> np.ndarray:
  """Returns [step, loss] as an array, without what is not finite."""
  curve = np.array(record.curve, np.float64).reshape(-1, 2)
  return curve[np.isfinite(curve).all(1)]


def _mean_curve(trials: Sequence[Record], seeds: Sequence[int]) -> Any:
  """Returns steps, mean and half interval at the steps that all curves have.

  Over the given seeds; without the half interval over what there is of them, or of any, if one
  lacks; None without a finished trial or a common step.
  """
  finished = {r.seed: dict(_curve(r)) for r in trials if r.status == FINISHED}
  whole = set(seeds) <= set(finished)
  chosen = [s for s in finished if s in seeds] or list(finished)
  if not chosen:
    return None
  losses = [finished[seed] for seed in chosen]
  steps = np.array(sorted(set.intersection(*(set(loss) for loss in losses))))
  if not len(steps):
    return None
  mean, half = mean_and_interval([[loss[step] for step in steps] for loss in losses])
  return steps, mean, half if whole else None


def _loss_range(curves: Sequence[tuple[Any, Any, Any]]) -> tuple[float, float]:
  """Returns the bounds of an axis for the losses after the start, and their bands where they fit.

  Bands of few seeds may be much wider than all curves are apart: they widen the range of these by
  as much again on each side at most.

  Args:
    curves: steps, means and half intervals or None.
  """
  last = max(steps[-1] for steps, _, _ in curves if len(steps))
  shown = []
  for steps, losses, half in curves:
    after = steps >= _WARMUP_SHARE * last
    shown.append((losses[after], np.nan_to_num(0 if half is None else half[after])))
  values = np.concatenate([losses for losses, _ in shown])
  low, high = float(values.min()), float(values.max())
  most = (high - low) or np.inf
  lowest = np.min(np.concatenate([losses - half for losses, half in shown]))
  highest = np.max(np.concatenate([losses + half for losses, half in shown]))
  low, high = max(float(lowest), low - most), min(float(highest), high + most)
  margin = 0.05 * (high - low) or 0.1
  return low - margin, high + margin
