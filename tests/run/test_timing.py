"""Times of a run by a clock that is given, on a device that works while the host goes on."""

import contextlib
import os
import signal
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.run import callbacks, manifest, profile, progress, single, timing
from moe_jax.run.metrics_file import read_metrics
from moe_jax.train.state import TrainState
from tests import tiny

TOKENS, STEP = 256, 0.256  # 1,000 tokens per second.
PREPARE, COMPILE, EVALUATE, SAVE = 11.0, 30.0, 7.0, 3.0
TRACE = (20.0, 2.0, 5.0, 40.0)  # Compiling, beginning, ending, reading.


class Machine:
  """A clock and a device. What is started ends later; who waits, waits for all of it."""

  def __init__(self):
    self.now, self.busy_until = 100.0, 0.0

  def work(self, seconds):
    """Passes time on the host."""
    self.now += seconds

  def start(self):
    """Puts a step on the device, behind those before; returns when it will have ended."""
    self.busy_until = max(self.now, self.busy_until) + STEP
    return self.busy_until

  def wait(self, until=None):
    self.now = max(self.now, self.busy_until if until is None else until)


class Step:
  """A compiled step that takes its time on the machine, as its result says."""

  def __init__(self, machine):
    self._machine, self._compiled = machine, 0

  def _cache_size(self):
    return self._compiled

  def __call__(self, state, batch, hyperparameters):
    if not self._compiled:
      self._machine.work(COMPILE)
      self._compiled = 1
    return self._run(state)

  def _run(self, state, *arguments):
    end = self._machine.start()
    ready = types.SimpleNamespace(is_ready=lambda: False)
    return state._replace(step=state.step + 1), types.SimpleNamespace(end=end, grad_norm=ready)

  def lower(self, *arguments):
    return self

  def compile(self):
    self._machine.work(TRACE[0])
    run = lambda *arguments: self._run(*arguments)  # noqa: E731
    run.as_text = lambda: ''
    return run


@pytest.fixture
def machine(monkeypatch):
  """Puts the machine in the place of everything that takes time."""
  machine = Machine()

  def new_state(*arguments):
    machine.work(PREPARE)
    return TrainState(jnp.int32(0), {'w': jnp.ones(2)}, {}, {}, {}, jnp.int32(0))

  def abstract(model, optimizer):
    place = jax.sharding.NamedSharding(model.mesh, jax.sharding.PartitionSpec())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(shape, new_state())

  def step_metrics(metrics, num_ranks):
    machine.wait(metrics.end)
    return {'loss': 1.0, 'tokens': TOKENS}

  def evaluate(*arguments, **more):
    machine.wait()
    machine.work(EVALUATE)
    return {'split': 'valid', 'loss': 2.0, 'tokens': 10}

  save = single.Checkpoints.save

  def slow_save(*arguments):
    machine.wait()
    machine.work(SAVE)
    save(*arguments)

  @contextlib.contextmanager
  def traced(*arguments):
    machine.work(TRACE[1])
    yield
    machine.work(TRACE[2])

  monkeypatch.setattr(single, 'step_of', lambda *arguments: Step(machine))
  monkeypatch.setattr(single, 'init_state', new_state)
  monkeypatch.setattr(single, 'abstract_state', abstract)
  monkeypatch.setattr(single, 'with_token_counts', lambda state, *arguments: state)
  monkeypatch.setattr(callbacks.metrics, 'step_metrics', step_metrics)
  monkeypatch.setattr(callbacks, 'not_finite', lambda *arguments: None)
  monkeypatch.setattr(callbacks.evaluate, 'evaluate', evaluate)
  monkeypatch.setattr(single.Checkpoints, 'save', slow_save)
  waits = types.SimpleNamespace(block_until_ready=lambda x: machine.wait())
  monkeypatch.setattr(profile, 'jax', waits)
  monkeypatch.setattr(profile.profiling, 'traced', traced)
  monkeypatch.setattr(
    profile.profiling, 'write_table', lambda *arguments: machine.work(TRACE[3]) or 'table'
  )
  return machine


def lines_of(workdir, split):
  """Returns {step: what is timed} of the lines of a split."""
  timed = ('tokens_per_second', *(f'seconds_{phase}' for phase in timing.PHASES))
  return {
    record['step']: {name: pytest.approx(record[name]) for name in timed if name in record}
    for record in read_metrics(workdir / 'metrics.jsonl')
    if record['split'] == split
  }


def test_tokens_per_second_are_those_of_training_alone(machine, text, tmp_path):
  settings = {'train.num_steps': 12, 'train.log_every': 2}
  settings |= {'train.checkpoint_every': 4, 'train.eval_every': 3}
  config, workdir = tiny.config({**text, **settings}), tmp_path / 'run'
  said, phases = [], []

  def stop_at_7(step):
    if step == 7:
      os.kill(os.getpid(), signal.SIGTERM)

  listener = progress.Listener(said.append, stop_at_7, phases.append)
  trace = str(tmp_path / 'trace')
  done = single.train(config, str(workdir), listener, trace, clock=lambda: machine.now)
  assert (done.step, done.finished) == (7, False)
  rate = {'tokens_per_second': 1000}
  # Steps 3, 4 and 5 are traced. Checkpoints after 4 and 7, evaluations after 3 and 6.
  # The line of step 2 is written when step 3 was begun, and with it the trace.
  begun = {'seconds_preparing': PREPARE, 'seconds_compiling': COMPILE}
  train = {
    2: rate | begun | {'seconds_tracing': TRACE[0] + TRACE[1]},
    4: rate,
    6: rate | {'seconds_tracing': TRACE[2] + TRACE[3], 'seconds_saving': SAVE},
  }
  valid = {step: {'seconds_evaluating': EVALUATE} for step in (3, 6)}
  assert lines_of(workdir, 'train') == train
  assert lines_of(workdir, 'valid') == valid
  seconds = {'preparing': PREPARE, 'compiling': COMPILE, 'tracing': sum(TRACE)}
  seconds |= {'evaluating': 2 * EVALUATE, 'saving': 2 * SAVE, 'training': 7 * STEP}
  assert manifest.read(workdir)['seconds'] == pytest.approx(seconds)
  assert sum(seconds.values()) == pytest.approx(machine.now - 100)
  # What the terminal says meanwhile, so that no wait is silent.
  expected = [
    'preparing model and state',
    'compiling the training step',
    'compiled in 30.0 s; training',
    'step 3: evaluating',
    'step 3: validation loss 2.0000, evaluated in 7.0 s',
    'step 4: saving',
    'step 6: evaluating',
    'step 6: validation loss 2.0000, evaluated in 7.0 s',
    'step 7: saving',
    'interrupted: saving step 7',
  ]
  assert [line for line in said if line in expected] == expected
  assert [phase for phase in phases if phase != 'training'] == [
    *('compiling', 'tracing', 'evaluating', 'saving', 'tracing', 'evaluating', 'saving', 'saving')
  ]

  said.clear()
  assert single.train(config, str(workdir), listener, clock=lambda: machine.now).finished
  # One step since it went on; nothing of what came before counts.
  train[8] = rate | begun
  train[10] = rate | {'seconds_saving': SAVE}
  train[12] = rate
  assert lines_of(workdir, 'train') == train
  assert lines_of(workdir, 'valid') == valid | {
    step: {'seconds_evaluating': EVALUATE} for step in (9, 12)
  }
  assert 'resuming at step 7' in said
  facts = manifest.read(workdir)
  assert facts['resumed_from'][0]['seconds'] == pytest.approx(seconds)
  seconds = {'preparing': PREPARE, 'compiling': COMPILE, 'tracing': 0}
  seconds |= {'evaluating': 2 * EVALUATE, 'saving': 2 * SAVE, 'training': 5 * STEP}
  assert facts['seconds'] == pytest.approx(seconds)


def test_a_phase_within_another_has_its_own_time():
  clock, phases = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0]), []
  timer = timing.Timer(phases.append, lambda: next(clock))
  with timer.phase('saving'), timer.phase('evaluating'):
    pass
  # Preparing 0-1 and 10-15, saving 1-3 and 6-10, evaluating 3-6.
  assert timer.take('saving', 'evaluating') == {'seconds_saving': 6, 'seconds_evaluating': 3}
  assert phases == ['saving', 'evaluating', 'saving', 'preparing']
  assert timer.take('saving') == {}
  assert timer.seconds()['preparing'] == 1 + 18


def test_the_time_left_is_judged_without_pauses(monkeypatch):
  bar = progress.ProgressBar(10, 0)
  start, shown = bar._bar.start_t, bar._bar.last_print_t
  clock = iter([100.0, 130.0, 150.0, 157.0])
  monkeypatch.setattr(progress, 'time', types.SimpleNamespace(time=lambda: next(clock)))
  for phase in ('compiling', 'training', 'saving', 'training'):
    bar.show_phase(phase)
  # Paused 100-130 and 150-157.
  assert bar._bar.start_t == pytest.approx(start + 37)
  assert bar._bar.last_print_t == pytest.approx(shown + 37)
  bar.close()
  bar.show_phase('saving')
