"""Data of the page's figures: numbers with intervals and seeds by arm, and loads by rank."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.results import tables
from moe_jax.results.expert_figures import SPECIALIZATION
from moe_jax.results.loss_figure import shared_seeds
from moe_jax.results.names import deciding_title, metric_title
from moe_jax.results.panels import by_arm, mean_and_interval, values_of
from moe_jax.results.records import FINISHED, Record
from moe_jax.results.summary import Summary
from moe_jax.study import labels_of

# Next to the deciding metric, where an arm has them; of lists over layers the mean.
_FURTHER = (
  'router/max_violation/mean',
  'router/dead_experts/mean',
  'router/drop_share',
  *(f'{path}/mean' for path in SPECIALIZATION),
)
_MOST_LAYERS = 4


def content(summary: Summary, records: Sequence[Record]) -> dict[str, Any]:
  """Returns the data of the page's figures: `panels`, `loads`, `seeds` and `labels`.

  Args:
    summary: of a study.
    records: of all its trials.
  """
  arms = by_arm(summary.study, records)
  return {
    'panels': _panels(summary, arms),
    'loads': _loads(arms),
    # Those that means of curves are taken over.
    'seeds': list(shared_seeds({arm: t for arm, t in arms.items() if any(r.curve for r in t)})),
    'labels': labels_of(summary.study),
  }


def _panels(summary: Summary, arms: dict[str, list[Record]]) -> list[dict[str, Any]]:
  study = summary.study
  evaluation = tables.further_evaluation(summary)
  own = study.metric.name.partition('/')[0]
  known = {name for arm in summary.arms for name in arm.metrics}
  names = [study.metric.name]
  for path in _FURTHER:
    # Statistics of a whole split, as specialisation, may be in only one evaluation.
    found = [e for e in (evaluation, own, *study.evaluations) if f'{e}/{path}' in known]
    names += [f'{found[0]}/{path}'] if found else []
  panels = []
  for name in dict.fromkeys(names):
    rows = []
    for arm, trials in arms.items():
      values = values_of(trials, name)
      if values:
        mean, half = (float(number) for number in mean_and_interval(values))
        rows.append({'arm': arm, 'mean': mean, 'half': half, 'seeds': values})
    title = deciding_title(study.metric) if name == study.metric.name else metric_title(name)
    if rows:
      panels.append({'title': title, 'name': name, 'rows': rows})
  return panels


def _loads(arms: dict[str, list[Record]]) -> list[dict[str, Any]]:
  """Returns for each shown MoE layer the last load in units of 1/E, by rank, mean over seeds."""
  last = {
    arm: [r.load[-1][1] for r in trials if r.status == FINISHED and r.load]
    for arm, trials in arms.items()
  }
  num_layers = max((len(load) for loads in last.values() for load in loads), default=0)
  if not num_layers:
    return []
  shown = np.linspace(0, num_layers - 1, min(num_layers, _MOST_LAYERS)).round().astype(int)
  panels = []
  for layer in np.unique(shown).tolist():
    rows = []
    for arm, loads in last.items():
      ranked = [np.sort(np.asarray(load[layer]))[::-1] * len(load[layer]) for load in loads]
      if ranked and len({len(load) for load in ranked}) == 1:
        mean, half = mean_and_interval(ranked)
        rows.append({'arm': arm, 'mean': _rounded(mean), 'half': _rounded(half)})
    panels.append({'layer': layer, 'rows': rows})
  return panels


def _rounded(values: np.ndarray) -> list[float]:
  return [round(float(value), 4) for value in values]
