"""Numbers that a study file computes itself from a finished trial: `Study.metrics`.

They are computed for every report from what the trial left, never kept with it: so a changed
function applies to all trials. A results.jsonl keeps the values with the digest of the source of
their function, and a study whose function is another one refuses them. The digest is only of the
text of the function, not of functions that it calls.
"""

import copy
import hashlib
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

from moe_jax.errors import UserError
from moe_jax.results.records import Record
from moe_jax.study import FinishedTrial, Study
from moe_jax.sweep.metric_paths import USER


def values_of(study: Study, trial: FinishedTrial) -> tuple[dict[str, float], dict[str, str]]:
  """Returns a study's own metrics of a trial by 'user/NAME', and why others have no value."""
  values, errors = {}, {}
  for name, function in study.metrics.items():
    try:
      # A copy for each: none sees what another did to it.
      values[f'{USER}/{name}'] = _number(function(copy.deepcopy(trial)))
    except (Exception, SystemExit) as error:
      # It is the user's code: whatever it raises, the trial and other metrics are kept.
      text = ' '.join(f'{type(error).__name__}: {error}'.split())
      errors[f'{USER}/{name}'] = f'study.metrics {name!r} ({_where(function)}): {text}'
  return values, errors


def _number(value: Any) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if isinstance(value, bool | str) or not math.isfinite(number):
    raise ValueError(f'returned {value!r:.80}, must return a finite number')
  return number


def _where(function: Callable) -> str:
  """Returns the name of a function with its file and line, as far as Python knows them."""
  name = getattr(function, '__qualname__', repr(function))
  try:
    path, (_, line) = inspect.getsourcefile(function), inspect.getsourcelines(function)
  except (TypeError, OSError):
    return name
  return f'{name}, {os.path.basename(path or "?")}:{line}'


def sources_of(study: Study) -> dict[str, str]:
  """Returns the SHA-256 of the source of each of the study's own metrics by 'user/NAME'.

  Raises:
    UserError: for a function without source.
  """
  return {f'{USER}/{name}': _digest(name, function) for name, function in study.metrics.items()}


def _digest(name: str, function: Callable) -> str:
  try:
    source = inspect.getsource(function)
  except (TypeError, OSError) as error:
    raise UserError(
      'study.metrics', name, 'must be a function written in Python, by def or lambda'
    ) from error
  return hashlib.sha256(source.encode()).hexdigest()


def check_sources(study: Study, record: Record) -> None:
  """Checks that a record's values are of the functions that the study has now.

  Raises:
    UserError: names the metric.
  """
  for name, digest in sources_of(study).items():
    kept = record.metric_sources.get(name, digest)
    if name in record.metrics and kept != digest:
      raise UserError(
        'study.metrics',
        name.removeprefix(f'{USER}/'),
        f'--results holds values of another function of this name (trial {record.trial}): rename '
        'the function, put the earlier one back, or report with the --workdir of the runs alone',
      )
