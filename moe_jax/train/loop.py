"""A training run from start, or from where it stopped, to its end."""

import contextlib
import json
import math
import pathlib
import signal
import sys
import time
from types import FrameType
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_jax import optim
from moe_jax.data import Dataset, open_dataset, train_iterator
from moe_jax.errors import UserError, is_refusal
from moe_jax.models.build import build_model
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train import evaluate, manifest, metrics, objective
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.state import abstract_state, init_state
from moe_jax.train.step import make_train_step, put_batch

TOKENIZER = 'tokenizer'


class _Signals:
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
      # The second one means now.
      self._put_back(number)
      signal.raise_signal(number)
    self.received = number

  def should_stop(self, step: int, ask_every: int) -> bool:
    """Whether to stop after this step; the same answer in every process.

    Several processes ask each other only every `ask_every` steps: asking waits for the devices.
    """
    if jax.process_count() > 1:
      if step % ask_every:
        return False
      asked = np.asarray(self.received or 0, np.int32)
      agreed = int(multihost_utils.process_allgather(asked).max())
      if not agreed:
        # A signal that came meanwhile waits for the next time.
        return False
      # Whoever did not receive it ends with the same exit code.
      self.received = agreed
    return self.received is not None


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


class _Run(NamedTuple):
  """What a run is made of."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  dataset: Dataset
  model: Decoder
  say: Any


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the mesh of a config; an axis is never made smaller to fit.

  Raises:
    UserError: if there are not enough devices.
  """
  try:
    return make_mesh(config.mesh.data, config.mesh.expert)
  except ValueError as error:
    raise UserError(
      'mesh.data',
      config.mesh.data,
      f'{error}; for simulated CPU devices set '
      'XLA_FLAGS=--xla_force_host_platform_device_count=N, or choose a smaller mesh',
    ) from error


def dataset_of(config: ml_collections.ConfigDict) -> Dataset:
  """Returns the data set of a config, prepared if it was not."""
  data = config.data
  return open_dataset(
    data.name,
    data_dir=data.data_dir,
    tokenizer=data.tokenizer,
    vocab_size=data.vocab_size,
    valid_fraction=data.valid_fraction,
    test_fraction=data.test_fraction,
  )


def pools_sums(config: ml_collections.ConfigDict) -> bool:
  """Whether auxiliary losses are formed over all micro-batches at once, see `make_gradient`.

  Scopes smaller than a micro-batch need no pooling: each lies in one micro-batch.
  """
  return config.train.accumulation_scope == 'batch' and config.moe.balance_scope == 'global'


def train(config: ml_collections.ConfigDict, workdir: str) -> Outcome:
  """Trains a config in a directory, from its newest good checkpoint if there is one.

  Args:
    config: validated.
    workdir: new, empty, or of the same run.

  Raises:
    UserError: for whatever the user can mend; nothing was changed then.
    DamagedError: if no checkpoint is good.
  """
  mesh = mesh_of(config)
  first = jax.process_index() == 0

  def say(line: str) -> None:
    if first:
      print(line, flush=True)

  old = manifest.read(workdir) if manifest.exists(workdir) else None
  dataset = dataset_of(config)
  if old:
    manifest.check_same_run(workdir, old, config, dataset.fingerprint)
    if old['status'] == 'finished':
      say(f'{workdir}: finished at step {old["step"]}')
      return Outcome(old['step'], True, None)
  microbatch = config.data.batch_size // config.train.accumulation_steps
  model = build_model(config, mesh, dataset.tokenizer.vocab_size, 'train', microbatch)
  run = _Run(config, workdir, mesh, dataset, model, say)
  try:
    with manifest.claimed(workdir) if first else contextlib.nullcontext():
      return _train(run, old)
  except OSError as error:
    if not is_refusal(error):
      raise
    raise UserError('workdir', workdir, f'cannot be written: {error.strerror}') from error


def _train(run: _Run, old: dict[str, Any] | None) -> Outcome:
  config, first = run.config, jax.process_index() == 0
  data = {
    'name': config.data.name,
    'fingerprint': run.dataset.fingerprint,
    'tokenizer': run.dataset.tokenizer.fingerprint,
    'domains': list(run.dataset.domains),
    'provenance': run.dataset.provenance,
  }
  facts = manifest.new_manifest(config, run.mesh, run.dataset.tokenizer.vocab_size, data)
  if old:
    facts['resumed_from'] = [*old.get('resumed_from', []), _provenance(old)]
  _announce(run, facts)
  with jax.set_mesh(run.mesh):
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
    checkpoints = Checkpoints(run.workdir, config.train.keep_checkpoints)
    state, step, position = _start(run, optimizer, checkpoints)
    facts['step'] = step
    if first:
      folder = pathlib.Path(run.workdir) / TOKENIZER
      folder.mkdir(exist_ok=True)
      run.dataset.tokenizer.save(str(folder))
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
    train_step = make_train_step(
      run.model,
      optimizer,
      schedule,
      config.train.accumulation_steps,
      pools_sums(config),
      config.moe.layer_reduction,
    )
    again = _evaluates_at(config, step)
    writer = metrics.MetricsWriter(run.workdir, step, enabled=first, drop_last_valid=again)
    with contextlib.closing(checkpoints), contextlib.closing(writer):
      outcome = _steps(run, train_step, state, batches, checkpoints, writer, step)
      checkpoints.wait()
  facts |= {
    'step': outcome.step,
    'status': 'finished' if outcome.finished else 'interrupted',
    'compilations': train_step._cache_size(),
  }
  if first:
    manifest.write(run.workdir, facts)
  return outcome


def _provenance(old: dict[str, Any]) -> dict[str, Any]:
  return {key: old[key] for key in ('step', 'git_commit', 'git_dirty', 'mesh', 'devices')}


def _announce(run: _Run, facts: dict[str, Any]) -> None:
  """Says what will be trained, and warns of what a reader of the results must know."""
  counts, routing = facts['parameters'], facts['routing']
  run.say(
    f'{counts["total"]:,} parameters, {counts["active"]:,} active; '
    f'mesh data={run.mesh.shape["data"]}, expert={run.mesh.shape["expert"]} on '
    f'{facts["devices"]["kind"]}; {run.dataset.num_tokens("train"):,} training tokens'
  )
  if routing:
    run.say(
      f'{routing["tokens_per_expert"]:.0f} tokens per expert and group, capacity '
      f'{routing["expert_capacity"]}; random routing would drop '
      f'{routing["drop_share_of_random_routing"]:.2%}'
    )
    if routing['tokens_per_expert'] < 16:
      run.say('warning: below 16 tokens per expert and group even balanced routing drops many')
  if not facts['causal']:
    run.say(
      f'warning: moe.priority={run.config.moe.priority} is not causal: in training, later tokens '
      'decide who is dropped; in decoding they cannot'
    )
  if facts['git_dirty']:
    run.say('note: uncommitted changes; the manifest says so')


def _start(run: _Run, optimizer, checkpoints: Checkpoints):
  """Returns (state, step, data position): restored, or new."""
  restored = (
    checkpoints.restore(abstract_state(run.model, optimizer)) if checkpoints.steps() else None
  )
  for path in checkpoints.set_damaged_aside():
    run.say(f'warning: damaged checkpoint moved to {path}')
  if restored is None:
    return init_state(run.model, optimizer, run.config.train.seed), 0, None
  step, state, position = restored
  run.say(f'resuming at step {step}')
  return state, step, position


def _steps(run, train_step, state, batches, checkpoints, writer, step: int) -> Outcome:
  """Runs the remaining steps. Metrics of a step are fetched while the next one runs."""
  config = run.config
  weights = objective.loss_weights(config)
  evaluator = _Evaluator(run)
  bar = _Bar(run, step)
  pending = None
  if _evaluates_at(config, step):
    # The interruption came between this step's checkpoint and its evaluation, or may have.
    writer.write(step, 'valid', evaluator(state.params))
  with _Signals() as signals:
    while step < config.train.num_steps:
      waited = time.perf_counter()
      batch = put_batch(next(batches), run.model)
      waited = time.perf_counter() - waited
      state, step_metrics = train_step(state, batch, weights)
      step += 1
      if pending is not None:
        _report(run, writer, bar, *pending)
      pending = (step, step_metrics, waited)
      stop = signals.should_stop(step, config.train.log_every)
      last = step == config.train.num_steps or stop
      if last or step % config.train.checkpoint_every == 0:
        _report(run, writer, bar, *pending)
        pending = None
        checkpoints.save(step, state, batches.get_state(), config.to_dict())
      if _evaluates_at(config, step) and not stop:
        writer.write(step, 'valid', evaluator(state.params))
      if stop:
        run.say(f'\ninterrupted: saving step {step}')
        break
  bar.close()
  if train_step._cache_size() > 1:
    run.say(f'warning: the step was compiled {train_step._cache_size()} times')
  finished = step == config.train.num_steps
  return Outcome(step, finished, None if finished else signals.received)


def _evaluates_at(config: ml_collections.ConfigDict, step: int) -> bool:
  """Whether the validation split is evaluated after this step."""
  return bool(config.train.eval_every and step and step % config.train.eval_every == 0)


def _report(run, writer, bar, step: int, step_metrics, waited: float) -> None:
  """Writes and shows one step's metrics.

  Raises:
    UserError: if the loss is not finite. No checkpoint is made of such a state.
  """
  record = metrics.step_metrics(step_metrics, run.config.moe.num_selected_experts)
  if not (math.isfinite(record['objective']) and math.isfinite(record['grad_norm'])):
    raise UserError(
      'loss',
      record['objective'],
      f'diverged at step {step} with gradient norm {record["grad_norm"]}: lower '
      'optim.learning_rate or raise optim.warmup_steps; earlier checkpoints are kept',
    )
  rate = bar.update(step, record)
  if step % run.config.train.log_every == 0 or step == run.config.train.num_steps:
    writer.write(step, 'train', record | {'tokens_per_second': rate, 'data_wait': waited})


class _Bar:
  """The progress bar: loss, tokens per second, drop share, time left."""

  def __init__(self, run: _Run, step: int):
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=run.config.train.num_steps,
      initial=step,
      unit='step',
      disable=jax.process_index() != 0,
      mininterval=0.2 if terminal else 10.0,
      dynamic_ncols=True,
    )
    self._last: tuple[int, float] = (step, time.perf_counter())
    self._rate = 0.0

  def update(self, step: int, record: dict[str, Any]) -> float:
    """Shows a step and returns tokens per second, smoothed."""
    before, then = self._last
    now = time.perf_counter()
    rate = record['tokens'] * (step - before) / max(now - then, 1e-9)
    self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
    self._last = (step, now)
    shown = {'loss': f'{record["loss"]:.3f}', 'tok/s': f'{self._rate:,.0f}'}
    if 'router/drop_share' in record:
      shown['drop'] = f'{record["router/drop_share"]:.1%}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(step - self._bar.n)
    return self._rate

  def close(self) -> None:
    self._bar.close()


class _Evaluator:
  """Evaluates on the validation split, with one compiled step for the whole run."""

  def __init__(self, run: _Run):
    self._run = run
    self._step: Any = None
    self._model: Any = None

  def __call__(self, params) -> dict[str, Any]:
    run, config = self._run, self._run.config
    if self._step is None:
      vocab_size = run.dataset.tokenizer.vocab_size
      self._model = build_model(config, run.mesh, vocab_size, 'eval')
      self._step = evaluate.make_eval_step(self._model)
    result = evaluate.evaluate(
      self._step,
      self._model,
      params,
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
  temporary = pathlib.Path(path).with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=2, sort_keys=True), encoding='utf-8')
  temporary.replace(path)
