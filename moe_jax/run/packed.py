"""Several runs trained as one program: the same step, mapped over a dimension of trials.

For runs that differ only in `hyperparameter_fields`. Each has its own initial values, data order
and random numbers, and the same results as by itself, except for rounding.
"""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from moe_jax.data import Dataset, train_iterator
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.parallel.sharding import sharding
from moe_jax.run import claim, device_errors, manifest, setup
from moe_jax.run.callbacks import Checkpointer, StepCounter, saying_when_it_compiles
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.divergence import DivergedError, not_finite
from moe_jax.run.metrics_writer import MetricsWriter
from moe_jax.run.progress import Listener
from moe_jax.run.signals import Signals
from moe_jax.run.timing import TRAINING, Throughput, Timer
from moe_jax.train import metrics
from moe_jax.train.causal_claim import check_causal_claim
from moe_jax.train.hyperparameters import hyperparameters_of
from moe_jax.train.loop import Callback, run_steps
from moe_jax.train.program import optimizer_of, program_of, step_of
from moe_jax.train.state import (
  TrainState,
  make_init,
  state_shardings,
  with_shardings,
  with_token_counts,
)
from moe_jax.train.step import StepMetrics, packed_shardings


class Member(NamedTuple):
  """One run of a pack: its config, validated, and its directory, new or of the same run."""

  config: ml_collections.ConfigDict
  workdir: str


class PackOutcome(NamedTuple):
  """Outcome of a pack.

  Attributes:
    diverged: for each member, the text of its DivergedError; '' if it did not.
    interrupted_by: the signal that ended it, if one did.
  """

  diverged: list[str]
  interrupted_by: int | None


def train_packed(
  members: Sequence[Member],
  pack_dir: str | os.PathLike,
  listener: Listener,
  *,
  clock: Callable[[], float] = time.perf_counter,
) -> PackOutcome:
  """Trains the members together and leaves each as a finished run of its own.

  Until the end there are only checkpoints of the pack, in `pack_dir`, which is removed then. A
  member that diverges is marked so and costs the others nothing.

  Args:
    members: that differ only in arguments of the program.
    pack_dir: new, or of the same pack.
    listener: gets what would be shown on the terminal.
    clock: that times the pack, in seconds.

  Raises:
    UserError: if the members are not of one program, evaluate during training, or are run by
      several processes; or for what `train` refuses.
  """
  _check(members)
  first = members[0].config
  mesh = setup.mesh_of(first)
  timer = Timer(listener.on_phase, clock)
  with contextlib.ExitStack() as stack:
    stack.enter_context(device_errors.explained(first, len(members)))
    for member in members:
      stack.enter_context(claim.claimed(member.workdir))
    dataset = setup.dataset_of(first)
    setup.check_splits(first, dataset)
    listener.say(check_causal_claim(first, dataset.tokenizer.vocab_size))
    stack.enter_context(jax.set_mesh(mesh))
    listener.say(f'preparing model and state of {len(members)} runs')
    pack = _Pack(members, pathlib.Path(pack_dir), mesh, dataset)
    stack.callback(pack.close)
    outcome = pack.run(listener, timer)
    if outcome.interrupted_by is None:
      pack.finish()
  return outcome


def _check(members: Sequence[Member]) -> None:
  programs = {program_of(member.config) for member in members}
  if len(programs) != 1:
    raise UserError(
      '--pack', len(members), 'the runs of a pack must differ in hyperparameters alone'
    )
  if members[0].config.train.eval_every:
    value = members[0].config.train.eval_every
    raise UserError('train.eval_every', value, 'must be 0 in packed runs')
  if members[0].config.train.init_from:
    value = members[0].config.train.init_from
    raise UserError('train.init_from', value, 'must be empty in packed runs')
  if jax.process_count() > 1:
    raise UserError('--pack', len(members), 'is not supported with several processes')


class _Pack:
  """The members with their joint state."""

  def __init__(
    self, members: Sequence[Member], pack_dir: pathlib.Path, mesh: Mesh, dataset: Dataset
  ):
    self._members, self._pack_dir = members, pack_dir
    self._dataset, self._mesh = dataset, mesh
    self._config = members[0].config
    config, vocab_size = self._config, dataset.tokenizer.vocab_size
    microbatch = config.data.batch_size // config.train.accumulation_steps
    self._task = build_task(config, mesh, vocab_size, 'train', microbatch)
    self._optimizer = optimizer_of(config, self._task)
    self._shardings = packed_shardings(state_shardings(self._task, self._optimizer))
    self._step_function = step_of(program_of(config), mesh, vocab_size, packed=True)
    self._hyperparameters = jax.tree.map(
      lambda *x: jnp.stack(x), *(hyperparameters_of(m.config) for m in members)
    )
    self._iterators = [
      train_iterator(
        dataset.windows('train', config.data.sequence_length),
        batch_size=config.data.batch_size,
        seed=member.config.train.seed,
        process_index=0,
        process_count=1,
      )
      for member in members
    ]
    self._diverged = [''] * len(members)
    self._checkpoints = Checkpoints(str(pack_dir), config.train.keep_checkpoints)
    self._state, self._step = self._start()
    self._manifests = [
      setup.first_manifest(member.config, mesh, dataset)
      | {
        'step': self._step,
        'packed_with': len(members) - 1,
        'logging': [manifest.Pace(0, config.train.log_every, 0)],
      }
      for member in members
    ]

  def _start(self) -> tuple[TrainState, int]:
    """Returns the joint state and the steps done: restored, or new."""
    abstract = with_shardings(jax.eval_shape(self._new_state), self._shardings)
    restored = self._checkpoints.restore(abstract) if self._checkpoints.steps() else None
    self._checkpoints.set_damaged_aside()
    if restored is None:
      return self._new_state(), 0
    step, state, positions = restored
    for iterator, position in zip(self._iterators, positions['members'], strict=True):
      iterator.set_state(position)
    self._diverged = positions['diverged']
    return state, step

  def _new_state(self) -> TrainState:
    states = []
    init = make_init(self._task, self._optimizer)
    for member in self._members:
      state = init(jnp.asarray(member.config.train.seed, jnp.int32))
      counts = lambda: self._dataset.token_counts('train')  # noqa: E731
      states.append(with_token_counts(state, self._task, counts))
    stack = jax.jit(
      lambda *s: jax.tree.map(lambda *x: jnp.stack(x), *s), out_shardings=self._shardings
    )
    return stack(*states)

  def run(self, listener: Listener, timer: Timer) -> PackOutcome:
    """Does the remaining steps."""
    config = self._config
    with contextlib.ExitStack() as stack:
      writers = []
      for member, metadata in zip(self._members, self._manifests, strict=True):
        setup.keep_tokenizer(member.workdir, self._dataset.tokenizer)
        metadata['pack'] = len(self._members)
        manifest.write(member.workdir, metadata)
        writer = MetricsWriter(member.workdir, self._step, say=listener.say)
        writers.append(stack.enter_context(contextlib.closing(writer)))
      signals = stack.enter_context(Signals())
      timer.enter(TRAINING)
      step_function = self._step_function
      self._state, self._step = run_steps(
        saying_when_it_compiles(step_function, step_function, timer, listener.say),
        self._state,
        lambda running: (self._next_batch(), 0.0),
        self._hyperparameters,
        step=self._step,
        num_steps=config.train.num_steps,
        callbacks=[
          StepCounter(listener.on_step),
          _PackReporter(self, writers, timer),
          Checkpointer(config, self._checkpoints, self._positions, timer=timer, say=listener.say),
        ],
        should_stop=lambda step: signals.should_stop(step, config.train.log_every),
      )
      self._checkpoints.wait()
    stopped = self._step < config.train.num_steps
    for member, metadata, why in zip(self._members, self._manifests, self._diverged, strict=True):
      if stopped and not why:
        manifest.write(member.workdir, metadata | {'step': self._step, 'status': 'interrupted'})
    return PackOutcome(self._diverged, signals.received if stopped else None)

  def _next_batch(self) -> dict[str, jax.Array]:
    rows = [next(iterator) for iterator in self._iterators]
    by_trial = sharding(self._mesh, 'trials', 'batch')
    return {
      name: jax.device_put(np.stack([row[name] for row in rows]), by_trial)
      for name in self._task.batch_fields
    }

  def _positions(self) -> dict[str, Any]:
    """Returns the part of a checkpoint besides the state."""
    return {
      'members': [iterator.get_state() for iterator in self._iterators],
      'diverged': self._diverged,
    }

  def report(
    self, writers: list[MetricsWriter], throughputs: list[Throughput], step: int, joint: StepMetrics
  ) -> None:
    """Writes a step's metrics of every member that has not diverged.

    Its tokens per second are its own tokens over the seconds in which the pack trained.
    """
    train = self._config.train
    joint = jax.device_get(joint)
    for i, member in enumerate(self._members):
      if self._diverged[i]:
        continue
      member_metrics = jax.tree.map(lambda x, i=i: x[i], joint)
      record = metrics.step_metrics(member_metrics, self._mesh.shape['expert'])
      bad_metric = not_finite(member_metrics, record)
      if bad_metric:
        error = DivergedError(step, *bad_metric)
        self._diverged[i] = str(error)
        manifest.write(member.workdir, self._manifests[i] | error.metadata)
        continue
      throughputs[i].add(record['tokens'])
      if step % train.log_every == 0 or step == train.num_steps:
        record['tokens_per_second'] = throughputs[i].line()
        writers[i].write(step, 'train', record)

  def finish(self) -> None:
    """Gives each member its last checkpoint and its manifest, then removes the pack's own."""
    shardings = state_shardings(self._task, self._optimizer)
    for i, member in enumerate(self._members):
      if self._diverged[i]:
        continue
      state = jax.tree.map(lambda x, i=i: x[i], jax.device_get(self._state))
      checkpoints = Checkpoints(member.workdir, member.config.train.keep_checkpoints)
      with contextlib.closing(checkpoints):
        position = self._iterators[i].get_state()
        checkpoints.save(
          self._step, jax.device_put(state, shardings), position, member.config.to_dict()
        )
        checkpoints.wait()
      manifest.write(
        member.workdir,
        self._manifests[i] | {'step': self._step, 'status': 'finished', 'compilations': 1},
      )
    self.close()
    shutil.rmtree(self._pack_dir)

  def close(self) -> None:
    """Ends what writes checkpoints; may be called twice."""
    self._checkpoints.close()


class _PackReporter(Callback):
  """Writes the metrics of the members, each to its own run."""

  def __init__(self, pack: _Pack, writers: list[MetricsWriter], timer: Timer):
    self._pack, self._writers = pack, writers
    self._throughputs = [Throughput(timer) for _ in writers]

  def on_metrics(self, step: int, metrics_of_step: Any, waited: float) -> None:
    """Waits for a step of the pack to end and reports it."""
    del waited
    self._pack.report(self._writers, self._throughputs, step, metrics_of_step)
