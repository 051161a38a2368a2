"""Dry runs of a sweep: its trials, the problems that would stop them, and the time they take."""

import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_jax.data import Dataset, Examined
from moe_jax.errors import DamagedError, UserError
from moe_jax.run import setup
from moe_jax.study import Study, labels_of
from moe_jax.sweep import checks, outcome, time_estimate
from moe_jax.sweep.probe import probe
from moe_jax.sweep.time_estimate import Estimate, Measured, Work
from moe_jax.sweep.trials import Trial, training_flops, vocab_size_of
from moe_jax.train import accounting, evaluation_batches


class Plan(NamedTuple):
  """A sweep before it runs.

  Attributes:
    study: to run.
    rows: of each trial: id, arm, label, seed, parameters, tokens, flops, and seconds, None if it
      is done.
    problems: errors with which a trial would fail here, the first of each kind.
    estimate: of the trials that are not done, one after the other.
    unprepared: whether the data of some of them is still to be prepared.
    notes: what is known of that data, a line for each.
  """

  study: Study
  rows: list[dict[str, Any]]
  problems: list[UserError]
  estimate: Estimate
  unprepared: bool
  notes: list[str]


def make_plan(study: Study, trials: Sequence[Trial], workdir: str | None, probes: bool) -> Plan:
  """Returns the plan of trials; writes nothing but, if it probes, prepared data.

  Args:
    study: of the trials.
    trials: in order.
    workdir: of the sweep, whose finished trials are done and say how long they took; may be None.
    probes: whether a few steps and batches of each program are run first.
  """
  found, notes = _looked_at(study, trials)
  batches = _num_batches(study, trials)
  work = {t.id: time_estimate.work_of(study, t, batches.get(t.id)) for t in trials}
  measured: dict[tuple[str, str], list[Measured]] = {}
  done = set()
  for trial in trials if workdir else ():
    assert workdir is not None
    if outcome.is_done(study, trial, workdir):
      done.add(trial.id)
      for key, one in time_estimate.measured_in(work[trial.id], _outcome(trial, workdir)).items():
        measured.setdefault(key, []).append(one)
  left = [trial for trial in trials if trial.id not in done]
  if probes and not found:
    measured |= probe(study, left)
    batches = _num_batches(study, trials)
    work = {t.id: time_estimate.work_of(study, t, batches.get(t.id)) for t in trials}
  rate = time_estimate.matmul_rate() / 3 if left else 1.0
  rows = [_row(study, trial, None if trial.id in done else work[trial.id], measured, rate)
          for trial in trials]  # fmt: skip
  estimate = time_estimate.estimate([work[t.id] for t in left], measured, rate)
  unprepared = any(t.id not in batches for t in left)
  return Plan(study, rows, found, estimate, unprepared, notes if unprepared else [])


def _outcome(trial: Trial, workdir: str) -> dict[str, Any]:
  return outcome.read(workdir, trial.id) or {}


def _row(
  study: Study,
  trial: Trial,
  work: Sequence[Work] | None,
  measured: time_estimate.Measurements,
  rate: float,
) -> dict[str, Any]:
  config = trial.config
  return {
    'trial': trial.id,
    'arm': trial.arm,
    'label': labels_of(study)[trial.arm],
    'seed': trial.seed,
    'parameters': accounting.parameter_counts(config, vocab_size_of(config)),
    'tokens': config.train.num_steps * config.data.batch_size * config.data.sequence_length,
    'flops': training_flops(config),
    'seconds': None if work is None else time_estimate.seconds_of(work, measured, rate),
  }


def problems(study: Study, trials: Sequence[Trial]) -> list[UserError]:
  """Returns the errors that a trial would meet on this machine: devices, directories and texts."""
  return _looked_at(study, trials)[0]


def _looked_at(study: Study, trials: Sequence[Trial]) -> tuple[list[UserError], list[str]]:
  """Returns `problems`, and what is known of texts that are not prepared."""
  found: dict[str, UserError] = {}
  texts: dict[str, Dataset | Examined | UserError | DamagedError] = {}
  every: tuple[Callable[[], None], ...]
  for trial in trials:
    every = (
      functools.partial(_check_mesh, trial),
      functools.partial(_check_data_dir, trial),
      functools.partial(_check_text, study, trial, texts),
    )
    for check in every:
      try:
        check()
      except UserError as error:
        found.setdefault(str(error), error)
      except DamagedError as error:
        found.setdefault(str(error), UserError(str(error)))
  notes = {f'{text.name} {text.note}' for text in texts.values() if isinstance(text, Examined)}
  return list(found.values()), sorted(notes)


def _check_mesh(trial: Trial) -> None:
  setup.mesh_of(trial.config)


def _check_data_dir(trial: Trial) -> None:
  """Checks that the directory of the data can be written, or made where it is not yet."""
  path = os.path.abspath(os.path.expanduser(trial.config.data.data_dir))
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  if not os.path.isdir(path) or not os.access(path, os.W_OK | os.X_OK):
    raise UserError(
      'data.data_dir', trial.config.data.data_dir, f'must be a writable directory; {path} is not'
    )


def _check_text(
  study: Study,
  trial: Trial,
  texts: dict[str, Dataset | Examined | UserError | DamagedError],
) -> None:
  """Checks that a text has what is evaluated; of one to be fetched, that there may be such a text.

  Args:
    study: of the trial.
    trial: to be run.
    texts: those read so far, which grow here; each is read once.

  Raises:
    UserError: if it is not there, can't be read, or lacks a split or domain.
    DamagedError: if what is prepared is damaged.
  """
  config = trial.config
  key = json.dumps([config.data.to_dict(), bool(config.train.init_from)], sort_keys=True)
  if key not in texts:
    try:
      texts[key] = setup.prepared_dataset_of(config) or setup.examined_text_of(config)
    except (UserError, DamagedError) as error:
      texts[key] = error
  text = texts[key]
  if isinstance(text, Exception):
    raise text
  if isinstance(text, Examined) and text.counts is None:
    return
  checks.check_dataset(study, text)
  setup.check_validation(config, text)


def _num_batches(study: Study, trials: Sequence[Trial]) -> dict[str, int]:
  """Returns the batches of an evaluation by trial, of those whose data is prepared."""
  found = {}
  known: dict[str, int | None] = {}
  for trial in trials:
    config = trial.config
    microbatch = config.data.batch_size // config.train.accumulation_steps
    length = config.data.sequence_length
    key = json.dumps([config.data.to_dict(), microbatch], sort_keys=True)
    if key not in known:
      try:
        dataset = setup.prepared_dataset_of(config)
      except (UserError, DamagedError):
        dataset = None  # `problems` reports the error.
      known[key] = (
        None
        if dataset is None
        else evaluation_batches.num_batches(dataset, study.split, length, microbatch)
      )
    count = known[key]
    if count is not None:
      found[trial.id] = count
  return found


def text(plan: Plan) -> str:
  """Returns a plan as lines for a terminal."""
  study = plan.study
  lines = [f'{study.name}: {study.question}']
  lines.append(
    f'{"trial":<14}{"total":>12}{"active":>12}{"tokens":>13}{"FLOPs":>10}{"about":>8}  arm, seed'
  )
  for row in plan.rows:
    about = 'done' if row['seconds'] is None else duration(row['seconds'])
    lines.append(
      f'{row["trial"]:<14}{row["parameters"]["total"]:>12,}{row["parameters"]["active"]:>12,}'
      f'{row["tokens"]:>13,}{row["flops"]:>10.1e}{about:>8}  {row["arm"]}, {row["seed"]}'
    )
  lines += [f'{"dropped":<14}{arm.name}: {arm.dropped}' for arm in study.arms if arm.dropped]
  lines += [f'{"not prepared":<14}{note}' for note in plan.notes]
  # The command ends with the first as its error.
  lines += [f'{"problem, too":<14}{problem}' for problem in plan.problems[1:]]
  done = sum(row['seconds'] is None for row in plan.rows)
  flops = sum(row['flops'] for row in plan.rows)
  num = len(plan.rows)
  lines.append(f'{num} trials, {done} of them done; {flops:.1e} FLOPs of training in all')
  return '\n'.join([*lines, *_time_lines(plan, num - done)])


def _time_lines(plan: Plan, left: int) -> list[str]:
  """Returns a sentence on the time of the trials that are left, and the basis of each part.

  Args:
    plan: of the trials.
    left: trials that are not done.
  """
  if not left:
    return []
  estimate = plan.estimate
  parts = [f'{duration(estimate.seconds[part])} {part}' for part in estimate.basis]
  missing = []
  if plan.unprepared:
    missing.append('preparing the data')
  if estimate.unknown:
    missing.append('evaluation, whose length is known once the data is prepared')
  without = f'; not included: {" and ".join(missing)} (--probe does both)' if missing else ''
  least = 'at least ' if missing else 'about '
  many = f'the {left} trials' if left > 1 else 'the trial'
  after = ', one after the other,' if left > 1 else ''
  lines = [
    f'On this machine {many} left will take {least}{duration(estimate.total)}{after} of which '
    f'{", ".join(parts)}{without}.'
  ]
  return [*lines, *(f'  {part}: {basis}' for part, basis in estimate.basis.items())]


def as_json(plan: Plan) -> str:
  """Returns a plan as one JSON object; seconds and FLOPs are numbers."""
  estimate = plan.estimate
  return json.dumps(
    {
      'study': plan.study.name,
      'question': plan.study.question,
      'trials': plan.rows,
      'dropped': {arm.name: arm.dropped for arm in plan.study.arms if arm.dropped},
      'problems': [str(problem) for problem in plan.problems],
      'seconds': {**estimate.seconds, 'total': estimate.total},
      'basis': estimate.basis,
      'not_counted': estimate.unknown,
      'data_to_prepare': plan.unprepared,
      'unprepared': plan.notes,
    }
  )


def duration(seconds: float) -> str:
  """Returns hours and minutes, or seconds below a minute and a half: 1h05m, 12m, 45s."""
  if seconds < 90:
    return f'{math.ceil(seconds)}s'
  minutes = round(seconds / 60)
  return f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m'
