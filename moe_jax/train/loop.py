"""A training run from start, or from where it stopped, to its end."""

import contextlib
import copy
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import optim, profiling, unread
from moe_jax.data import Dataset, train_iterator
from moe_jax.errors import UserError, is_refusal
from moe_jax.field_names import split_field
from moe_jax.files import write_atomically
from moe_jax.models.build import build_model
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.distributed import all_or_none
from moe_jax.routing import ROUTERS
from moe_jax.train import (
  ancestry,
  device_errors,
  evaluate,
  manifest,
  metrics,
  metrics_file,
  opening,
)
from moe_jax.train.causal_claim import check_causal_claim
from moe_jax.train.checkpoint import Checkpoints, saved_steps
from moe_jax.train.knobs import knob_fields, knobs_of
from moe_jax.train.profile import FLAG as TRACE_FLAG
from moe_jax.train.profile import TracedSteps
from moe_jax.train.progress import ProgressBar, print_line
from moe_jax.train.signals import Signals
from moe_jax.train.state import TrainState, abstract_state, init_state, with_token_counts
from moe_jax.train.step import Batch, StepMetrics, make_train_step, put_batch
from moe_jax.train.timing import TRAINING, Throughput, Timer

_MANY_PASSES = 50


class Outcome(NamedTuple):
  """How a call of `train` ended.

  Attributes:
    step: optimizer steps done.
    finished: whether these are all.
    interrupted_by: the signal that ended it, if one did.
  """

  step: int
  finished: bool
  interrupted_by: int | None


class DivergedError(UserError):
  """The loss or the gradient is not finite any more.

  Attributes:
    step: whose metrics said so.
    cause: what was not finite, as 'loss=nan'.
    facts: what the manifest of the run says of it.
  """

  def __init__(self, step: int, what: str, value: float):
    self.step = step
    self.cause = f'{what}={value}'
    self.facts = {'step': step, 'status': 'diverged', 'cause': self.cause}
    super().__init__(
      what,
      value,
      f'diverged at step {step}: lower optim.learning_rate, raise optim.warmup_steps, or look for '
      'a number of the config that is out of proportion; in another --workdir; earlier checkpoints '
      'are kept',
    )


class Listener(NamedTuple):
  """Who is told of a run in place of the terminal.

  Attributes:
    say: takes what would be printed, a line at a time.
    on_step: takes the number of each step that was done.
    on_phase: takes each phase of `timing.PHASES` when it begins.
  """

  say: Callable[[str], None]
  on_step: Callable[[int], None]
  on_phase: Callable[[str], None] = lambda phase: None


class _Run(NamedTuple):
  """What a run is made of."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  dataset: Dataset
  model: Decoder
  say: Callable[[str], None]
  listener: Listener | None
  profile: str | None
  timer: Timer
  source: ancestry.Source | None
  pinned: dict[str, Any] | None


def accumulation_scope(config: ml_collections.ConfigDict) -> str:
  """Returns over what auxiliary losses are formed, see `make_gradient`.

  Balance scopes smaller than a micro-batch need no others: each lies in one micro-batch.
  """
  if config.moe.balance_scope != 'global':
    return 'microbatch'
  return config.train.accumulation_scope


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

  A run that goes on may do so on another mesh: it starts from the same bits, and only the order of
  sums over devices is another from there on.

  Args:
    config: validated.
    workdir: new, empty, or of the same run.
    listener: told what would be shown on the terminal.
    profile: directory for a trace of a few steps and a table of the time by part; None for none.
    clock: that times the run, in seconds.
    pinned: what another run of the same train.init_from started from: the last entry of its
      ancestry. Other numbers are refused.

  Raises:
    UserError: for whatever the user can mend; nothing was changed then.
    DamagedError: if no checkpoint is good.
  """
  if profile is not None:
    profiling.check_directory(TRACE_FLAG, profile)
  timer = Timer(listener.on_phase if listener else lambda phase: None, clock)
  mesh = opening.mesh_of(config)
  first = jax.process_index() == 0

  def say(line: str) -> None:
    if first and listener:
      listener.say(line)
    elif first:
      print_line(line)

  try:
    with contextlib.ExitStack() as stack:
      stack.enter_context(device_errors.explained(config))
      with all_or_none():
        if first:
          stack.enter_context(manifest.claimed(workdir))
        old = opening.read_old(workdir, say)
        if old:
          manifest.check_same_config(workdir, old, config, max(saved_steps(workdir), default=0))
        else:
          unread.check_decay(config)
        source, tokenizer = ancestry.inherited(config, workdir, old, pinned)
        dataset = opening.dataset_of(config, tokenizer)
        if old:
          manifest.check_same_data(workdir, old, config, dataset.fingerprint)
        opening.check_splits(config, dataset)
      microbatch = config.data.batch_size // config.train.accumulation_steps
      model = build_model(config, mesh, dataset.tokenizer.vocab_size, 'train', microbatch)
      run = _Run(
        config, workdir, mesh, dataset, model, say, listener, profile, timer, source, pinned
      )
      if old and old['status'] == 'finished' and not manifest.lengthens(old, config):
        if first:
          opening.keep_tokenizer(run.workdir, run.dataset.tokenizer)
        if _is_intact(run):
          if profile is not None:
            raise UserError(TRACE_FLAG, profile, f'{workdir} is finished: no step is left to trace')
          say(f'{workdir}: finished at step {old["step"]}')
          if first:
            _warn_of_lost_lines(workdir, old, old['step'], say)
          return Outcome(old['step'], True, None)
      return _train(run, old)
  except OSError as error:
    if not is_refusal(error):
      raise
    raise UserError('workdir', workdir, f'cannot be written: {error.strerror}') from error


def _is_intact(run: _Run) -> bool:
  """Whether the last checkpoint of a finished run is good, or all were taken away on purpose."""
  with jax.set_mesh(run.mesh):
    optimizer = optim.make_optimizer(run.config.optim, run.config.train.num_steps)
    checkpoints = Checkpoints(run.workdir, read_only=True)
    with contextlib.closing(checkpoints):
      if not checkpoints.steps():
        run.say(
          'note: its checkpoints are gone, so it can be neither evaluated nor sampled; to train it '
          'again, use another --workdir'
        )
        return True
      restored = checkpoints.restore(abstract_state(run.model, optimizer), any_optimizer=True)
  return restored is not None and restored[0] == run.config.train.num_steps


def _warn_of_lost_lines(
  workdir: str, old: dict[str, Any], step: int, say: Callable[[str], None]
) -> None:
  """Says which lines of metrics.jsonl up to a step are damaged or gone."""
  path = pathlib.Path(workdir) / metrics_file.FILE
  found = metrics_file.read_file(path)
  finished = old['status'] == 'finished'
  if finished and found.damaged:
    say(f'warning: {path}: {metrics_file.damage(found)}')
  lost = metrics_file.missing_lines(found.records, manifest.paces(old), step, finished=finished)
  if lost:
    names = metrics_file.shortened([f'{split} {number}' for split, number in lost])
    state = 'is gone: it held' if not path.exists() else 'lacks'
    say(f'warning: {path} {state} the lines of {names}; they are not written again')


def _train(run: _Run, old: dict[str, Any] | None) -> Outcome:
  config, first = run.config, jax.process_index() == 0
  causal_claim = check_causal_claim(config, run.dataset.tokenizer.vocab_size)
  facts = first_manifest(config, run.mesh, run.dataset)
  if old:
    facts['resumed_from'] = [*old.get('resumed_from', []), _provenance(old)]
  _announce(run, facts)
  run.say(causal_claim)
  run.say('preparing model and state')
  with jax.set_mesh(run.mesh):
    optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
    new = _from_source(run, optimizer, old)
    checkpoints = Checkpoints(run.workdir, config.train.keep_checkpoints)
    state, step, position = _start(run, optimizer, checkpoints, old, new and new[0])
    facts |= {'step': step, 'logging': manifest.paces_from(old, config, step)}
    facts |= manifest.lengthened(old, config, step)
    if config.train.init_from:
      facts['ancestry'] = new[1] if new else ancestry.known(config, old)
    if old and manifest.lengthens(old, config):
      run.say(f'lengthened to {config.train.num_steps} steps; goes on from step {step}')
    if first:
      if old and step:
        _warn_of_lost_lines(run.workdir, old, step, run.say)
      opening.keep_tokenizer(run.workdir, run.dataset.tokenizer)
      if old and old['status'] == manifest.DAMAGED and manifest.exists(run.workdir):
        run.say(f'damaged manifest moved to {manifest.set_aside(run.workdir)}')
      manifest.write(run.workdir, facts)
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
    again = _evaluates_at(config, step)
    writer = metrics.MetricsWriter(
      run.workdir, step, enabled=first, drop_last_valid=again, say=run.say
    )
    with contextlib.closing(checkpoints), contextlib.closing(writer):
      try:
        outcome = _steps(run, train_step, state, batches, checkpoints, writer, step)
      except DivergedError as error:
        if first:
          manifest.write(run.workdir, facts | error.facts)
        raise
      with run.timer.phase('saving'):
        checkpoints.wait()
  facts |= {
    'step': outcome.step,
    'status': 'finished' if outcome.finished else 'interrupted',
    'compilations': train_step._cache_size() - compiled_before,
    'seconds': {phase: round(value, 3) for phase, value in run.timer.seconds().items()},
  }
  if first:
    manifest.write(run.workdir, facts)
  return outcome


def first_manifest(
  config: ml_collections.ConfigDict, mesh: Mesh, dataset: Dataset
) -> dict[str, Any]:
  """Returns the manifest of a run that begins."""
  data = {
    'name': config.data.name,
    'fingerprint': dataset.fingerprint,
    'tokenizer': dataset.tokenizer.fingerprint,
    'domains': list(dataset.domains),
    'provenance': dataset.provenance,
  }
  return manifest.new_manifest(config, mesh, dataset.tokenizer.vocab_size, data)


def program_of(config: ml_collections.ConfigDict) -> str:
  """Returns what of a config decides the program of its step, as JSON."""
  program = copy.deepcopy(config)
  defaults = config_lib.get_config()
  starts = ('train.init_from', 'train.init_optimizer', 'train.init_router_state')
  for field in (*knob_fields(config), *starts):
    section, name = split_field(field)
    program[section][name] = defaults[section][name]
  return program.to_json(sort_keys=True)


@functools.lru_cache(maxsize=2)
def step_of(program: str, mesh: Mesh, vocab_size: int, packed: bool = False) -> Any:
  """Returns the step of a program; runs in one process that share it compile it once."""
  config = config_lib.get_config()
  config.update(json.loads(program))
  microbatch = config.data.batch_size // config.train.accumulation_steps
  return make_train_step(
    build_model(config, mesh, vocab_size, 'train', microbatch),
    optim.make_optimizer(config.optim, config.train.num_steps),
    optim.make_schedule(config.optim, config.train.num_steps),
    config.train.accumulation_steps,
    accumulation_scope(config),
    config.moe.layer_reduction,
    config.train.load_decay,
    packed,
  )


def _provenance(old: dict[str, Any]) -> dict[str, Any]:
  keys = ('step', 'git_commit', 'git_dirty', 'mesh', 'devices', 'seconds')
  return {key: old.get(key) for key in keys}


def named(mesh: dict[str, int]) -> str:
  """Returns 'data=2, expert=4'."""
  return ', '.join(f'{axis}={size}' for axis, size in mesh.items())


def _announce(run: _Run, facts: dict[str, Any]) -> None:
  """Says what will be trained, and warns of what a reader of the results must know."""
  counts, routing = facts['parameters'], facts['routing']
  data = run.config.data
  rows = len(run.dataset.windows('train', data.sequence_length))
  passes = run.config.train.num_steps * data.batch_size / rows
  run.say(
    f'{counts["total"]:,} parameters, {counts["active"]:,} active; '
    f'mesh {named(dict(run.mesh.shape))} on {facts["devices"]["kind"]}; '
    f'{run.dataset.num_tokens("train"):,} training tokens, {passes:.3g} passes over them'
  )
  if passes > _MANY_PASSES:
    run.say(
      f'warning: {passes:.0f} passes over {run.config.data.name}: a model learns so small a text '
      'by heart; take more text or a smaller train.num_steps'
    )
  if routing:
    # A router that assigns tokens to experts with room drops none, or by a rule of its own.
    assigned = ROUTERS[run.config.moe.router].balance == 'assignment'
    unlimited = routing['expert_capacity'] >= routing['tokens_in_group']
    floor = f'; random routing would drop {routing["drop_share_of_random_routing"]:.2%}'
    capacity = f'capacity {routing["expert_capacity"]}{"" if assigned else floor}'
    run.say(
      f'{routing["tokens_per_expert"]:.0f} tokens per expert and group, '
      f'{"none dropped for want of slots" if unlimited else capacity}'
    )
    if routing['tokens_per_expert'] < 16 and not assigned and not unlimited:
      run.say('warning: below 16 tokens per expert and group even balanced routing drops many')
  if not facts['causal']:
    run.say(
      f'warning: {config_lib.why_not_causal(run.config)} is not causal: in training, later tokens '
      'decide where earlier ones go or who is dropped; in decoding they cannot'
    )
  if facts['git_dirty']:
    run.say('note: uncommitted changes; the manifest says so')


def _from_source(
  run: _Run, optimizer, old: dict[str, Any] | None
) -> tuple[TrainState, list[dict[str, Any]]] | None:
  """Returns the state of a run that starts from another, and its ancestry; None if none does."""
  if run.source is None:
    return None
  config, source = run.config, run.source
  state, entry = ancestry.start(source, config, run.model, optimizer, _new_state(run, optimizer))
  for pinned, whose in ((ancestry.pin_of(old), run.workdir), (run.pinned, 'another run')):
    ancestry.check_pinned(source.given, entry, pinned, whose)
  run.say(f'starting from step {entry["step"]} of {source.workdir}: {", ".join(entry["taken"])}')
  return state, ancestry.of(source, entry)


def _new_state(run: _Run, optimizer) -> TrainState:
  state = init_state(run.model, optimizer, run.config.train.seed)
  return with_token_counts(state, run.model, lambda: run.dataset.token_counts('train'))


def _start(
  run: _Run,
  optimizer,
  checkpoints: Checkpoints,
  old: dict[str, Any] | None,
  new: TrainState | None,
):
  """Returns (state, step, data position): restored, or new; `new` in place of random values."""
  restored = (
    checkpoints.restore(abstract_state(run.model, optimizer)) if checkpoints.steps() else None
  )
  for path in checkpoints.set_damaged_aside():
    run.say(f'warning: damaged checkpoint moved to {path}')
  if restored is None:
    return new or _new_state(run, optimizer), 0, None
  step, state, position = restored
  before, now = (old or {}).get('mesh'), dict(run.mesh.shape)
  changed = f' on mesh {named(now)}, before on {named(before)}' if before not in (None, now) else ''
  run.say(f'resuming at step {step}{changed}')
  return state, step, position


def _steps(run, train_step, state, batches, checkpoints, writer, step: int) -> Outcome:
  """Runs the remaining steps. Metrics of a step are fetched while the next one runs."""
  config = run.config
  knobs = knobs_of(config)
  evaluator = _Evaluator(run, writer)
  pending = None
  run.timer.enter(TRAINING)
  if _evaluates_at(config, step):
    # The interruption came between this step's checkpoint and its evaluation, or may have.
    evaluator(step, state)
  compiled_before = train_step._cache_size()
  with Signals() as signals, contextlib.ExitStack() as stack:
    bar = ProgressBar(config.train.num_steps, step, shown=run.listener is None)
    stack.enter_context(contextlib.closing(bar))
    if not run.listener:
      run.timer.on_phase = bar.show_phase
    report = _Reporter(run, writer, bar)
    do_step = train_step
    if run.profile is not None and jax.process_index() == 0:
      remaining = config.train.num_steps - step
      do_step = TracedSteps(train_step, run.profile, remaining, run.say, run.timer)
      stack.enter_context(contextlib.closing(do_step))
    while step < config.train.num_steps:
      batch, waited = next_batch(batches, run.model, pending and pending[1].grad_norm)
      with compiling(train_step, run.timer, run.say):
        state, step_metrics = do_step(state, batch, knobs)
      step += 1
      if run.listener:
        run.listener.on_step(step)
      if pending is not None:
        report(*pending)
      pending = (step, step_metrics, waited)
      stop = signals.should_stop(step, config.train.log_every)
      saves = step == config.train.num_steps or stop or step % config.train.checkpoint_every == 0
      evaluates = _evaluates_at(config, step) and not stop
      if saves or evaluates:
        # Waits for the step: its time is training, not that of what follows.
        report(*pending)
        pending = None
      if saves:
        with saving(step, run.timer, run.say):
          checkpoints.save(step, state, batches.get_state(), config.to_dict())
      if evaluates:
        evaluator(step, state)
      if stop:
        break
  if train_step._cache_size() - compiled_before > 1:
    run.say(f'warning: the step was compiled {train_step._cache_size() - compiled_before} times')
  finished = step == config.train.num_steps
  if not finished:
    run.say(f'interrupted: saving step {step}')
  return Outcome(step, finished, None if finished else signals.received)


@contextlib.contextmanager
def compiling(train_step: Any, timer: Timer, say: Callable[[str], None]) -> Iterator[None]:
  """Says and times that the call within compiles, where nothing is compiled yet.

  Devices work on the step after the call has returned, so its own time is not counted.
  """
  if train_step._cache_size():
    yield
    return
  say('compiling the training step')
  before = timer.seconds()['compiling']
  with timer.phase('compiling'):
    yield
  say(f'compiled in {timer.seconds()["compiling"] - before:.1f} s; training')


@contextlib.contextmanager
def saving(step: int, timer: Timer, say: Callable[[str], None]) -> Iterator[None]:
  """Says and times that a checkpoint is begun within."""
  say(f'step {step}: saving')
  with timer.phase('saving'):
    yield


def next_batch(batches, model: Decoder, running: Any) -> tuple[Batch, float]:
  """Returns the next batch on its devices, and the seconds the devices had nothing to do for it.

  While the step before still runs, no device waits and nothing is counted; if it has ended
  meanwhile, all the time the batch took is, so the seconds are an upper bound.

  Args:
    batches: of this process.
    model: whose mesh the batch goes to.
    running: an array that the step before computes; None if there is none in flight.
  """
  start = time.perf_counter()
  batch = put_batch(next(batches), model)
  seconds = time.perf_counter() - start
  idle = running is None or running.is_ready()
  return batch, seconds if idle else 0.0


def _evaluates_at(config: ml_collections.ConfigDict, step: int) -> bool:
  """Whether the validation split is evaluated after this step."""
  return bool(config.train.eval_every and step and step % config.train.eval_every == 0)


class _Reporter:
  """Writes and shows the metrics of steps, in their order."""

  def __init__(self, run: _Run, writer: metrics.MetricsWriter, bar: ProgressBar):
    self._run, self._writer, self._bar = run, writer, bar
    self._throughput = Throughput(run.timer)

  def __call__(self, step: int, step_metrics: Any, waited: float) -> None:
    """Waits for a step to end and reports it.

    Raises:
      DivergedError: if the loss is not finite. No checkpoint is made of such a state.
    """
    run = self._run
    record = metrics.step_metrics(step_metrics, run.mesh.shape['expert'])
    culprit = not_finite(step_metrics, record)
    if culprit:
      raise DivergedError(step, *culprit)
    self._bar.update(step, record, self._throughput.add(record['tokens']))
    if step % run.config.train.log_every == 0 or step == run.config.train.num_steps:
      record |= {'tokens_per_second': self._throughput.line(), 'data_wait': waited}
      record |= run.timer.take('preparing', 'compiling', 'tracing', 'saving')
      self._writer.write(step, 'train', record)


def not_finite(step_metrics: StepMetrics, record: dict[str, Any]) -> tuple[str, float] | None:
  """Returns what of a step is not finite, and its value; None if all is."""
  for name, what in (('objective', 'loss'), ('grad_norm', 'gradient norm')):
    if not math.isfinite(record[name]):
      return what, record[name]
  if not bool(step_metrics.router_state_finite):
    return 'router_state', math.nan
  return None


class _Evaluator:
  """Evaluates on the validation split, with one compiled step for the whole run."""

  def __init__(self, run: _Run, writer: metrics.MetricsWriter):
    self._run, self._writer = run, writer
    self._step: Any = None
    self._model: Any = None

  def __call__(self, step: int, state: TrainState) -> None:
    """Evaluates, writes and says what came out."""
    run = self._run
    run.say(f'step {step}: evaluating')
    with run.timer.phase('evaluating'):
      result = self._evaluate(state)
    seconds = run.timer.take('evaluating')
    self._writer.write(step, 'valid', result | seconds)
    took = seconds.get('seconds_evaluating', 0)
    run.say(f'step {step}: validation loss {result["loss"]:.4f}, evaluated in {took:.1f} s')

  def _evaluate(self, state: TrainState) -> dict[str, Any]:
    run, config = self._run, self._run.config
    if self._step is None:
      vocab_size = run.dataset.tokenizer.vocab_size
      self._model = build_model(config, run.mesh, vocab_size, 'eval')
      self._step = evaluate.make_eval_step(self._model)
    result = evaluate.evaluate(
      self._step,
      self._model,
      state.params,
      state.router_state,
      run.dataset,
      split='valid',
      sequence_length=config.data.sequence_length,
      batch_size=config.data.batch_size // config.train.accumulation_steps,
      max_batches=config.train.eval_batches,
    )
    del result['split']
    return result


def write_json(path: str | pathlib.Path, value: Any) -> None:
  """Writes a result whole or not at all."""
  write_atomically(path, json.dumps(value, indent=2, sort_keys=True))
