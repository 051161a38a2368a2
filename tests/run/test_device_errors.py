"""Devices that run out of memory, and processes that are gone: one line that says what to do."""

import dataclasses

import jax
import pytest

from moe_jax.errors import UserError
from moe_jax.results import evaluation
from moe_jax.run import device_errors, manifest, packed, restore, single
from moe_jax.study import Study, product
from moe_jax.sweep import outcome, runner, trials
from tests import tiny

DENSE = {'moe.num_experts': 0, 'mesh.data': 1, 'mesh.expert': 1, 'train.num_steps': 2}
SAID = 'RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.'


class Exhausted:
  """A step for which there is not enough memory."""

  def __init__(self, error):
    self._error = error

  def _cache_size(self):
    return 1

  def __call__(self, *arguments):
    raise self._error


@pytest.fixture
def exhausted(monkeypatch):
  """Makes every step raise an error."""

  def make(error):
    for module in (single, packed):
      monkeypatch.setattr(module, 'step_of', lambda *arguments, **more: Exhausted(error))

  return make


def test_the_fields_to_change_are_named():
  config = tiny.config()
  with (
    pytest.raises(UserError, match='data.batch_size=16: out of memory; lower it') as caught,
    device_errors.explained(config, 3),
  ):
    raise jax.errors.JaxRuntimeError(f'{SAID}\n{"x" * 1000}')
  for words in (
    'data.sequence_length=16',
    'model.embed_dim=16',
    'moe.num_experts=8',
    'train.accumulation_steps=1',
    'set model.remat=True',
    'fewer than 3 (--pack)',
    '68719476736',
  ):
    assert words in str(caught.value)
  assert len(str(caught.value)) < 700 and '\n' not in str(caught.value)
  config.model.remat, config.moe.num_experts = True, 0
  with pytest.raises(UserError) as caught, device_errors.explained(config):
    raise jax.errors.JaxRuntimeError(SAID)
  for words in ('moe.', 'model.remat', '--pack'):
    assert words not in str(caught.value)


@pytest.mark.parametrize(
  'error',
  [
    jax.errors.JaxRuntimeError('INTERNAL: something else'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: No space left on device'),
    jax.errors.JaxRuntimeError('Gloo is nothing where there is one process'),
    RuntimeError(SAID),
    MemoryError(),
  ],
)
def test_every_other_error_stays_what_it_is(error):
  with pytest.raises(type(error)) as caught, device_errors.explained(tiny.config()):
    raise error
  assert caught.value is error


def test_training_ends_in_one_line(text, tmp_path, exhausted):
  path, workdir = tiny.config_file(tmp_path, {**text, **DENSE}), tmp_path / 'run'
  exhausted(jax.errors.JaxRuntimeError(SAID))
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 2 and 'Traceback' not in result.err, result.err
  (line,) = [line for line in result.err.splitlines() if 'error' in line]
  assert line.startswith('error: data.batch_size=16: out of memory; lower it') and SAID in line
  # As after a kill: the same command goes on, on a larger machine.
  assert manifest.read(workdir)['status'] == 'running'


@pytest.mark.parametrize(
  ('verb', 'flags', 'module', 'words'),
  [
    (
      'evaluate',
      ('--mesh=data=1,expert=1',),
      evaluation,
      "--mesh='data=1,expert=1': out of memory; give a mesh of more devices",
    ),
    (
      'generate',
      ('--prompt=a', '--num_tokens=9'),
      restore,
      '--num_tokens=9: out of memory; lower it, give fewer --prompt at a time',
    ),
  ],
)
def test_what_reads_a_run_ends_in_one_line_too(verb, flags, module, words, tmp_path, monkeypatch):
  def fail(*args):
    raise jax.errors.JaxRuntimeError(f'{SAID}\n{"x" * 1000}')

  monkeypatch.setattr(module, 'restore_run', fail)
  tiny.command(verb, f'--workdir={tmp_path}', *flags).assert_error(words, SAID)


def test_a_trial_of_a_sweep_says_it_too(text, tmp_path, exhausted):
  base = tiny.config({**text, **DENSE, 'optim.name': 'sgd'})
  study = Study('s', 'Is there room?', base, product({'optim.learning_rate': (0.1, 0.2)}), (0,))
  found = trials.trials_of(dataclasses.replace(study, evaluations=('dropless',)))
  exhausted(jax.errors.JaxRuntimeError(SAID))
  counts = runner.run(study, found, str(tmp_path), lambda line: None, pack=2)
  assert counts.failed == 2
  for trial in found:
    reason = outcome.read(tmp_path, trial.id)['reason']
    assert reason.startswith('UserError: data.batch_size=16: out of memory; lower it')
  # The pack was tried first.
  log = (tmp_path / 'logs' / f'{found[0].id}.txt').read_text()
  assert 'pack fewer than 2 (--pack)' in log


def test_a_process_that_was_killed_ends_the_others_in_one_line(monkeypatch, capsys):
  class Ended(BaseException):
    pass

  def end(code):
    raise Ended(code)

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(device_errors.watch.os, '_exit', end)
  said = 'UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:19343: Connection reset by peer'
  with pytest.raises(Ended, match='75'), device_errors.explained(tiny.config()):
    raise jax.errors.JaxRuntimeError(said)
  assert capsys.readouterr().err.strip() == (
    'error: another of the 2 processes has ended, or its machine is lost; the same command goes on '
    'from the last checkpoint'
  )
