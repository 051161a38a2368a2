"""The figure of expert load: over training, and by domain on the evaluated split."""

import pathlib
from typing import Any

import matplotlib.figure
import numpy as np

from moe_jax.errors import UserError
from moe_jax.train.metrics import read_metrics

# More would not fit beside the figure; the bands then stand in order from below.
_MOST_IN_LEGEND = 16


def draw(workdir: str, evaluation: dict[str, Any]) -> pathlib.Path:
  """Draws WORKDIR/expert_load.png and returns its path.

  One row for each MoE layer. Left: share of assignments of each expert at each logged step. Right:
  the same for each domain of the evaluated split.

  Args:
    workdir: of the run.
    evaluation: from `moe_jax.train.evaluate.evaluate`.
  """
  records = [
    r for r in read_metrics(pathlib.Path(workdir) / 'metrics.jsonl') if r['split'] == 'train'
  ]
  if not records:
    raise UserError(
      'workdir', workdir, 'metrics.jsonl has no training step to draw; use --nofigure'
    )
  steps = [record['step'] for record in records]
  load_SLE = np.array([record['router/load'] for record in records])
  domains = list(evaluation['domains'])
  load_NLE = np.array([evaluation['domains'][domain]['router/load'] for domain in domains])
  num_layers, num_experts = load_SLE.shape[1:]
  figure = matplotlib.figure.Figure(figsize=(10, 1 + 2.4 * num_layers), layout='constrained')
  axes = figure.subplots(num_layers, 2, squeeze=False)
  for layer in range(num_layers):
    over_training, by_domain = axes[layer]
    bands = over_training.stackplot(steps, load_SLE[:, layer].T)
    over_training.set(
      ylim=(0, 1), xlim=(steps[0], max(steps[-1], steps[0] + 1)), ylabel=f'layer {layer}\nload'
    )
    image = by_domain.imshow(load_NLE[:, layer], aspect='auto', cmap='viridis', vmin=0)
    by_domain.set(yticks=range(len(domains)), yticklabels=domains, xticks=range(num_experts))
    figure.colorbar(image, ax=by_domain, label='share of assignments')
  if num_experts <= _MOST_IN_LEGEND:
    # Top down as the bands lie.
    figure.legend(
      list(reversed(bands)),
      [str(expert) for expert in reversed(range(num_experts))],
      title='expert',
      loc='outside left upper',
      fontsize='small',
    )
  axes[0, 0].set_title('training batches')
  axes[0, 1].set_title(f'{evaluation["split"]} split, by domain')
  axes[-1, 0].set_xlabel('step')
  axes[-1, 1].set_xlabel('expert')
  path = pathlib.Path(workdir) / 'expert_load.png'
  figure.savefig(path, dpi=120)
  return path
