"""Records of the trials of a study, read from disk, one for each."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import config as config_lib
from moe_jax.errors import DamagedError, UserError
from moe_jax.results import records
from moe_jax.results.records import Record
from moe_jax.run import manifest, status
from moe_jax.run.metrics_file import read_metrics
from moe_jax.study import Study, labels_of
from moe_jax.sweep import metric_paths, outcome, user_metrics
from moe_jax.sweep.trials import Trial, trial_id, trials_of

_POINTS_OF_CURVE = 200
_POINTS_OF_LOAD = 40
# Lists over experts: kept by domain and over time, not among the numbers.
_OF_EXPERTS = ('router/load', 'router/load_kept')


def records_of(
  study: Study,
  workdir: str | os.PathLike,
  command: str = '',
  known: Mapping[str, Record] | None = None,
) -> list[Record]:
  """Returns a record of every trial of a study, whatever its outcome.

  Args:
    study: whose trials are read.
    workdir: of the sweep.
    command: that runs the sweep; a trial's own adds its id.
    known: from `known_records`; replaces trials that have not ended in the directory.
  """
  known = {id_: as_requested(study, record) for id_, record in (known or {}).items()}
  labels = labels_of(study)
  found = (
    dataclasses.replace(_record(study, trial, workdir, command), label=labels[trial.arm])
    for trial in trials_of(study)
  )
  return [
    known.get(record.trial, record)
    if record.status in (records.MISSING, records.UNFINISHED, records.FAILED)
    else record
    for record in found
  ]


def as_requested(study: Study, record: Record) -> Record:
  """Returns a record of a results.jsonl with the label and the deciding metric of the study.

  Raises:
    UserError: if it holds values of a metric of the study file whose function is another one now.
  """
  record = dataclasses.replace(record, label=labels_of(study).get(record.arm, record.label))
  if record.status != records.FINISHED:
    return record
  user_metrics.check_sources(study, record)
  evaluations: dict[str, Any] = {
    name: {'domains': domains} for name, domains in record.domains.items()
  }
  for name, value in record.metrics.items():
    evaluation, _, metric = name.partition('/')
    evaluations.setdefault(evaluation, {})[metric] = value
  absent = {
    name: 'is not in --results, and only a --workdir can give it'
    for name in user_metrics.sources_of(study)
    if name not in record.metrics
  }
  return dataclasses.replace(
    record,
    metrics=record.metrics | _deciding(study, evaluations),
    metric_errors=absent | record.metric_errors,
  )


def _deciding(study: Study, evaluations: dict[str, Any]) -> dict[str, float]:
  """Returns the deciding metric by its path, if the evaluations have it."""
  number = metric_paths.number_at(evaluations, study.metric.name)
  return {} if number is None else {study.metric.name: number}


def known_records(trials: list[Trial], path: str | os.PathLike) -> dict[str, Record]:
  """Returns by trial id the records of a results.jsonl that need not be made again.

  Those of trials that finished or diverged, with the very config that the study gives now; fields
  that the schema did not have then must be at their defaults. Each keeps its own commit.

  Raises:
    UserError: if the file holds no record.
    DamagedError: if it holds anything else, too.
  """
  ended = {}
  for record in given_records(path):
    if record.status in (records.FINISHED, records.DIVERGED):
      ended[id_today(record, path)] = record
  return {
    trial.id: dataclasses.replace(
      ended[trial.id], trial=trial.id, arm=trial.arm, seed=trial.seed, changes=trial.changes
    )
    for trial in trials
    if trial.id in ended
  }


def given_records(path: str | os.PathLike) -> list[Record]:
  """Returns the records of the file that --results names.

  Raises:
    UserError: if it holds none: the path is wrong.
    DamagedError: as `records.read_records`.
  """
  try:
    return records.read_records(path)
  except records.NoRecordsError as error:
    why = str(error).removeprefix(f'{path} ')
    raise UserError('--results', str(path), f'{why}; it must be a results.jsonl') from error


def id_today(record: Record, path: str | os.PathLike) -> str:
  """Returns the id that a record's config has under today's schema."""
  config = config_lib.get_config()
  try:
    config.update(record.config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path}: the config of trial {record.trial} cannot be read') from error
  return trial_id(config)


def _record(study: Study, trial: Trial, workdir: str | os.PathLike, command: str) -> Record:
  known: dict[str, Any] = {
    'trial': trial.id,
    'arm': trial.arm,
    'seed': trial.seed,
    'changes': trial.changes,
    'config': trial.config.to_dict(),
    'num_steps': trial.config.train.num_steps,
    'command': f'{command} --trial={trial.id}' if command else '',
  }
  folder = trial.folder(workdir)
  try:
    metadata = manifest.read(folder) if manifest.exists(folder) else None
    if metadata:
      known |= _of_manifest(trial, metadata, folder)
      known['command'] = _environment(known['devices']) + known['command'] if command else ''
    try:
      ended = outcome.read(workdir, trial.id)
    except DamagedError as error:
      reason = f'{error}; the sweep makes it again from the run'
      return Record(status=records.DAMAGED, reason=reason, **known)
    if ended is None and metadata is None:
      return Record(status=records.MISSING, reason='was not begun', **known)
    if ended is None:
      assert metadata is not None
      known['step'], reason = _how_far(metadata, folder)
      return Record(status=records.UNFINISHED, reason=reason, **known)
    if ended['status'] != records.FINISHED:
      return Record(status=ended['status'], reason=ended['reason'], **known)
    if metadata is None:
      raise DamagedError(f'{folder}/{manifest.MANIFEST} is missing')
    if metadata['status'] != 'finished':
      raise DamagedError(f'{folder}/{manifest.MANIFEST} says {metadata["status"]!r}, not finished')
    now = outcome.digests(folder)
    for name, digest in ended['digests'].items():
      if now.get(name) != digest:
        raise DamagedError(f'{folder / name} is not what was written')
    splits = {result['split'] for result in ended['evaluations'].values()}
    known['data'] |= {'split': ', '.join(sorted(splits))}
    evaluations = ended['evaluations']
    results = _results(evaluations)
    own, errors = user_metrics.values_of(study, trial.finished(workdir, evaluations))
    results['metrics'] |= own | _deciding(study, evaluations)
    return Record(
      status=records.FINISHED,
      **known,
      **results,
      metric_errors=errors,
      metric_sources=user_metrics.sources_of(study),
      **_history(folder),
    )
  except (DamagedError, UserError) as error:
    again = f'to run it again, remove {folder} and {outcome.path_of(workdir, trial.id)}'
    return Record(status=records.DAMAGED, reason=f'{error}; {again}', **known)


def _how_far(metadata: dict[str, Any], folder: pathlib.Path) -> tuple[int, str]:
  """Returns the last step that a trial without an outcome is known to have done, and its state.

  The manifest of a run says the step of its last checkpoint; members of a pack have none until its
  end.
  """
  if metadata['status'] == 'finished':
    return metadata['step'], 'not evaluated yet'
  if metadata['status'] != status.RUNNING:
    return metadata['step'], metadata['status']
  logged, _ = status.last_loss(folder / 'metrics.jsonl')
  return max(metadata['step'], logged or 0), status.who_holds(folder)


def _of_manifest(trial: Trial, metadata: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
  config = manifest.config_of(metadata, folder)
  if trial_id(config) != trial.id:
    raise DamagedError(f'the manifest of trial {trial.id} is that of another config')
  data = config.data
  return {
    'step': metadata['step'],
    'config': metadata['config'],
    'data': {key: metadata['data'].get(key) for key in ('name', 'fingerprint', 'tokenizer')},
    'git_commit': metadata['git_commit'],
    'git_date': _date_of(metadata['git_commit']),
    'git_dirty': metadata['git_dirty'],
    'devices': metadata['devices'],
    'pack': metadata.get('pack', 1),
    'mesh': metadata['mesh'],
    'parameters': metadata['parameters'],
    'flops_per_token': metadata['training_flops_per_token'],
    'tokens': metadata['step'] * data.batch_size * data.sequence_length,
  }


@functools.cache
def _date_of(commit: str | None) -> str:
  """Returns the day of a commit as this checkout knows it; '' without one."""
  if not commit or not re.fullmatch('[0-9a-f]+', commit):
    return ''
  words = ['git', '-C', str(pathlib.Path(__file__).parent), 'show', '-s', '--format=%cs', commit]
  try:
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return done.stdout.strip() if done.returncode == 0 else ''


def _environment(devices: dict[str, Any]) -> str:
  """Returns the prefix of a command that sets the precision of a trial."""
  precision = devices.get('matmul_precision', 'default')
  return '' if precision == 'default' else f'JAX_DEFAULT_MATMUL_PRECISION={precision} '


def _results(evaluations: dict[str, Any]) -> dict[str, Any]:
  """Returns `metrics` and `domains` of a record."""
  metrics: dict[str, Any] = {}
  domains: dict[str, Any] = {}
  for name, result in evaluations.items():
    for key, value in result.items():
      if key not in ('domains', 'split', *_OF_EXPERTS):
        metrics[f'{name}/{key}'] = value
    domains[name] = {
      domain: {key: value for key, value in summary.items() if key != 'router/load_kept'}
      for domain, summary in result['domains'].items()
    }
  return {'metrics': metrics, 'domains': domains}


def _history(folder: pathlib.Path) -> dict[str, Any]:
  """Returns `curve` and `load` of a record from the lines of training."""
  lines = [line for line in read_metrics(folder / 'metrics.jsonl') if line['split'] == 'train']
  loads = [line for line in lines if 'router/load' in line]
  return {
    'curve': [[line['step'], line['loss']] for line in _thinned(lines, _POINTS_OF_CURVE)],
    'load': [
      [line['step'], np.round(line['router/load'], 5).tolist()]
      for line in _thinned(loads, _POINTS_OF_LOAD)
    ],
  }


def _thinned(lines: list, most: int) -> list:
  """Returns at most `most` of the lines, evenly spread, first and last among them."""
  if len(lines) <= most:
    return lines
  return [lines[i] for i in np.linspace(0, len(lines) - 1, most).round().astype(int)]
