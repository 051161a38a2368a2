"""Outcome of a trial, kept next to its run: how it ended, and its evaluations, under a digest."""

import hashlib
import json
import os
import pathlib
from typing import Any

from moe_jax.errors import DamagedError, UserError, is_full
from moe_jax.files import write_atomically
from moe_jax.results.records import DIVERGED, FINISHED
from moe_jax.study import Study
from moe_jax.sweep.trials import Trial


def path_of(workdir: str | os.PathLike, trial_id: str) -> pathlib.Path:
  """Returns where the outcome of a trial is kept."""
  return pathlib.Path(workdir) / 'outcomes' / f'{trial_id}.json'


def write(workdir: str | os.PathLike, trial_id: str, outcome: dict[str, Any]) -> None:
  """Writes an outcome whole or not at all, with its digest."""
  path = path_of(workdir, trial_id)
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(outcome | {'digest': _digest(outcome)}, indent=1, sort_keys=True)
  write_atomically(path, text)


def read(workdir: str | os.PathLike, trial_id: str) -> dict[str, Any] | None:
  """Returns the outcome of a trial, None if there is none yet.

  Raises:
    DamagedError: if the file is not what was written.
  """
  path = path_of(workdir, trial_id)
  try:
    outcome = json.loads(path.read_text(encoding='utf-8'))
    digest = outcome.pop('digest')
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
    raise DamagedError(f'{path} is damaged') from error
  if digest != _digest(outcome):
    raise DamagedError(f'{path} is not what was written: its digest differs')
  if 'evaluations' in outcome and 'digests' not in outcome:
    raise DamagedError(f'{path} is of an earlier version, without digests of the files of the run')
  return outcome


def digests(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the SHA-256 of the files that the report reads in the directory of a run, by name."""
  paths = (pathlib.Path(folder) / name for name in ('metrics.jsonl', 'manifest.json'))
  return {path.name: file_digest(path) for path in paths if path.exists()}


def file_digest(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a file."""
  return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def _digest(outcome: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(outcome, sort_keys=True).encode()).hexdigest()


def is_done(study: Study, trial: Trial, workdir: str) -> bool:
  """True if nothing is left to do; a damaged outcome is made again from the run.

  So is one whose evaluations are not those that the study requests now.
  """
  try:
    found = read(workdir, trial.id)
  except DamagedError:
    return False
  if found is None or found['status'] != FINISHED:
    return found is not None and found['status'] == DIVERGED
  made = {name: result['split'] for name, result in found['evaluations'].items()}
  return made.keys() >= set(study.evaluations) and set(made.values()) == {study.split}


def stop_if_full(error: Exception, workdir: str) -> None:
  """Ends the sweep on an error of a full disk: every other trial would fail, too."""
  if is_full(error):
    raise UserError(
      '--workdir', workdir, f'{one_line(error)}; the same command goes on from here'
    ) from error


def one_line(error: Exception) -> str:
  """Returns type and text of an error without line ends."""
  return f'{type(error).__name__}: {" ".join(str(error).split())}'
