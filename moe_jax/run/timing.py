"""Seconds of a run by phase, and its tokens per second of only training."""

import contextlib
import time
from collections.abc import Callable, Iterator

TRAINING = 'training'
# At every moment a run is in one of these. `compiling` is only that of the training step; other
# compilation counts where it is needed first.
PHASES = ('preparing', 'compiling', 'tracing', 'evaluating', 'saving', TRAINING)

_LATEST_SHARE = 0.1


class Timer:
  """The seconds in each phase since the timer was made, when `preparing` begins.

  Devices work while the host continues, so a phase other than training must not begin before the
  steps that were started have ended: their time would be counted as that of the phase.

  Attributes:
    on_phase: called with each phase when it begins.
  """

  def __init__(
    self,
    on_phase: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Takes a clock in seconds."""
    self.on_phase, self._clock = on_phase, clock
    self._phase, self._since = PHASES[0], clock()
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._taken = dict.fromkeys(PHASES, 0.0)

  def enter(self, phase: str) -> None:
    """Ends the present phase and begins another."""
    self.seconds()
    self._phase = phase
    self.on_phase(phase)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Is in a phase within the block, and back in the one before after it."""
    before = self._phase
    self.enter(name)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self) -> dict[str, float]:
    """Returns the seconds of every phase until now."""
    now = self._clock()
    self._seconds[self._phase] += now - self._since
    self._since = now
    return dict(self._seconds)

  def take(self, *phases: str) -> dict[str, float]:
    """Returns {'seconds_PHASE': ...} of those phases that took any since they were last taken."""
    seconds = self.seconds()
    new = {phase: seconds[phase] - self._taken[phase] for phase in phases}
    self._taken |= {phase: seconds[phase] for phase in phases}
    return {f'seconds_{phase}': value for phase, value in new.items() if value}


class Throughput:
  """Tokens per second of training, between two lines of the metrics and of late."""

  def __init__(self, timer: Timer):
    """Counts from now on."""
    self._timer = timer
    self._tokens = 0
    self._at_line = self._at_step = timer.seconds()[TRAINING]
    self._late = 0.0

  def add(self, tokens: int) -> float:
    """Counts the tokens of a step that has ended; returns the rate of late, for the eye."""
    now = self._timer.seconds()[TRAINING]
    rate = tokens / max(now - self._at_step, 1e-9)
    self._late = (1 - _LATEST_SHARE) * self._late + _LATEST_SHARE * rate if self._late else rate
    self._tokens, self._at_step = self._tokens + tokens, now
    return self._late

  def line(self) -> float:
    """Returns tokens over seconds since the line before, up to the last step that was added."""
    rate = self._tokens / max(self._at_step - self._at_line, 1e-9)
    self._tokens, self._at_line = 0, self._at_step
    return rate
