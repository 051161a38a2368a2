"""Running the trials of a study: each once, whatever is killed, however many workers there are."""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tqdm

from moe_jax.errors import DamagedError, UserError
from moe_jax.results.records import DIVERGED, FAILED, FINISHED
from moe_jax.run import ancestry, claim, manifest, packed
from moe_jax.run.divergence import DivergedError
from moe_jax.run.progress import Listener
from moe_jax.run.setup import dataset_of
from moe_jax.run.single import train
from moe_jax.study import Study
from moe_jax.sweep import outcome, user_metrics
from moe_jax.sweep.checks import check_dataset
from moe_jax.sweep.evaluate_trials import Evaluated, evaluate_pack, evaluate_trial
from moe_jax.sweep.outcome import is_done, one_line, stop_if_full
from moe_jax.sweep.progress import Progress
from moe_jax.sweep.stopwatch import Stopwatch
from moe_jax.sweep.trials import Trial
from moe_jax.train.program import program_of


class Interrupted(Exception):  # noqa: N818
  """A signal ended a trial, which was saved.

  Attributes:
    signal: its number.
  """

  def __init__(self, signal: int):
    self.signal = signal
    super().__init__(f'signal {signal}')


class Counts(NamedTuple):
  """Numbers of trials of a sweep by state when it ends."""

  finished: int
  diverged: int
  failed: int
  elsewhere: int


def run(
  study: Study, trials: list[Trial], workdir: str, say: Callable[[str], None], pack: int = 1
) -> Counts:
  """Runs what is not done yet of the trials, one after the other or in packs.

  A trial that fails is recorded with its reason, and the next one runs; a later call tries it
  again. One that diverged would diverge again and is done. A trial that another worker holds is
  left to it.

  Args:
    study: of the trials.
    trials: in order.
    workdir: of the sweep, shared by all its workers.
    say: takes a line of text at a time.
    pack: largest number of trials of one program that are trained together.

  Raises:
    Interrupted: after saving the trial that was running.
    UserError: on a full disk, which no other trial would survive either; before the first trial,
      if the data lacks what the study evaluates.
  """
  _check_data(study, trials, workdir)
  failed: set[str] = set()
  with Progress(study, trials, workdir) as progress:
    while True:
      elsewhere = 0
      ran = False
      for unit in _units(trials, pack):
        if all(t.id in failed or is_done(study, t, workdir) for t in unit):
          continue
        with contextlib.ExitStack() as claims:
          mine = [t for t in unit if claims.enter_context(_claimed(t, workdir))]
          elsewhere += len(unit) - len(mine)
          # Another worker may have done one between the look and the claim.
          mine = [t for t in mine if t.id not in failed and not is_done(study, t, workdir)]
          if not mine:
            continue
          ran = True
          ends = _run_unit(study, mine, workdir, progress, say)
          failed |= {t.id for t, status in zip(mine, ends, strict=True) if status == FAILED}
      if not ran:
        break
  ends = [_status(trial, workdir) for trial in trials]
  return Counts(ends.count(FINISHED), ends.count(DIVERGED), len(failed), elsewhere)


def _check_data(study: Study, trials: list[Trial], workdir: str) -> None:
  """Checks before the first step data whose lack would fail after the last one.

  Raises:
    UserError: if what is there lacks what the study evaluates, or there is no data for any trial.
    DamagedError: if none of it can be read.
  """
  seen = set()
  first: UserError | DamagedError | None = None
  found = False
  for trial in trials:
    key = json.dumps(trial.config.data.to_dict(), sort_keys=True)
    if is_done(study, trial, workdir):
      found = True
    elif key not in seen:
      seen.add(key)
      try:
        dataset = dataset_of(trial.config)
      except (UserError, DamagedError) as error:
        first = first or error
        continue  # Its trials fail, each with this reason, if others run.
      found = True
      check_dataset(study, dataset)
  if first and not found:
    raise first


def _status(trial: Trial, workdir: str) -> str:
  try:
    found = outcome.read(workdir, trial.id)
  except DamagedError:
    return ''
  return found['status'] if found else ''


@contextlib.contextmanager
def _claimed(trial: Trial, workdir: str) -> Iterator[bool]:
  """Holds a trial, if no other worker does. The lock of a killed worker is free at once."""
  folder = pathlib.Path(workdir) / 'locks'
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder / trial.id, 'w') as lock:
    try:
      claim.hold(lock)
    except OSError:
      yield False
      return
    yield True


def _units(trials: list[Trial], pack: int) -> list[list[Trial]]:
  """Returns the trials in packs: consecutive ones of a program, at most `pack` together."""
  by_program: dict[tuple[str, str], list[Trial]] = {}
  for trial in trials:
    # A trial that starts from another run is trained by itself, and has the tokenizer of that run.
    key = program_of(trial.config), trial.config.train.init_from
    by_program.setdefault(key, []).append(trial)
  return [
    group[first : first + pack]
    for group in by_program.values()
    for first in range(0, len(group), pack)
  ]


def _run_unit(
  study: Study,
  unit: list[Trial],
  workdir: str,
  progress: Progress,
  say: Callable[[str], None],
) -> list[str]:
  """Runs trials, together if they can be, and returns the status of each."""
  # A run that has begun by itself continues by itself.
  new = [t for t in unit if not _has_checkpoints(t, workdir)]
  # Members of a pack can't evaluate during training, nor start from another run.
  alone = unit[0].config.train.eval_every or unit[0].config.train.init_from
  if len(new) > 1 and not alone:
    _train_pack(new, workdir, progress)
  trained = [t for t in unit if _is_trained(t, workdir)]
  evaluated: dict[str, Evaluated] = {}
  if len(trained) > 1:
    progress.begin(*trained)
    with progress.evaluating() as show:
      evaluated = evaluate_pack(study, trained, workdir, say, show=show)
  return [_run_one(study, t, workdir, progress, say, evaluated.get(t.id)) for t in unit]


def _is_trained(trial: Trial, workdir: str) -> bool:
  try:
    return manifest.read(trial.folder(workdir))['status'] == 'finished'
  except (UserError, DamagedError):
    return False


def _has_checkpoints(trial: Trial, workdir: str) -> bool:
  folder = trial.folder(workdir) / 'checkpoints'
  return folder.is_dir() and any(p.name.isdecimal() for p in folder.iterdir())


def _train_pack(unit: list[Trial], workdir: str, progress: Progress) -> None:
  """Trains trials together; each is then a run that has finished or diverged."""
  ids = ' '.join(trial.id for trial in unit)
  pack_dir = pathlib.Path(workdir) / 'packs' / hashlib.sha256(ids.encode()).hexdigest()[:12]
  note = _logger(unit[0], workdir)
  progress.begin(*unit)
  members = [packed.Member(trial.config, str(trial.folder(workdir))) for trial in unit]
  try:
    done = packed.train_packed(members, pack_dir, Listener(note, progress.at, progress.show_phase))
  except Exception as error:
    stop_if_full(error, workdir)
    # An error of one member shows when it runs by itself, which it does next.
    note(f'the pack failed, its trials run alone: {type(error).__name__}: {error}')
    tqdm.tqdm.write(f'a pack of {len(unit)} failed, its trials run alone: {one_line(error)}')
    return
  if done.interrupted_by is not None:
    raise Interrupted(done.interrupted_by)


def _logger(trial: Trial, workdir: str) -> Callable[[str], None]:
  log = pathlib.Path(workdir) / 'logs' / f'{trial.id}.txt'
  log.parent.mkdir(parents=True, exist_ok=True)

  def note(line: str) -> None:
    with open(log, 'a', encoding='utf-8') as file:
      file.write(f'{line}\n')

  return note


def _cause_of_divergence(trial: Trial, workdir: str) -> str:
  """Returns what was not finite when a run diverged, packed or not; '' if it did not."""
  folder = trial.folder(workdir)
  if not manifest.exists(folder):
    return ''
  metadata = manifest.read(folder)
  return metadata.get('cause', 'not finite') if metadata['status'] == 'diverged' else ''


def _run_one(
  study: Study,
  trial: Trial,
  workdir: str,
  progress: Progress,
  say: Callable[[str], None],
  evaluated: Evaluated | None,
) -> str:
  """Trains and evaluates a trial, writes its outcome and returns its status.

  Args:
    study: of the trial.
    trial: claimed.
    workdir: of the sweep.
    progress: that is shown.
    say: takes a line of text at a time.
    evaluated: if it was trained and evaluated in a pack.
  """
  name = f'{trial.id} {trial.arm}, seed {trial.seed}'
  metadata: dict[str, Any] = {'study': study.name, 'arm': trial.arm, 'seed': trial.seed}
  note = _logger(trial, workdir)
  progress.begin(trial)
  try:
    folder = str(trial.folder(workdir))
    status, reason = DIVERGED, _cause_of_divergence(trial, workdir)
    if not reason:
      watch = Stopwatch()
      listener = Listener(note, watch.counting(progress.at), progress.show_phase)
      done = train(trial.config, folder, listener, pinned=_pinned(trial, workdir))
      if not done.finished:
        raise Interrupted(done.interrupted_by or 0)
      seconds: dict[str, Any] = {'training': watch.seconds()}
      if evaluated is None:
        with progress.evaluating() as show:
          evaluated = evaluate_trial(study, trial, folder, show=show)
      metadata |= {
        'evaluations': evaluated.results,
        'evaluated_together': evaluated.together,
        'digests': outcome.digests(folder),
        'seconds': seconds | {'evaluation': evaluated.seconds},
      }
      status = FINISHED
  except DivergedError as error:
    status, reason = DIVERGED, error.cause
  except (Interrupted, KeyboardInterrupt):
    raise
  except Exception as error:
    stop_if_full(error, workdir)
    # No error may end the other trials; it is in the outcome and in the report.
    status, reason = FAILED, one_line(error)
    note(reason)
  outcome.write(workdir, trial.id, metadata | {'status': status, 'reason': reason})
  progress.end(trial)
  say(f'{status}: {name}{": " + reason if reason else ""}')
  if status == FINISHED:
    # The trial stays finished: the functions are called again for every report.
    _, errors = user_metrics.values_of(study, trial.finished(workdir, metadata['evaluations']))
    for text in errors.values():
      say(f'warning: {name}: {text}')
  return status


def _pinned(trial: Trial, workdir: str) -> dict[str, Any] | None:
  """Returns the source as read by another trial that starts from the same run; None without one."""
  given = trial.config.train.init_from
  for path in sorted(pathlib.Path(workdir).glob('trials/*')) if given else ():
    try:
      metadata = manifest.read(path)
    except (UserError, DamagedError):
      continue
    pin = ancestry.pin_of(metadata)
    if metadata['config'].get('train', {}).get('init_from') == given and pin and 'digest' in pin:
      return pin
  return None
