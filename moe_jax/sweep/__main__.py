"""Runs a study: python -m moe_jax.sweep --study=experiments/NAME/study.py --workdir=DIR."""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import cli
from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.study import Study
from moe_jax.sweep import collect, runner
from moe_jax.sweep.trials import Trial, load_study, training_flops, trials_of, vocab_size_of
from moe_jax.train import accounting
from moe_jax.train.manifest import FREE_FIELDS
from moe_jax.train.opening import mesh_of

_STUDY = flags.DEFINE_string('study', None, 'File that defines get_study().')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Of the sweep; shared by all its workers.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print every trial and run none.')
_SHARD = flags.DEFINE_string('shard', '0/1', 'i/n: every n-th trial, from the i-th.')
_TRIAL = flags.DEFINE_string('trial', None, 'Run the trial with this id alone.')
_PACK = flags.DEFINE_integer(
  'pack', 1, 'Train up to so many trials as one program, if they differ in numbers alone.'
)
_RESULTS = flags.DEFINE_string(
  'results', None, 'A results.jsonl of earlier runs, whose finished trials are not run again.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'FIELD=VALUE of what changes no result, as mesh.data=2 or data.data_dir=DIR.'
)


def main() -> int:
  """Runs what is not done yet; 1 if a trial failed, 128 + signal if interrupted."""
  study = load_study(cli.required(_STUDY))
  if _PACK.value < 1:
    raise UserError('--pack', _PACK.value, 'must be at least 1')
  trials = _of_shard(_unknown(_chosen(trials_of(study, _free_fields()))))
  evaluates = next((t.config.train.eval_every for t in trials if t.config.train.eval_every), 0)
  if _PACK.value > 1 and evaluates:
    raise UserError(
      'train.eval_every', evaluates, 'must be 0 with --pack; --set=train.eval_every=0 makes it so'
    )
  if _DRY_RUN.value:
    _print_plan(study, trials)
    return 0
  workdir = cli.required(_WORKDIR)
  for trial in trials:
    mesh_of(trial.config)
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise UserError('--workdir', workdir, f'cannot be written: {error.strerror}') from error
  try:
    with _kept_programs(workdir):
      counts = runner.run(study, trials, workdir, lambda line: tqdm.tqdm.write(line), _PACK.value)
  except (runner.Interrupted, KeyboardInterrupt) as interrupted:
    print('interrupted; the same command goes on from here', flush=True)
    # Before the first step a Ctrl-C is Python's own.
    return 128 + getattr(interrupted, 'signal', 2)
  print(
    f'\n{len(trials)} trials: {counts.finished} finished, {counts.diverged} diverged, '
    f'{counts.failed} failed, {counts.elsewhere} held by other workers'
  )
  return 1 if counts.failed else 0


@contextlib.contextmanager
def _kept_programs(workdir: str) -> Iterator[None]:
  """Keeps compiled programs on disk for the next worker, or for this one after a kill."""
  # A program for one CPU may use instructions that another lacks: each machine keeps its own.
  host = f'cpu-{platform.node()}' if jax.default_backend() == 'cpu' else jax.default_backend()
  settings = {
    'jax_compilation_cache_dir': os.path.join(workdir, 'compilation_cache', host),
    'jax_persistent_cache_min_compile_time_secs': 0.5,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _unknown(trials: list[Trial]) -> list[Trial]:
  """Returns the trials that --results does not hold the end of."""
  if _RESULTS.value is None:
    return trials
  if not os.path.isfile(_RESULTS.value):
    raise UserError('--results', _RESULTS.value, 'does not exist')
  known = collect.known_records(trials, _RESULTS.value)
  print(f'{len(known)} of {len(trials)} trials ended in {_RESULTS.value}')
  return [trial for trial in trials if trial.id not in known]


def _free_fields() -> dict[str, Any]:
  """Returns {field: value} of --set.

  Raises:
    UserError: for a field that decides the results, or a value of the wrong type.
  """
  result: dict[str, Any] = {}
  for text in _SET.value:
    field, _, value = text.partition('=')
    if field not in FREE_FIELDS:
      raise UserError('--set', text, f'must be FIELD=VALUE with one of {", ".join(FREE_FIELDS)}')
    room, _, name = field.partition('.')
    kind = type(config_lib.SCHEMA[room][name].default)
    try:
      result[field] = kind(value)
    except ValueError as error:
      raise UserError('--set', text, f'must be of type {kind.__name__}') from error
  return result


def _chosen(trials: list[Trial]) -> list[Trial]:
  if _TRIAL.value is None:
    return trials
  chosen = [trial for trial in trials if trial.id == _TRIAL.value]
  if not chosen:
    raise UserError('--trial', _TRIAL.value, 'is no trial of the study; --dry_run lists them')
  return chosen


def _of_shard(trials: list[Trial]) -> list[Trial]:
  index, _, count = _SHARD.value.partition('/')
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise UserError('--shard', _SHARD.value, 'must read i/n with 0 <= i < n')
  return trials[int(index) :: int(count)]


def _print_plan(study: Study, trials: list[Trial]) -> None:
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


if __name__ == '__main__':
  cli.run(main)
