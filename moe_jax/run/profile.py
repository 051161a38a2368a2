"""Traces a few steps of a run: --profile of `moe_jax.train`."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from moe_jax import profiling
from moe_jax.run.timing import Timer

FLAG = '--profile'
# Steps that are left out first: the one that compiles, and one more. Then those that are traced.
_SKIPPED, _TRACED = 2, 3


class TracedSteps:
  """Does the steps of a run, and traces a few of the first ones."""

  def __init__(
    self,
    train_step: Any,
    directory: str,
    num_steps: int,
    say: Callable[[str], None],
    timer: Timer,
  ):
    """Takes the compiled step, and the number of steps to come."""
    self._timer = timer
    self._train_step, self._directory, self._say = train_step, directory, say
    self._first = min(_SKIPPED, num_steps - 1)
    self._last = min(self._first + _TRACED, num_steps) - 1
    self._done = 0
    self._program: Any = None
    self._trace = contextlib.ExitStack()

  def __call__(self, state: Any, batch: Any, hyperparameters: Any) -> Any:
    """Returns the result of the step."""
    number, self._done = self._done, self._done + 1
    if not self._first <= number <= self._last:
      return self._train_step(state, batch, hyperparameters)
    if number == self._first:
      jax.block_until_ready((state, batch))
      with self._timer.phase('tracing'):
        # Compiled apart: the names of operations are those of this very program.
        self._program = self._train_step.lower(state, batch, hyperparameters).compile()
        self._trace.enter_context(profiling.traced(FLAG, self._directory))
    result = self._program(state, batch, hyperparameters)
    if number == self._last:
      jax.block_until_ready(result)
      with self._timer.phase('tracing'):
        self._trace.close()
        traced = self._last - self._first + 1
        table = profiling.write_table(self._directory, self._program.as_text(), traced)
      self._say(f'{traced} steps traced in {self._directory}\n{table}')
    return result

  def close(self) -> None:
    """Ends a trace that was cut off by the end of the run."""
    self._trace.close()
    if self._done <= self._last or self._last < 0:
      self._say('no table of a trace: the run ended before the steps that were to be traced')
