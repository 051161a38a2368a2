"""Seconds of a trial: until its first step or batch, from there on, and those that are left."""

import time
from collections.abc import Callable


class Stopwatch:
  """Separates one-time costs, compiling above all, from the cost of every step.

  The clock stops at each step or batch after the first; what comes before the first is set-up.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._start = clock()
    self._first: float | None = None
    self._count = 0

  def counting(self, then: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    """Returns the function to call at each step or batch; it calls `then` after counting."""

    def count(*values) -> None:
      if self._first is None:
        self._first = self._clock()
      self._count += 1
      then(*values)

    return count

  def seconds(self, together: int = 1) -> dict[str, float]:
    """Returns `setup`, `running`, the `steps` that took the latter, and trials run `together`.

    Args:
      together: trials that ran in every step.
    """
    now = self._clock()
    first = now if self._first is None else self._first
    return {
      'setup': first - self._start,
      'running': now - first,
      'steps': self._count,
      'together': together,
    }


class Pace:
  """Seconds of training steps by their cost, from which follows the time that is left.

  The clock runs from the second step of a trial on: the first one compiles, and nothing waits for
  it before the second is begun. It stands still while a run does something else than training.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._seconds, self._cost = 0.0, 0.0
    self._steps = 0
    self._since: float | None = None

  def begin(self) -> None:
    """Begins a trial, whose first steps are not timed."""
    self.pause()
    self._steps = 0

  def pause(self) -> None:
    """Stops the clock."""
    if self._since is not None:
      self._seconds += self._clock() - self._since
      self._since = None

  def resume(self) -> None:
    """Lets the clock continue, if any step of the trial was timed."""
    if self._since is None and self._steps > 1:
      self._since = self._clock()

  def step(self, cost: float) -> None:
    """Counts a step, which costs as much of what is left."""
    self._steps += 1
    if self._steps > 2:
      self.pause()
      self._cost += cost
    self.resume()

  def left(self, cost: float) -> float | None:
    """Returns the seconds that a cost will take; None until a step was timed."""
    return self._seconds / self._cost * cost if self._cost else None
