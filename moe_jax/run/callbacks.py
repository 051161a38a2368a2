"""Callbacks of a run: saving, evaluating, and what is written and shown."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from jax.sharding import Mesh

from moe_jax.data import Dataset
from moe_jax.models.build import build_task
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.divergence import DivergedError, not_finite
from moe_jax.run.metrics_writer import MetricsWriter
from moe_jax.run.progress import ProgressBar
from moe_jax.run.timing import Throughput, Timer
from moe_jax.train import evaluate, metrics
from moe_jax.train.loop import Callback
from moe_jax.train.state import TrainState


class StepCounter(Callback):
  """Reports the number of each step to a listener."""

  def __init__(self, on_step: Callable[[int], None]):
    """Takes the listener."""
    self._tell = on_step

  def on_step(self, step: int) -> None:
    """Reports the step."""
    self._tell(step)


class MetricsReporter(Callback):
  """Writes and shows the metrics of steps."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    writer: MetricsWriter,
    *,
    bar: ProgressBar,
    timer: Timer,
  ):
    """Takes the config and the mesh of the run, and where metrics go."""
    self._train, self._num_ranks = config.train, mesh.shape['expert']
    self._writer, self._bar, self._timer = writer, bar, timer
    self._throughput = Throughput(timer)

  def on_metrics(self, step: int, metrics_of_step: Any, waited: float) -> None:
    """Waits for a step to end and reports it.

    Raises:
      DivergedError: if the loss is not finite. No checkpoint is made of such a state.
    """
    record = metrics.step_metrics(metrics_of_step, self._num_ranks)
    bad_metric = not_finite(metrics_of_step, record)
    if bad_metric:
      raise DivergedError(step, *bad_metric)
    self._bar.update(step, record, self._throughput.add(record['tokens']))
    if step % self._train.log_every == 0 or step == self._train.num_steps:
      record |= {'tokens_per_second': self._throughput.line(), 'data_wait': waited}
      record |= self._timer.take('preparing', 'compiling', 'tracing', 'saving')
      self._writer.write(step, 'train', record)


class Checkpointer(Callback):
  """Saves the state every `train.checkpoint_every` steps, and at the end."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    checkpoints: Checkpoints,
    position: Callable[[], dict[str, Any]],
    *,
    timer: Timer,
    say: Callable[[str], None],
  ):
    """Takes where checkpoints go, and what gives the position in the data."""
    self._config, self._checkpoints, self._position = config, checkpoints, position
    self._timer, self._say = timer, say

  def needs_state(self, step: int, *, ends: bool, stops: bool) -> bool:
    """Tells if a checkpoint is due."""
    return ends or step % self._config.train.checkpoint_every == 0

  def on_state(self, step: int, state: TrainState) -> None:
    """Begins a checkpoint; it is written while training goes on."""
    self._say(f'step {step}: saving')
    with self._timer.phase('saving'):
      self._checkpoints.save(step, state, self._position(), self._config.to_dict())


def evaluates_at(config: ml_collections.ConfigDict, step: int) -> bool:
  """Tells if the validation split is evaluated after this step."""
  return bool(config.train.eval_every and step and step % config.train.eval_every == 0)


class Evaluator(Callback):
  """Evaluates on the validation split, with one compiled step for the whole run."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    dataset: Dataset,
    *,
    writer: MetricsWriter,
    timer: Timer,
    say: Callable[[str], None],
  ):
    """Takes the data to evaluate on, and where the result goes."""
    self._config, self._mesh, self._dataset = config, mesh, dataset
    self._writer, self._timer, self._say = writer, timer, say
    self._step: Any = None
    self._task: Any = None

  def on_start(self, step: int, state: TrainState) -> None:
    """Evaluates again where the interruption may have come between checkpoint and evaluation."""
    if evaluates_at(self._config, step):
      self.on_state(step, state)

  def needs_state(self, step: int, *, ends: bool, stops: bool) -> bool:
    """Tells if an evaluation is due; one that a signal cuts off is made on resume."""
    return evaluates_at(self._config, step) and not stops

  def on_state(self, step: int, state: TrainState) -> None:
    """Evaluates, writes and prints the result."""
    self._say(f'step {step}: evaluating')
    with self._timer.phase('evaluating'):
      result = self._evaluate(state)
    seconds = self._timer.take('evaluating')
    self._writer.write(step, 'valid', result | seconds)
    took = seconds.get('seconds_evaluating', 0)
    self._say(f'step {step}: validation loss {result["loss"]:.4f}, evaluated in {took:.1f} s')

  def _evaluate(self, state: TrainState) -> dict[str, Any]:
    config = self._config
    if self._step is None:
      vocab_size = self._dataset.tokenizer.vocab_size
      self._task = build_task(config, self._mesh, vocab_size, 'eval')
      self._step = evaluate.make_eval_step(self._task)
    result = evaluate.evaluate(
      self._step,
      self._task,
      state.params,
      state.router_state,
      self._dataset,
      split='valid',
      sequence_length=config.data.sequence_length,
      batch_size=config.data.batch_size // config.train.accumulation_steps,
      max_batches=config.train.eval_batches,
    )
    del result['split']
    return result


def saying_when_it_compiles(
  train_step: Any, compiled_step: Any, timer: Timer, say: Callable[[str], None]
) -> Callable[..., Any]:
  """Returns the step; if nothing is compiled yet, one that announces and times compilation.

  Args:
    train_step: does a step: `compiled_step`, or a function that calls it.
    compiled_step: the jitted function.
    timer: of the run.
    say: takes a line at a time.
  """

  def step(*arguments: Any) -> Any:
    with _compiling(compiled_step, timer, say):
      return train_step(*arguments)

  return step


@contextlib.contextmanager
def _compiling(compiled_step: Any, timer: Timer, say: Callable[[str], None]) -> Iterator[None]:
  """Devices work on the step after the call has returned, so its own time is not counted."""
  if compiled_step._cache_size():
    yield
    return
  say('compiling the training step')
  before = timer.seconds()['compiling']
  with timer.phase('compiling'):
    yield
  say(f'compiled in {timer.seconds()["compiling"] - before:.1f} s; training')
