"""`launch/local`: two processes of four devices do what one process of eight does."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_jax.run import claim, manifest, single
from moe_jax.run.metrics_file import read_metrics
from tests import tiny
from tests.run.test_single import state_of

SETTINGS = {'train.num_steps': 4, 'train.checkpoint_every': 2, 'train.eval_every': 2}
SETTINGS |= {'optim.clip_norm': 1.0, 'optim.momentum': 0.9}
# Long enough to be disturbed.
ENDLESS = {**SETTINGS, 'train.num_steps': 5000, 'train.eval_every': 0}


def start(*arguments, **changes):
  # The number of devices is the launcher's to say.
  variables = {**os.environ, **changes}
  return subprocess.Popen(
    [sys.executable, 'launch/local', *map(str, arguments)],
    cwd=tiny.REPOSITORY,
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*arguments):
  return tiny.finish(start(*arguments))


def children(process):
  """Returns {index in the run: process id} of what the launcher started."""
  found = {}
  for folder in pathlib.Path('/proc').iterdir():
    try:
      parent = (folder / 'stat').read_text().rpartition(')')[2].split()[1]
      variables = (folder / 'environ').read_bytes().split(b'\0')
    except (OSError, IndexError):
      continue
    for variable in variables:
      if parent == str(process.pid) and variable.startswith(b'MOE_JAX_PROCESS_ID='):
        found[int(variable.partition(b'=')[2])] = int(folder.name)
  return found


def wait_for_a_step(process, workdir):
  log = workdir / 'metrics.jsonl'
  size = log.stat().st_size if log.exists() else 0
  while process.poll() is None and not (log.exists() and log.stat().st_size > size):
    time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_are_one(text, tmp_path):
  overrides = {**text, **SETTINGS}
  config, path = tiny.config(overrides), tiny.config_file(tmp_path, overrides)
  workdir, alone = tmp_path / 'two', tmp_path / 'one'
  two = start(
    '--processes=2', '--devices_per_process=4', f'--config={path}', f'--workdir={workdir}'
  )
  assert single.train(config, str(alone)).finished
  result = tiny.finish(two)
  assert result.code == 0, result.err
  facts = manifest.read(workdir)
  assert (facts['status'], facts['devices']['processes']) == ('finished', 2)
  assert facts['devices']['count'] == 8
  records, expected = (read_metrics(d / 'metrics.jsonl') for d in (workdir, alone))
  assert [(r['step'], r['split']) for r in records] == [(r['step'], r['split']) for r in expected]
  for record, other in zip(records, expected, strict=True):
    for name in ('loss', 'objective', 'grad_norm'):
      if name in other:
        np.testing.assert_allclose(record[name], other[name], rtol=1e-5)
    assert record['router/load'] == other['router/load']
  # Written by two, restored by one.
  step, state = state_of(workdir, config)
  assert step == 4
  tiny.assert_close(state.params, state_of(alone, config)[1].params)
  result = tiny.command('evaluate', f'--workdir={workdir}', '--nofigure')
  assert result.code == 0, result.err


@pytest.mark.slow
def test_a_signal_to_one_or_to_all_saves_and_a_killed_process_ends_the_run(text, tmp_path):
  overrides = {**text, **ENDLESS, 'train.checkpoint_every': 5000}
  config, path = tiny.config(overrides), tiny.config_file(tmp_path, overrides)
  workdir = tmp_path / 'two'
  command = (f'--config={path}', f'--workdir={workdir}')
  saved = 0
  for number, to_all in ((signal.SIGTERM, False), (signal.SIGINT, True)):
    process = start(*command)
    wait_for_a_step(process, workdir)
    os.kill(process.pid if to_all else children(process)[1], number)
    result = tiny.finish(process)
    assert result.code == 128 + number, result.err
    assert 'interrupted: saving step' in result.out
    facts = manifest.read(workdir)
    assert facts['status'] == 'interrupted'
    assert state_of(workdir, config)[0] == facts['step'] > saved
    saved = facts['step']
  process = start(*command)
  wait_for_a_step(process, workdir)
  os.kill(children(process)[1], signal.SIGKILL)
  result = tiny.finish(process)
  assert result.code == 128 + signal.SIGKILL, result.err
  assert 'error: process 1 of 2 was killed by signal 9' in result.err
  # Nothing is left running or locked, and nothing is lost.
  assert state_of(workdir, config)[0] == saved
  with claim.claimed(str(workdir)):
    pass


@pytest.mark.slow
def test_a_stopped_process_is_named_in_one_line(text, tmp_path):
  path, workdir = tiny.config_file(tmp_path, {**text, **ENDLESS}), tmp_path / 'two'
  process = start(f'--config={path}', f'--workdir={workdir}', MOE_JAX_PEER_TIMEOUT='20')
  wait_for_a_step(process, workdir)
  os.kill(children(process)[1], signal.SIGSTOP)
  result = tiny.finish(process)
  assert result.code == 75, result.err
  errors = [line for line in result.err.splitlines() if line.startswith('error: ')]
  assert len(errors) == 1 and 'process 1 of 2 does not answer for 20 s' in errors[0]
  assert 'Traceback' not in result.err and 'Fatal' not in result.err
  # Nothing is left running or locked.
  with claim.claimed(str(workdir)):
    pass


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_its_line(text, tmp_path):
  # Only process 0 claims the directory: process 1 would wait for it for ever.
  path = tiny.config_file(tmp_path, {**text, **SETTINGS})
  workdir = tmp_path / 'run'
  with claim.claimed(str(workdir)):
    result = run(f'--config={path}', f'--workdir={workdir}')
  result.assert_error('workdir=', 'another process')
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--processes=0'], ['--processes', "'0'", 'at least 1']),
    (['--devices_per_process=two'], ['--devices_per_process', "'two'"]),
    (['--processes'], ['--processes', 'expected one argument']),
  ],
)
def test_refuses_flags(flags, words):
  run(*flags).assert_error(*words)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('overrides', 'flags', 'words'),
  [
    ({}, ['--config.moe.num_experts=6'], ['mesh.expert=4', 'divide 6']),
    ({'mesh.expert': 2}, [], ['mesh.data=2', 'must be 8', 'all of their devices']),
    ({}, ['--processes=3'], ['mesh.expert=4', 'must be 12']),
  ],
)
def test_refuses_what_training_refuses(text, tmp_path, overrides, flags, words):
  path = tiny.config_file(tmp_path, {**text, **overrides})
  run(*flags, f'--config={path}', f'--workdir={tmp_path / "run"}').assert_error(*words)
  assert not (tmp_path / 'run').exists()
