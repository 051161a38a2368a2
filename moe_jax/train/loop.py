"""The loop over training steps: the same for one run and for several trained as one program.

The loop does steps and nothing else. All else in a run (metrics, checkpoints, evaluation, output)
is done by callbacks, called in their order.
"""

from collections.abc import Callable, Sequence
from typing import Any


class Callback:
  """Actions of a run besides its steps; none by default."""

  def on_start(self, step: int, state: Any) -> None:
    """Called before the first step of this call, after `step` steps of the run."""

  def on_step(self, step: int) -> None:
    """Called when a step was handed to the devices, which still work on it."""

  def on_metrics(self, step: int, metrics: Any, waited: float) -> None:
    """Called for each step, in order, once a later one was begun or its state is needed.

    Args:
      step: whose metrics these are.
      metrics: on the devices; reading them waits for the step to end.
      waited: seconds that the devices waited for its batch, at most.
    """

  def needs_state(self, step: int, *, ends: bool, stops: bool) -> bool:
    """Tells if `on_state` is to be called after this step.

    Args:
      step: that was begun last.
      ends: whether it is the last one of this call.
      stops: True if a signal is the reason.
    """
    del step, ends, stops
    return False

  def on_state(self, step: int, state: Any) -> None:
    """Called after the step has ended and its metrics were reported.

    The next step takes the memory of the state: nothing may hold it after this returns.
    """


def run_steps(
  train_step: Callable[[Any, Any, Any], tuple[Any, Any]],
  state: Any,
  next_batch: Callable[[Any], tuple[Any, float]],
  hyperparameters: Any,
  *,
  step: int,
  num_steps: int,
  callbacks: Sequence[Callback],
  should_stop: Callable[[int], bool],
) -> tuple[Any, int]:
  """Does the remaining steps of a run, or of a pack of runs.

  Metrics of a step are reported while the next one runs, so that the devices never wait for the
  host. Only where a callback needs the state, the step is waited for.

  Args:
    train_step: (state, batch, hyperparameters) -> (state, metrics); the state is donated.
    state: after `step` steps.
    next_batch: takes the metrics of a step in flight, or None, and returns a batch on the devices
      and the seconds that they waited for it.
    hyperparameters: of every step.
    step: steps done before.
    num_steps: of the whole run.
    callbacks: called in this order.
    should_stop: True if a signal requests to stop after this step.

  Returns:
    The state and the number of steps done, fewer than `num_steps` if it was stopped.
  """
  for callback in callbacks:
    callback.on_start(step, state)
  pending: tuple[int, Any, float] | None = None
  stops = False
  while step < num_steps and not stops:
    batch, waited = next_batch(pending and pending[1])
    state, metrics = train_step(state, batch, hyperparameters)
    step += 1
    for callback in callbacks:
      callback.on_step(step)
    if pending is not None:
      _report(callbacks, pending)
    pending = step, metrics, waited
    stops = should_stop(step)
    ends = stops or step == num_steps
    needing = [one for one in callbacks if one.needs_state(step, ends=ends, stops=stops)]
    if needing or ends:
      # Waits for the step: its time is training, not that of what follows.
      _report(callbacks, pending)
      pending = None
    for callback in needing:
      callback.on_state(step, state)
  return state, step


def _report(callbacks: Sequence[Callback], pending: tuple[int, Any, float]) -> None:
  for callback in callbacks:
    callback.on_metrics(*pending)
