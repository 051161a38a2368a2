"""Seconds of a trial: until its first step or batch, and from there on."""

import time
from collections.abc import Callable


class Stopwatch:
  """Tells apart what comes once, compiling above all, and what every step costs.

  The clock stops at each step or batch after the first; what comes before the first is set-up.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._start = clock()
    self._first: float | None = None
    self._count = 0

  def counting(self, then: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    """Returns what is to be called at each step or batch; it calls `then` after counting."""

    def count(*values) -> None:
      if self._first is None:
        self._first = self._clock()
      self._count += 1
      then(*values)

    return count

  def seconds(self, together: int = 1) -> dict[str, float]:
    """Returns `setup`, `running`, the `steps` that took the latter, and trials run `together`.

    Args:
      together: trials that every step was one of.
    """
    now = self._clock()
    first = now if self._first is None else self._first
    return {
      'setup': first - self._start,
      'running': now - first,
      'steps': self._count,
      'together': together,
    }
