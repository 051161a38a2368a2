"""A training run from start, or from where it stopped, to its end."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import profiling, unread
from moe_jax.data import Dataset, train_iterator
from moe_jax.errors import UserError, is_refusal
from moe_jax.models.build import build_task
from moe_jax.models.task import Task
from moe_jax.parallel.distributed import all_or_none
from moe_jax.run import ancestry, claim, device_errors, manifest, same_run, setup
from moe_jax.run.announce import announce, named_mesh, warn_of_lost_lines
from moe_jax.run.callbacks import (
  Checkpointer,
  Evaluator,
  MetricsReporter,
  StepCounter,
  evaluates_at,
  saying_when_it_compiles,
)
from moe_jax.run.checkpoint import Checkpoints, saved_steps
from moe_jax.run.divergence import DivergedError
from moe_jax.run.metrics_writer import MetricsWriter
from moe_jax.run.profile import FLAG as TRACE_FLAG
from moe_jax.run.profile import TracedSteps
from moe_jax.run.progress import Listener, ProgressBar, print_line
from moe_jax.run.signals import Signals
from moe_jax.run.timing import TRAINING, Timer
from moe_jax.train.causal_claim import check_causal_claim
from moe_jax.train.hyperparameters import hyperparameters_of
from moe_jax.train.loop import run_steps
from moe_jax.train.program import optimizer_of, program_of, step_of
from moe_jax.train.state import TrainState, abstract_state, init_state, with_token_counts
from moe_jax.train.step import Batch, put_batch


class Outcome(NamedTuple):
  """Outcome of a call of `train`.

  Attributes:
    step: optimizer steps done.
    finished: whether these are all.
    interrupted_by: the signal that ended it, if one did.
  """

  step: int
  finished: bool
  interrupted_by: int | None


class _Run(NamedTuple):
  """The parts of a run."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  dataset: Dataset
  task: Task
  say: Callable[[str], None]
  listener: Listener | None
  profile: str | None
  timer: Timer
  source: ancestry.Source | None
  pinned: dict[str, Any] | None


def train(
  config: ml_collections.ConfigDict,
  workdir: str,
  listener: Listener | None = None,
  profile: str | None = None,
  *,
  clock: Callable[[], float] = time.perf_counter,
  pinned: dict[str, Any] | None = None,
) -> Outcome:
  """Trains a config in a directory, from its newest good checkpoint if there is one.

  A run may continue on another mesh: it starts from the same bits, and only the order of sums over
  devices differs from there on.

  Args:
    config: validated.
    workdir: new, empty, or of the same run.
    listener: gets what would be shown on the terminal.
    profile: directory for a trace of a few steps and a table of the time by part; None for none.
    clock: that times the run, in seconds.
    pinned: what another run of the same train.init_from started from: the last entry of its
      ancestry. Other numbers are refused.

  Raises:
    UserError: for errors that the user can fix; nothing was changed then.
    DamagedError: if no checkpoint is good.
  """
  if profile is not None:
    profiling.check_directory(TRACE_FLAG, profile)
  timer = Timer(listener.on_phase if listener else lambda phase: None, clock)
  mesh = setup.mesh_of(config)
  first = jax.process_index() == 0
  say = (listener.say if listener else print_line) if first else lambda line: None
  try:
    with contextlib.ExitStack() as stack:
      stack.enter_context(device_errors.explained(config))
      with all_or_none():
        if first:
          stack.enter_context(claim.claimed(workdir))
        old = setup.read_old(workdir, say)
        if old:
          same_run.check_same_config(workdir, old, config, max(saved_steps(workdir), default=0))
        else:
          unread.check_decay(config)
        source, tokenizer = ancestry.inherited(config, workdir, old, pinned)
        dataset = setup.dataset_of(config, tokenizer)
        if old:
          same_run.check_same_data(workdir, old, config, dataset.fingerprint)
        setup.check_splits(config, dataset)
      microbatch = config.data.batch_size // config.train.accumulation_steps
      task = build_task(config, mesh, dataset.tokenizer.vocab_size, 'train', microbatch)
      run = _Run(
        config, workdir, mesh, dataset, task, say, listener, profile, timer, source, pinned
      )
      if old and old['status'] == 'finished' and not same_run.lengthens(old, config):
        return _finished(run, old) or _train(run, old)
      return _train(run, old)
  except OSError as error:
    if not is_refusal(error):
      raise
    raise UserError('workdir', workdir, f'cannot be written: {error.strerror}') from error


def _finished(run: _Run, old: dict[str, Any]) -> Outcome | None:
  """Returns the outcome of a run that is finished; None if its last checkpoint must be made again.

  Args:
    run: to check.
    old: its manifest.
  """
  first = jax.process_index() == 0
  if first:
    setup.keep_tokenizer(run.workdir, run.dataset.tokenizer)
  if not _is_intact(run):
    return None
  if run.profile is not None:
    left = f'{run.workdir} is finished: no step is left to trace'
    raise UserError(TRACE_FLAG, run.profile, left)
  run.say(f'{run.workdir}: finished at step {old["step"]}')
  if first:
    warn_of_lost_lines(run.workdir, old, old['step'], run.say)
  return Outcome(old['step'], True, None)


def _is_intact(run: _Run) -> bool:
  """True if the last checkpoint of a finished run is intact, or all were removed on purpose."""
  with jax.set_mesh(run.mesh):
    optimizer = optimizer_of(run.config, run.task)
    checkpoints = Checkpoints(run.workdir, read_only=True)
    with contextlib.closing(checkpoints):
      if not checkpoints.steps():
        run.say(
          'note: its checkpoints are gone, so it can be neither evaluated nor sampled; to train it '
          'again, use another --workdir'
        )
        return True
      restored = checkpoints.restore(abstract_state(run.task, optimizer), any_optimizer=True)
  return restored is not None and restored[0] == run.config.train.num_steps


def _train(run: _Run, old: dict[str, Any] | None) -> Outcome:
  config, first = run.config, jax.process_index() == 0
  causal_claim = check_causal_claim(config, run.dataset.tokenizer.vocab_size)
  metadata = setup.first_manifest(config, run.mesh, run.dataset)
  if old:
    metadata['resumed_from'] = [*old.get('resumed_from', []), _provenance(old)]
  announce(config, run.mesh, run.dataset, metadata, run.say)
  run.say(causal_claim)
  run.say('preparing model and state')
  with jax.set_mesh(run.mesh):
    optimizer = optimizer_of(config, run.task)
    new = _from_source(run, optimizer, old)
    checkpoints = Checkpoints(run.workdir, config.train.keep_checkpoints)
    state, step, position = _start(run, optimizer, checkpoints, old, new and new[0])
    metadata |= {'step': step, 'logging': manifest.paces_from(old, config, step)}
    metadata |= same_run.lengthened(old, config, step)
    if config.train.init_from:
      metadata['ancestry'] = new[1] if new else ancestry.known(config, old)
    if old and same_run.lengthens(old, config):
      run.say(f'lengthened to {config.train.num_steps} steps; goes on from step {step}')
    if first:
      if old and step:
        warn_of_lost_lines(run.workdir, old, step, run.say)
      setup.keep_tokenizer(run.workdir, run.dataset.tokenizer)
      if old and old['status'] == manifest.DAMAGED and manifest.exists(run.workdir):
        run.say(f'damaged manifest moved to {manifest.set_aside(run.workdir)}')
      manifest.write(run.workdir, metadata)
    batches = train_iterator(
      run.dataset.windows('train', config.data.sequence_length),
      batch_size=config.data.batch_size,
      seed=config.train.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    if position is not None:
      batches.set_state(position)
    train_step = step_of(program_of(config), run.mesh, run.dataset.tokenizer.vocab_size)
    compiled_before = train_step._cache_size()
    again = evaluates_at(config, step)
    writer = MetricsWriter(run.workdir, step, enabled=first, drop_last_valid=again, say=run.say)
    with contextlib.closing(checkpoints), contextlib.closing(writer):
      try:
        outcome = _steps(run, train_step, state, batches, checkpoints, writer, step)
      except DivergedError as error:
        if first:
          manifest.write(run.workdir, metadata | error.metadata)
        raise
      with run.timer.phase('saving'):
        checkpoints.wait()
  metadata |= {
    'step': outcome.step,
    'status': 'finished' if outcome.finished else 'interrupted',
    'compilations': train_step._cache_size() - compiled_before,
    'seconds': {phase: round(value, 3) for phase, value in run.timer.seconds().items()},
  }
  if first:
    manifest.write(run.workdir, metadata)
  return outcome


def _provenance(old: dict[str, Any]) -> dict[str, Any]:
  keys = ('step', 'git_commit', 'git_dirty', 'mesh', 'devices', 'seconds')
  return {key: old.get(key) for key in keys}


def _from_source(
  run: _Run, optimizer, old: dict[str, Any] | None
) -> tuple[TrainState, list[dict[str, Any]]] | None:
  """Returns the state of a run that starts from another, and its ancestry; None if none does."""
  if run.source is None:
    return None
  config, source = run.config, run.source
  state, entry = ancestry.start(source, config, run.task, optimizer, _new_state(run, optimizer))
  for pinned, whose in ((ancestry.pin_of(old), run.workdir), (run.pinned, 'another run')):
    ancestry.check_pinned(source.given, entry, pinned, whose)
  run.say(f'starting from step {entry["step"]} of {source.workdir}: {", ".join(entry["taken"])}')
  return state, ancestry.of(source, entry)


def _new_state(run: _Run, optimizer) -> TrainState:
  state = init_state(run.task, optimizer, run.config.train.seed)
  return with_token_counts(state, run.task, lambda: run.dataset.token_counts('train'))


def _start(
  run: _Run,
  optimizer,
  checkpoints: Checkpoints,
  old: dict[str, Any] | None,
  new: TrainState | None,
):
  """Returns (state, step, data position): restored, or new; `new` replaces random values."""
  restored = (
    checkpoints.restore(abstract_state(run.task, optimizer)) if checkpoints.steps() else None
  )
  for path in checkpoints.set_damaged_aside():
    run.say(f'warning: damaged checkpoint moved to {path}')
  if restored is None:
    return new or _new_state(run, optimizer), 0, None
  step, state, position = restored
  before, now = (old or {}).get('mesh'), dict(run.mesh.shape)
  changed = (
    f' on mesh {named_mesh(now)}, before on {named_mesh(before)}'
    if before not in (None, now)
    else ''
  )
  run.say(f'resuming at step {step}{changed}')
  return state, step, position


def _steps(run, train_step, state, batches, checkpoints, writer, step: int) -> Outcome:
  """Does the remaining steps with all callbacks of a run."""
  config, num_steps = run.config, run.config.train.num_steps
  run.timer.enter(TRAINING)
  compiled_before = train_step._cache_size()
  with Signals() as signals, contextlib.ExitStack() as stack:
    bar = ProgressBar(num_steps, step, shown=run.listener is None)
    stack.enter_context(contextlib.closing(bar))
    if not run.listener:
      run.timer.on_phase = bar.show_phase
    callbacks = [
      *([StepCounter(run.listener.on_step)] if run.listener else []),
      MetricsReporter(config, run.mesh, writer, bar=bar, timer=run.timer),
      Checkpointer(config, checkpoints, batches.get_state, timer=run.timer, say=run.say),
      Evaluator(config, run.mesh, run.dataset, writer=writer, timer=run.timer, say=run.say),
    ]
    do_step = train_step
    if run.profile is not None and jax.process_index() == 0:
      do_step = TracedSteps(train_step, run.profile, num_steps - step, run.say, run.timer)
      stack.enter_context(contextlib.closing(do_step))
    _, step = run_steps(
      saying_when_it_compiles(do_step, train_step, run.timer, run.say),
      state,
      lambda running: next_batch(batches, run.task, running and running.grad_norm),
      hyperparameters_of(config),
      step=step,
      num_steps=num_steps,
      callbacks=callbacks,
      should_stop=lambda step: signals.should_stop(step, config.train.log_every),
    )
  if train_step._cache_size() - compiled_before > 1:
    run.say(f'warning: the step was compiled {train_step._cache_size() - compiled_before} times')
  finished = step == num_steps
  if not finished:
    run.say(f'interrupted: saving step {step}')
  return Outcome(step, finished, None if finished else signals.received)


def next_batch(batches, task: Task, running: Any) -> tuple[Batch, float]:
  """Returns the next batch on its devices, and the seconds the devices had nothing to do for it.

  While the step before still runs, no device waits and nothing is counted; if it has ended
  meanwhile, all the time the batch took is, so the seconds are an upper bound.

  Args:
    batches: of this process.
    task: whose mesh the batch goes to.
    running: an array that the step before computes; None if there is none in flight.
  """
  start = time.perf_counter()
  batch = put_batch(next(batches), task)
  seconds = time.perf_counter() - start
  idle = running is None or running.is_ready()
  return batch, seconds if idle else 0.0
