"""Selection of the trials that a call of the sweep runs."""

from collections.abc import Sequence
from typing import Any

from moe_jax import config as config_lib
from moe_jax.errors import UserError, did_you_mean
from moe_jax.field_names import field_value
from moe_jax.schema import FREE_FIELDS
from moe_jax.sweep import collect
from moe_jax.sweep.trials import Trial


def without_known(trials: list[Trial], results: str | None, quiet: bool = False) -> list[Trial]:
  """Returns the trials that `results`, a file of earlier runs, does not hold the end of."""
  if results is None:
    return trials
  known = collect.known_records(trials, results)
  if not quiet:
    print(f'{len(known)} of {len(trials)} trials ended in {results}')
  return [trial for trial in trials if trial.id not in known]


def free_fields(settings: Sequence[str]) -> dict[str, Any]:
  """Returns {field: value} of the texts FIELD=VALUE of --set.

  Raises:
    UserError: for a field that decides the results, or a value of the wrong type.
  """
  result: dict[str, Any] = {}
  for text in settings:
    field, _, value = text.partition('=')
    if field not in FREE_FIELDS:
      near = did_you_mean(field, FREE_FIELDS)
      allowed = f'must be FIELD=VALUE with one of {", ".join(FREE_FIELDS)}{near}'
      raise UserError('--set', text, allowed)
    if field in result:
      raise UserError('--set', text, f'given twice, first as {result[field]!r}; give it once')
    kind = type(field_value(config_lib.SCHEMA, field).default)
    try:
      result[field] = kind(value)
    except ValueError as error:
      raise UserError('--set', text, f'must be of type {kind.__name__}') from error
  return result


def with_id(trials: list[Trial], trial_id: str | None) -> list[Trial]:
  """Returns the trial with an id; all of them without one."""
  if trial_id is None:
    return trials
  chosen = [trial for trial in trials if trial.id == trial_id]
  if not chosen:
    raise UserError('--trial', trial_id, 'is no trial of the study; --dry_run lists them')
  return chosen
