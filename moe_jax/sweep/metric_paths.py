"""Paths of the numbers of an evaluation, by which one of them decides a study.

    dropless/bits_per_byte                        a number of the evaluation `dropless`
    dropless/router/max_violation/mean            of a list over MoE layers: mean, max, min,
    dropless/router/max_violation/layer_1         or one layer, counted from 0 among MoE layers
    dropless/domains/drama/bits_per_byte          a number of one domain
    dropless/domains/drama/router/load_cv/max     the same of a list
    user/NAME                                     the value of `Study.metrics[NAME]`

`check_name` checks before anything is trained that a number will exist; `number_at` reads it.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.sweep.evaluations import LAYER_METRICS, METRICS, POOLED_LAYER_METRICS, POOLED_METRICS

# Of a list over layers.
STATISTICS: dict[str, Callable[[list], Any]] = {'mean': np.mean, 'max': np.max, 'min': np.min}
USER = 'user'
_LAYER = re.compile(r'layer_(0|[1-9][0-9]{0,3})')


def number_at(evaluations: Mapping[str, Any], name: str) -> float | None:
  """Returns the number at a path; None if there is none, or if it is not finite.

  Args:
    evaluations: {evaluation: {metric: number or list over layers, 'domains': {domain: the same}}}.
    name: see the module; not 'user/NAME'.
  """
  evaluation, _, path = name.partition('/')
  summary = evaluations.get(evaluation, {})
  if path.startswith('domains/'):
    # A domain may have slashes in its name.
    found = [d for d in summary.get('domains', {}) if path.startswith(f'domains/{d}/')]
    if not found:
      return None
    domain = max(found, key=len)
    summary, path = summary['domains'][domain], path.removeprefix(f'domains/{domain}/')
  value = summary.get(path)
  if value is None:
    metric, _, statistic = path.rpartition('/')
    value = _of_layers(summary.get(metric), statistic)
  return float(value) if _is_number(value) else None


def _of_layers(values: Any, statistic: str) -> float | None:
  if not isinstance(values, list) or not values or not all(map(_is_number, values)):
    return None
  if statistic in STATISTICS:
    return float(STATISTICS[statistic](values))
  layer = _LAYER.fullmatch(statistic)
  return values[int(layer[1])] if layer and int(layer[1]) < len(values) else None


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_name(name: str, evaluations: tuple[str, ...], user: Mapping[str, Any]) -> None:
  """Checks that a study will have the number of a path, as far as the study itself can tell.

  Args:
    name: of the deciding metric.
    evaluations: of the study.
    user: its own metrics, by name.

  Raises:
    UserError: with the nearest names, and all of them.
  """
  evaluation, _, path = name.partition('/')
  if evaluation == USER and path in user:
    return
  pooled = evaluation in evaluations and not path.startswith('domains/')
  if evaluation in evaluations and _is_known(domain_and_path(path)[1], pooled):
    return
  raise UserError('study.metric', name, _what_is_allowed(name, evaluations, user))


def _is_known(path: str, pooled: bool) -> bool:
  numbers, lists = _names(pooled)
  metric, _, statistic = path.rpartition('/')
  is_list = statistic in STATISTICS or _LAYER.fullmatch(statistic) is not None
  return path in numbers or (metric in lists and is_list)


def _names(pooled: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Returns the names of numbers and of lists over layers, of a whole split or of a domain."""
  if pooled:
    return METRICS + POOLED_METRICS, LAYER_METRICS + POOLED_LAYER_METRICS
  return METRICS, LAYER_METRICS


def domain_and_path(path: str) -> tuple[str, str]:
  """Returns the domain of a path after its evaluation, '' for none, and the rest of the path."""
  if not path.startswith('domains/'):
    return '', path
  rest = path.removeprefix('domains/')
  # The end of the domain follows from the rest: the longest metric that the rest ends in.
  parts = rest.split('/')
  for first in range(1, len(parts)):
    if _is_known('/'.join(parts[first:]), pooled=False):
      return '/'.join(parts[:first]), '/'.join(parts[first:])
  return parts[0], '/'.join(parts[1:])


def _what_is_allowed(name: str, evaluations: tuple[str, ...], user: Mapping[str, Any]) -> str:
  evaluation, _, path = name.partition('/')
  numbers, lists = _names(pooled=not path.startswith('domains/'))
  own = ''.join(f', {USER}/{one}' for one in user)
  if evaluation in evaluations and domain_and_path(path)[1] in lists:
    return f'is a list over layers; add one of /{", /".join(STATISTICS)} or /layer_0'
  every = [f'{one}/{number}' for one in evaluations for number in numbers]
  every += [f'{one}/{each}/{how}' for one in evaluations for each in lists for how in STATISTICS]
  nearest = difflib.get_close_matches(name, every + own.split(', ')[1:], 3, 0.6)
  hint = f'did you mean {" or ".join(nearest)}? ' if nearest else ''
  return (
    f'{hint}must be EVALUATION/NAME with an evaluation of the study ({", ".join(evaluations)}) and '
    f'one of {", ".join(numbers)}, or one of {", ".join(lists)} followed by '
    f'/{", /".join(STATISTICS)} or /layer_0; EVALUATION/domains/DOMAIN/NAME{own}'
  )


def check_layers(name: str, arm: str, num_moe_layers: int) -> None:
  """Checks that an arm has the layers that a path names.

  Args:
    name: that `check_name` accepts.
    arm: for the message.
    num_moe_layers: of its model; 0 if it is dense.

  Raises:
    UserError: for a number of routers of a dense model, or a layer that is not there.
  """
  path = domain_and_path(name.partition('/')[2])[1]
  if name.startswith(f'{USER}/') or not path.startswith('router/'):
    return
  if not num_moe_layers:
    raise UserError('study.metric', name, f'arm {arm!r} is dense: it has no routers')
  layer = _LAYER.fullmatch(path.rpartition('/')[2])
  if layer and int(layer[1]) >= num_moe_layers:
    raise UserError(
      'study.metric', name, f'arm {arm!r} has MoE layers 0 to {num_moe_layers - 1} only'
    )
