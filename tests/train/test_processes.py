"""Two processes of four devices do what one process of eight does."""

import signal
import socket
import time

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.parallel.distributed import join_processes
from moe_jax.train import loop, manifest
from moe_jax.train.metrics import read_metrics
from tests import tiny
from tests.train.test_loop import state_of

pytestmark = pytest.mark.slow

SETTINGS = {'train.num_steps': 4, 'train.checkpoint_every': 2, 'train.eval_every': 2}
SETTINGS |= {'optim.clip_norm': 1.0, 'optim.momentum': 0.9}


def _start_two(*arguments):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  place = {'MOE_JAX_COORDINATOR': f'localhost:{port}', 'MOE_JAX_NUM_PROCESSES': '2'}
  return [
    tiny.start('train', *arguments, devices=4, **place, MOE_JAX_PROCESS_ID=str(index))
    for index in range(2)
  ]


def test_two_processes_are_one(text, tmp_path):
  overrides = {**text, **SETTINGS}
  config, path = tiny.config(overrides), tiny.config_file(tmp_path, overrides)
  workdir, alone = tmp_path / 'two', tmp_path / 'one'
  processes = _start_two(f'--config={path}', f'--workdir={workdir}')
  assert loop.train(config, str(alone)).finished
  for process in processes:
    result = tiny.finish(process)
    assert result.code == 0, result.err
  facts = manifest.read(workdir)
  assert (facts['status'], facts['devices']['processes']) == ('finished', 2)
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


def test_sigterm_to_one_makes_both_save_and_exit(text, tmp_path):
  overrides = {**text, **SETTINGS, 'train.num_steps': 5000, 'train.eval_every': 0}
  overrides['train.checkpoint_every'] = 5000
  config, path = tiny.config(overrides), tiny.config_file(tmp_path, overrides)
  workdir = tmp_path / 'two'
  processes = _start_two(f'--config={path}', f'--workdir={workdir}')
  log = workdir / 'metrics.jsonl'
  while processes[1].poll() is None and not (log.exists() and log.stat().st_size):
    time.sleep(0.02)
  processes[1].send_signal(signal.SIGTERM)
  for process in processes:
    result = tiny.finish(process)
    assert result.code == 128 + signal.SIGTERM, result.err
  facts = manifest.read(workdir)
  assert facts['status'] == 'interrupted'
  assert state_of(workdir, config)[0] == facts['step']


@pytest.mark.parametrize(
  ('environment', 'message'),
  [
    ({'MOE_JAX_PROCESS_ID': '0'}, 'MOE_JAX_COORDINATOR=None: must be set'),
    ({'MOE_JAX_COORDINATOR': 'x:1'}, 'MOE_JAX_NUM_PROCESSES=None'),
    (
      {'MOE_JAX_COORDINATOR': 'x:1', 'MOE_JAX_NUM_PROCESSES': '2', 'MOE_JAX_PROCESS_ID': 'one'},
      "MOE_JAX_PROCESS_ID='one'",
    ),
    (
      {'MOE_JAX_COORDINATOR': 'x:1', 'MOE_JAX_NUM_PROCESSES': '2', 'MOE_JAX_PROCESS_ID': '2'},
      'MOE_JAX_PROCESS_ID=2: must be in 0..1',
    ),
  ],
)
def test_a_wrong_place_in_the_run_is_an_error(monkeypatch, environment, message):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError) as caught:
    join_processes()
  assert message in str(caught.value)
