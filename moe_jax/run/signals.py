"""SIGTERM and SIGINT: the step in progress ends, is saved, and every process stops after it."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Signals:
  """Remembers SIGTERM and SIGINT, so that the step in progress ends and is saved."""

  def __init__(self):
    self.received: int | None = None
    self._old: dict[int, Any] = {}

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._old[number] = signal.signal(number, self._remember)
    return self

  def __exit__(self, *exception):
    for number in self._old:
      self._put_back(number)

  def _put_back(self, number: int) -> None:
    # None stands for a handler that was not set from Python, as JAX's own for preemption.
    old = self._old[number]
    signal.signal(number, signal.SIG_DFL if old is None else old)

  def _remember(self, number: int, frame: FrameType | None) -> None:
    if self.received is not None:
      # The second signal ends the process at once.
      self._put_back(number)
      signal.raise_signal(number)
    self.received = number

  def should_stop(self, step: int, ask_every: int) -> bool:
    """True if the run must stop after this step; the same answer in every process.

    Several processes agree only every `ask_every` steps, because agreeing waits for the devices.
    """
    if jax.process_count() > 1:
      if step % ask_every:
        return False
      asked = np.asarray(self.received or 0, np.int32)
      agreed = int(multihost_utils.process_allgather(asked).max())
      if not agreed:
        # A signal that came meanwhile waits for the next time.
        return False
      # A process that did not receive it ends with the same exit code.
      self.received = agreed
    return self.received is not None
