"""Short names of metrics for tables and figures, by their paths."""

import re
from collections.abc import Iterable

from moe_jax.study import Metric

# Titles of metrics by the end of their path. What is not here is named by that end.
TITLES = {
  'bits_per_byte': 'bits per byte',
  'loss': 'loss',
  'router/drop_share': 'drop share',
  'router/token_drop_share': 'tokens dropped',
  'router/max_violation': 'MaxVio',
  'router/dead_experts': 'dead experts',
  'router/load_entropy': 'load entropy',
  'router/load_cv': 'load CV',
  'router/expert_domain_mi': 'expert-domain MI, bits',
  'router/expert_token_mi': 'expert-token MI, bits',
  'router/domain_load_overlap': 'overlap of domains',
  'router/expert_similarity': 'expert similarity',
  'router/coactivation': 'coactivation',
}


def metric_title(name: str) -> str:
  """Returns the title of a metric in tables: 'dropless/router/max_violation/mean' is 'MaxVio'.

  The mean over layers is not said; other statistics, single layers and domains are.
  """
  _, _, path = name.partition('/')
  stem, _, last = path.rpartition('/')
  said = []
  if stem and (last in ('mean', 'max', 'min') or re.fullmatch(r'layer_\d+', last)):
    path = stem
    said = (
      [] if last == 'mean' else [last.replace('_', ' ') if '_' in last else f'{last} of layers']
    )
  if path.startswith('domains/'):
    # A domain may have slashes in its name.
    known = (metric for metric in TITLES if path.endswith(f'/{metric}'))
    metric = next(known, path.rpartition('/')[2])
    said.insert(0, path.removeprefix('domains/').removesuffix(f'/{metric}'))
    path = metric
  title = TITLES.get(path) or path.rpartition('/')[2].replace('_', ' ') or name
  return ', '.join([title, *said])


def metric_titles(names: Iterable[str]) -> dict[str, str]:
  """Returns titles by name; where two would be alike each says its evaluation."""
  names = list(dict.fromkeys(names))
  titles = {name: metric_title(name) for name in names}
  taken = list(titles.values())
  return {
    name: title if taken.count(title) == 1 else f'{title} ({name.partition("/")[0]})'
    for name, title in titles.items()
  }


def unit_of(metric: Metric) -> str:
  """Returns the deciding metric's unit; '' where a study kept the default for another metric."""
  is_default = metric.unit == Metric().unit
  return '' if is_default and not metric.name.endswith('bits_per_byte') else metric.unit


def deciding_title(metric: Metric) -> str:
  """Returns the title of the deciding metric in tables and figures, with its unit."""
  title, unit = metric_title(metric.name), unit_of(metric)
  return title if not unit or unit in title else f'{title} ({unit})'
