"""The figure of expert load: over training, by domain, and over the whole evaluated split."""

import io
import pathlib
from typing import Any

import matplotlib
import ml_collections
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.errors import UserError
from moe_jax.files import write_atomically
from moe_jax.results import style
from moe_jax.results.panels import wrapped
from moe_jax.run.metrics_file import read_metrics


@matplotlib.rc_context(style.SCREEN)
def draw(
  workdir: str, evaluation: dict[str, Any], config: ml_collections.ConfigDict, suffix: str = ''
) -> pathlib.Path:
  """Draws WORKDIR/expert_load{suffix}.png and returns its path.

  One row for each MoE layer. Left: load of each expert at each logged step. Middle: the same for
  each domain of the evaluated split; both in units of 1/E and on one scale. Right: share of
  assignments over the whole split, with 1/E marked and a cross at each dead expert.

  Args:
    workdir: of the run.
    evaluation: from `moe_jax.train.evaluate.evaluate`, with the `step` of its checkpoint.
    config: of the run.
    suffix: of the file name.

  Raises:
    UserError: for a run without a logged training step.
  """
  path = pathlib.Path(workdir) / f'expert_load{suffix}.png'
  figure = _figure(workdir, evaluation, config.moe)
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=120)
  write_atomically(path, content.getvalue())
  return path


def _figure(workdir: str, evaluation: dict[str, Any], moe: Any) -> Figure:
  records = [
    r for r in read_metrics(pathlib.Path(workdir) / 'metrics.jsonl') if r['split'] == 'train'
  ]
  if not records:
    raise UserError(
      'workdir', workdir, 'metrics.jsonl has no training step to draw; use --nofigure'
    )
  steps = np.array([record['step'] for record in records])
  by_step_SLE = np.array([record['router/load'] for record in records], np.float64)
  domains = {name: summary['router/load'] for name, summary in evaluation['domains'].items()}
  by_domain_NLE = np.array([*domains.values()], np.float64)
  whole_LE = np.array(evaluation['router/load'], np.float64)
  num_layers, num_experts = whole_LE.shape
  relative = by_step_SLE * num_experts, by_domain_NLE * num_experts
  norm = style.load_norm(relative)
  figure = Figure(figsize=(11, 1.7 + 1.9 * num_layers), layout='constrained')
  panels = figure.subplots(
    num_layers, 3, squeeze=False, width_ratios=(3, 2, 2), sharex='col', sharey='col'
  )
  for layer, (over_training, by_domain, whole) in enumerate(panels):
    image = _map(over_training, steps, relative[0][:, layer].T, norm)
    over_training.set_ylabel(f'MoE layer {layer}\nexpert')
    over_training.yaxis.get_major_locator().set_params(integer=True)
    _map(by_domain, np.arange(num_experts), relative[1][:, layer], norm)
    by_domain.set_yticks(range(len(domains)), [wrapped(name, 20) for name in domains])
    by_domain.set_ylim(len(domains) - 0.5, -0.5)
    _bars(whole, whole_LE[layer])
  panels[-1, 0].set_xlabel('optimizer step')
  for axes in panels[-1, 1:]:
    axes.set_xlabel('expert')
    axes.xaxis.get_major_locator().set_params(integer=True)
  panels[0, 0].set_title('over training, by batch')
  text = evaluation.get('data') or f'{evaluation["split"]} split'
  panels[0, 1].set_title(wrapped(f'{text}, by domain', 40))
  panels[0, 2].set_title(wrapped(f'{text}, all domains', 40))
  # Equal to the highest where the quantile of the scale is the largest load.
  exceeded = max(float(loads.max()) for loads in relative) > norm.vmax  # type: ignore[operator]
  bar_layout = {'location': 'bottom', 'aspect': 60, 'shrink': 0.7, 'pad': 0.02}
  style.load_bar(figure, image, panels, exceeded, **bar_layout)
  figure.suptitle(_title(workdir, evaluation['step'], moe))
  return figure


def _title(workdir: str, step: int, moe: Any) -> str:
  name = pathlib.Path(workdir).resolve().name.replace('$', r'\$')
  experts = f'{moe.router}, {moe.num_experts} experts, {moe.num_selected_experts} selected'
  return f'Load of each expert before any drop: {name} ({experts}), step {step:,}'


def _map(axes: Axes, xs: np.ndarray, loads: Float[np.ndarray, 'rows columns'], norm: Any) -> Any:
  axes.grid(False)
  rows = np.arange(len(loads))
  edges = _edges(xs), _edges(rows)
  return axes.pcolormesh(*edges, loads, cmap=style.LOAD_COLORS, norm=norm, rasterized=True)


def _edges(centers: np.ndarray) -> np.ndarray:
  """Returns the borders of cells, half-way between their centres; one cell is 1 wide."""
  middles = (centers[1:] + centers[:-1]) / 2
  first, last = (middles[0], middles[-1]) if len(middles) else (centers[0] + 0.5, centers[0] - 0.5)
  return np.concatenate([[2 * centers[0] - first], middles, [2 * centers[-1] - last]])


def _bars(axes: Axes, load: Float[np.ndarray, 'E']) -> None:
  axes.set_axisbelow(True)
  axes.bar(range(len(load)), load, color=style.COLORS[0], width=0.8)
  style.mark_balance(axes, len(load))
  style.mark_dead(axes, load)
  axes.set_ylabel('share of assignments')
