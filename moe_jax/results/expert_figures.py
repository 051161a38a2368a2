"""Figures of the experts of one trial: their load over training, and by domain."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from moe_jax.results.panels import STYLE, by_arm, wrapped
from moe_jax.results.records import FINISHED, Record
from moe_jax.study import Study


@matplotlib.rc_context(STYLE)
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


@matplotlib.rc_context(STYLE)
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
    axes.set_yticks(range(len(loads)), [wrapped(domain) for domain in loads])
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
  figure.suptitle(wrapped(text, int(13 * figure.get_figwidth())), fontsize='medium')
