"""Shared parts of the tests of training and commands: a tiny config, text, batches, commands."""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import random
import runpy
import subprocess
import sys
import warnings

import absl.app  # noqa: F401  Defines flags, which must outlive the first command.
import grain  # noqa: F401  As well.
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import flagsaver

from configs import debug
from moe_jax import config as schema
from moe_jax import optim
from moe_jax.data import open_dataset
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train import program
from moe_jax.train.hyperparameters import hyperparameters_of
from moe_jax.train.state import TrainState, init_average_load, init_params, state_shardings
from moe_jax.train.step import make_gradient, make_train_step, put_batch

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
VOCAB_SIZE = 258
_WORDS = ('the', 'sea', 'and', 'sky', 'were', 'one', 'grey', 'wall', 'of', 'rain', 'that', 'night')


def config(overrides: dict | None = None):
  """Returns a config whose step takes milliseconds; `overrides` are {'moe.num_experts': 4, ...}."""
  result = debug.get_config()
  result.model.update(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=32)
  result.moe.update(num_experts=8, mlp_dim=16)
  result.mesh.update(data=2, expert=4)
  result.data.update(sequence_length=16, batch_size=16, valid_fraction=0.2, test_fraction=0.2)
  result.optim.update(name='sgd', learning_rate=0.1, warmup_steps=0, schedule='constant')
  result.optim.update(momentum=0.0, weight_decay=0.0, clip_norm=0.0)
  result.train.update(num_steps=6, checkpoint_every=3, log_every=1, eval_every=0)
  for name, value in (overrides or {}).items():
    room, field = name.split('.')
    result[room][field] = value
  if result.optim.name in ('adamw', 'adafactor'):
    # They don't read it, and `train` refuses what nothing reads.
    result.optim.momentum = schema.get_config().optim.momentum
  schema.validate(result)
  return result


def write_text(folder, documents=6, words=60):
  """Writes two domains of small documents; the same text for the same arguments."""
  for domain in ('prose', 'verse'):
    (folder / domain).mkdir(parents=True, exist_ok=True)
    for number in range(documents):
      rng = random.Random(f'{domain}{number}')
      text = ' '.join(rng.choices(_WORDS, k=words + 7 * number))
      (folder / domain / f'{number}.txt').write_text(f'{text}.\n', encoding='utf-8')
  return folder


@functools.cache
def prepared_text(base):
  """Returns the config overrides of a text of two domains, prepared once in a folder."""
  folder = base / 'prepared_text'
  name, data_dir = f'text:{write_text(folder / "text")}', str(folder / 'data')
  open_dataset(name, data_dir=data_dir, valid_fraction=0.2, test_fraction=0.2)
  return {'data.name': name, 'data.data_dir': data_dir}


def batch(batch_size, length, seed=0, vocab_size=VOCAB_SIZE, padded=True):
  """Returns random rows of two documents each and, if padded, padding of a different length."""
  rng = np.random.default_rng(seed)
  rows = {
    'inputs': rng.integers(0, vocab_size, (batch_size, length)),
    'targets': rng.integers(0, vocab_size, (batch_size, length)),
  }
  cell = np.arange(length)[None]
  cut = rng.integers(1, length, (batch_size, 1))
  end = rng.integers(1, length + 1, (batch_size, 1)) if padded else np.full((batch_size, 1), length)
  rows['segment_ids'] = np.where(cell < end, 1 + (cell >= cut), 0)
  rows['positions'] = np.where(cell < cut, cell, cell - cut)
  return {name: np.asarray(value, np.int32) for name, value in rows.items()}


class Trainer:
  """Task, state and compiled functions of a config, without data, files or loop."""

  def __init__(self, config, mesh):
    self.mesh = make_mesh(*mesh)
    self.hyperparameters = hyperparameters_of(config)
    steps = config.train.accumulation_steps
    self.task = build_task(config, self.mesh, VOCAB_SIZE, 'train', config.data.batch_size // steps)
    self.optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
    schedule = optim.make_schedule(config.optim, config.train.num_steps)
    how = (steps, program.accumulation_scope(config), config.moe.layer_reduction)
    self._make_step = lambda: make_train_step(
      self.task, self.optimizer, schedule, *how, config.train.load_decay
    )
    self._gradient = jax.jit(make_gradient(self.task, *how))
    self._shardings = state_shardings(self.task, self.optimizer)
    params = _initial_params(config.model.embed_dim, config.moe.router)
    router_state = self.task.init_router_state()
    opt_state = self.optimizer.init(params)
    load = init_average_load(self.task)
    state = TrainState(np.int32(0), params, opt_state, router_state, load, np.int32(0))
    self._initial = jax.device_get(state)
    self.reset()

  def reset(self):
    """Goes back to the state before the first step."""
    self.state = jax.device_put(self._initial, self._shardings, may_alias=False)

  @functools.cached_property
  def step(self):
    """The compiled step."""
    return self._make_step()

  def __call__(self, rows, weights):
    """Does one step on NumPy rows and returns its metrics."""
    with jax.set_mesh(self.mesh):
      hyperparameters = self.hyperparameters._replace(weights=weights)
      self.state, metrics = self.step(self.state, put_batch(rows, self.task), hyperparameters)
    return metrics

  def gradient(self, rows, weights):
    """Returns (gradient, parts) of the objective at the present parameters."""
    with jax.set_mesh(self.mesh):
      batch = put_batch(rows, self.task)
      state = self.state
      return self._gradient(state.params, state.router_state, batch, jax.random.key(0), weights)


@functools.cache
def _initial_params(embed_dim, router):
  """The parameters of every trainer of that width: they depend on neither mesh nor optimizer."""
  overrides = {'mesh.data': 1, 'mesh.expert': 1, 'model.embed_dim': embed_dim}
  overrides |= {'moe.router': router}
  model = build_task(config(overrides), make_mesh(1, 1), VOCAB_SIZE, 'eval')
  return jax.device_get(jax.jit(lambda: init_params(model, jnp.int32(0)))())


@functools.cache
def _trainer(overrides, mesh):
  return Trainer(config(dict(overrides)), mesh)


def trainer(overrides=None, mesh=(1, 1)):
  """Returns a trainer before its first step; each is compiled once for all tests."""
  if mesh == (1, 1):
    overrides = {'mesh.data': 1, 'mesh.expert': 1, **(overrides or {})}
  result = _trainer(tuple(sorted((overrides or {}).items())), mesh)
  result.reset()
  return result


def leaves(tree):
  """Returns {path: NumPy array} of a tree of arrays."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf)) for path, leaf in flat}


def assert_equal(tree, other):
  """Asserts that two trees hold the same bits."""
  one, two = leaves(tree), leaves(other)
  assert one.keys() == two.keys()
  for name, value in one.items():
    np.testing.assert_array_equal(value, two[name], err_msg=name, strict=True)


def assert_close(tree, other, relative=1e-5):
  """Asserts that each array differs by at most `relative` of its own largest value."""
  one, two = leaves(tree), leaves(other)
  assert one.keys() == two.keys()
  for name, value in one.items():
    scale = np.max(np.abs(value), initial=1e-12)
    np.testing.assert_allclose(value / scale, two[name] / scale, atol=relative, err_msg=name)


def snapshot(folder):
  """Returns {relative path: hash of the content} of everything below a folder."""
  found = {}
  for path in sorted(pathlib.Path(folder).rglob('*')):
    content = path.read_bytes() if path.is_file() else b'folder'
    found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
  return found


class Result:
  """Outcome of a command."""

  def __init__(self, code, out, err):
    self.code, self.out, self.err = code, out, err

  def assert_error(self, *words, code=2):
    """Asserts one `error:` line that holds the words, no traceback, and the exit code."""
    assert self.code == code, self.err
    assert 'Traceback' not in self.err
    lines = [line for line in self.err.splitlines() if line.startswith('error: ')]
    # The data room says on stderr what it prepares; nothing else may stand there.
    others = [line for line in self.err.splitlines() if not line.startswith(('error: ', 'data: '))]
    assert len(lines) == 1 and not others, self.err
    for word in words:
      assert word in lines[0], lines[0]


def command(verb, *arguments):
  """Runs `python -m moe_jax.VERB ARGUMENTS` within this process."""
  name = 'moe_jax.train.__main__' if verb == 'train' else f'moe_jax.{verb}'
  out, err, argv = io.StringIO(), io.StringIO(), sys.argv
  hooks = sys.unraisablehook, sys.excepthook
  sys.argv = [verb, *map(str, arguments)]
  # runpy would keep the code that the type checks of the tests are in, for other processes to find.
  writes_no_code, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  # The config file that an earlier command loaded under this name.
  sys.modules.pop('config_config', None)
  code = 0
  try:
    with contextlib.ExitStack() as stack:
      # Forgets the flags that the command defines. (So no test may import a command itself.)
      stack.enter_context(flagsaver.flagsaver())
      stack.enter_context(contextlib.redirect_stdout(out))
      stack.enter_context(contextlib.redirect_stderr(err))
      # A shell does not turn other packages' warnings into errors.
      stack.enter_context(warnings.catch_warnings())
      warnings.simplefilter('ignore')
      runpy.run_module(name, run_name='__main__')
  except SystemExit as end:
    code = end.code or 0
  finally:
    sys.argv = argv
    sys.dont_write_bytecode = writes_no_code
    sys.unraisablehook, sys.excepthook = hooks
  return Result(code, out.getvalue(), err.getvalue())


def start(verb, *arguments, devices=8, **environment):
  """Starts `python -m moe_jax.VERB ARGUMENTS` as a process of its own."""
  xla_flags = os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}')
  variables = {**os.environ, 'XLA_FLAGS': xla_flags, **environment}
  variables['TF_CPP_MIN_LOG_LEVEL'] = '2'
  return subprocess.Popen(
    [sys.executable, '-m', f'moe_jax.{verb}', *map(str, arguments)],
    cwd=REPOSITORY,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, timeout=180):
  """Waits for a started command."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f'not finished after {timeout} s\n{out}\n{err}') from None
  return Result(process.returncode, out, err)


def config_file(folder, overrides=None):
  """Writes a config file that gives `config(overrides)`; returns its path."""
  path = folder / 'tiny_config.py'
  path.write_text(
    'from moe_jax import config\n\n\ndef get_config():\n  result = config.get_config()\n'
    f'  result.update({config(overrides).to_dict()!r})\n  return result\n',
    encoding='utf-8',
  )
  return path


def cross_entropy_sum(logits, targets, segment_ids):
  """Nats summed over tokens that are not padding, from all logits at once: an oracle, by Optax."""
  per_token = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(jnp.where(segment_ids > 0, per_token, 0.0))
