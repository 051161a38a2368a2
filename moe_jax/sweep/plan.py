"""Which trials a call of the sweep runs, and what they cost."""

import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import config as config_lib
from moe_jax.errors import UserError, did_you_mean
from moe_jax.study import Study
from moe_jax.sweep import collect
from moe_jax.sweep.trials import Trial, training_flops, vocab_size_of
from moe_jax.train import accounting
from moe_jax.train.manifest import FREE_FIELDS


def without_known(trials: list[Trial], results: str | None) -> list[Trial]:
  """Returns the trials that `results`, a file of earlier runs, does not hold the end of."""
  if results is None:
    return trials
  known = collect.known_records(trials, results)
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
    room, _, name = field.partition('.')
    kind = type(config_lib.SCHEMA[room][name].default)
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


def print_plan(study: Study, trials: list[Trial]) -> None:
  """Prints each trial with its size, and what all of them cost."""
  print(f'{study.name}: {study.question}')
  print(
    f'{"trial":<14}{"total":>12}{"active":>12}{"tokens":>13}{"FLOPs":>10}{"about":>8}  arm, seed'
  )
  rate = _products_per_second()
  total = 0.0
  for trial in trials:
    config = trial.config
    counts = accounting.parameter_counts(config, vocab_size_of(config))
    tokens = config.train.num_steps * config.data.batch_size * config.data.sequence_length
    flops = training_flops(config)
    total += flops
    print(
      f'{trial.id:<14}{counts["total"]:>12,}{counts["active"]:>12,}{tokens:>13,}{flops:>10.1e}'
      f'{_duration(flops / rate):>8}  {trial.arm}, {trial.seed}'
    )
  absent = {t.config.data.name for t in trials if not _is_here(t.config.data.name)}
  for name in sorted(absent):
    print(f'{"missing":<14}data.name={name!r} is not on this machine')
  for arm in study.arms:
    if arm.dropped:
      print(f'{"dropped":<14}{arm.name}: {arm.dropped}')
  print(
    f'{len(trials)} trials, {total:.1e} FLOPs, about {_duration(total / rate)} here if training '
    'ran at a third of the speed of a matrix product, compiling and evaluating apart'
  )


def _is_here(data_name: str) -> bool:
  """False for a text that is not there; other data sets are fetched when they are needed."""
  kind, _, path = data_name.partition(':')
  return kind != 'text' or os.path.exists(path)


def _products_per_second() -> float:
  """Returns a third of the floating-point operations a second of a large matrix product here."""
  x = jnp.ones((1024, 1024))
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    product(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * 1024**3 / sorted(seconds)[2] / 3


def _duration(seconds: float) -> str:
  minutes = round(seconds / 60)
  if not minutes:
    return '<1m'
  return f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m'
