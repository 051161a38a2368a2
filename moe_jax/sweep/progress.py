"""The progress of a sweep: one bar over all trials."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import tqdm

from moe_jax.errors import DamagedError, UserError
from moe_jax.run import manifest, timing
from moe_jax.run.progress import bar_file
from moe_jax.study import Study
from moe_jax.sweep.outcome import is_done
from moe_jax.sweep.stopwatch import Pace
from moe_jax.sweep.trials import Trial, training_flops

# Seconds between two states of an evaluation, on a terminal and elsewhere.
_PAUSES = 0.5, 30.0


class Progress:
  """One bar over all trials, in proportion to the FLOPs of training.

  The time left is that of training and, once a trial was evaluated, of as long an evaluation for
  each trial without one.
  """

  def __init__(
    self,
    study: Study,
    trials: list[Trial],
    workdir: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._study, self._workdir = study, workdir
    self._cost = {t.id: training_flops(t.config) / t.config.train.num_steps for t in trials}
    self._done = {t.id: self._steps_done(t) for t in trials}
    total = sum(self._cost[t.id] * t.config.train.num_steps for t in trials)
    self._bar = tqdm.tqdm(
      total=total,
      initial=sum(self._cost[id_] * steps for id_, steps in self._done.items()),
      # The library's own estimate would count compiling as if every step compiled.
      bar_format='{percentage:3.0f}%|{bar:20}| {elapsed}{postfix}',
      file=bar_file(),
      mininterval=_pause(),
      dynamic_ncols=True,
    )
    self._trials: tuple[Trial, ...] = ()
    self._phase = ''
    self._clock = clock
    self._pace = Pace(clock)
    self._not_evaluated = {t.id for t in trials if not is_done(study, t, workdir)}
    self._evaluated, self._seconds = 0, 0.0
    self._shown_at = clock()

  def _steps_done(self, trial: Trial) -> int:
    """Returns the steps of the last checkpoint of a trial that the manifest knows of."""
    if is_done(self._study, trial, self._workdir):
      return trial.config.train.num_steps
    try:
      return int(manifest.read(trial.folder(self._workdir))['step'])
    except (UserError, DamagedError):
      return 0

  def begin(self, *trials: Trial) -> None:
    """Shows the trials that run now."""
    self._trials = trials
    self._pace.begin()
    self.show_phase('')

  def show_phase(self, phase: str) -> None:
    """Shows what the trials that run now are doing."""
    self._phase = phase
    if phase == timing.TRAINING:
      self._pace.resume()
    else:
      self._pace.pause()
    self._bar.set_postfix_str(self._text(), refresh=True)

  @contextlib.contextmanager
  def evaluating(self) -> Iterator[Callable[[str], None]]:
    """Times the evaluation of the trials that run; yields what takes how far it is."""
    self.show_phase('evaluating')
    start = self._clock()

    def show(text: str) -> None:
      self._phase = f'evaluating: {text}'
      if self._clock() - self._shown_at >= _pause():
        self._shown_at = self._clock()
        self._bar.set_postfix_str(self._text(), refresh=True)

    yield show
    self._seconds += self._clock() - start
    self._evaluated += len(self._trials)

  def _text(self) -> str:
    """Returns the running trials, and the time left once a step was timed."""
    first, *more = self._trials
    others = f' and {len(more)} more' if more else ''
    doing = f': {self._phase}' if self._phase else ''
    return f'{self._left()} {first.arm}, seed {first.seed}{others}{doing}'

  def _left(self) -> str:
    seconds = self._pace.left(self._bar.total - self._bar.n)
    if seconds is None:
      return ''
    of = ''
    if self._evaluated:
      seconds += self._seconds / self._evaluated * len(self._not_evaluated)
    elif self._not_evaluated:
      of = ' of training'
    return f' about {tqdm.tqdm.format_interval(seconds)}{of} left,'

  def at(self, step: int) -> None:
    """Shows a step of the trials that run."""
    self._pace.step(sum(self._cost[trial.id] for trial in self._trials))
    self._bar.set_postfix_str(self._text(), refresh=False)
    self._count(step)

  def _count(self, step: int) -> None:
    """Counts the trials that run as done up to a step."""
    for trial in self._trials:
      new = max(0, step - self._done[trial.id])
      self._done[trial.id] += new
      self._bar.update(self._cost[trial.id] * new)

  def end(self, trial: Trial) -> None:
    """Counts what a trial that ended early did not do as done."""
    self._trials = (trial,)
    self._not_evaluated.discard(trial.id)
    self._pace.pause()
    self._count(trial.config.train.num_steps)

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *details) -> None:
    self._bar.close()


def _pause() -> float:
  """Returns the seconds between two refreshes of the bar."""
  return _PAUSES[0] if sys.stderr.isatty() else _PAUSES[1]
