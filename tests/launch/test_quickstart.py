"""`launch/quickstart` and the exit codes of its commands; a stand-in for Python logs calls."""

import os
import shutil
import subprocess

import pytest

from tests import tiny

_PYTHON = """#!/usr/bin/env bash
echo "$@" >> calls
case "$*" in *moe_jax.train*) exit "$TRAIN_CODE" ;; esac
"""


@pytest.fixture
def checkout(tmp_path):
  """A checkout whose .venv says that everything is installed."""
  for name in ('launch/quickstart', 'launch/environment.sh', 'setup.cfg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy2(tiny.REPOSITORY / name, tmp_path / name)
  for name, content in (('.venv/bin/python', _PYTHON), ('tools/nvidia-smi', 'exit 1\n')):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o755)
  with open(tmp_path / 'setup.cfg', 'rb') as file:
    checksum = subprocess.check_output('cksum', stdin=file, text=True).strip()
  for extras in ('', 'tpu'):
    (tmp_path / '.venv' / f'installed-{extras}').write_text(f'{checksum} [{extras}] {tmp_path}\n')
  return tmp_path


def quickstart(checkout, *arguments, code=0):
  """Returns (exit code, output, verbs called) of the script when training ends with a code."""
  (checkout / 'calls').unlink(missing_ok=True)
  done = subprocess.run(
    [checkout / 'launch' / 'quickstart', *arguments],
    env={**os.environ, 'PATH': f'{checkout}/tools:{os.environ["PATH"]}', 'TRAIN_CODE': str(code)},
    capture_output=True,
    text=True,
    check=False,
  )
  calls = (checkout / 'calls').read_text().splitlines() if (checkout / 'calls').exists() else []
  verbs = [word.split()[1] for word in calls if word.startswith('-m moe_jax')]
  return done.returncode, done.stdout + done.stderr, [verb.split('.')[1] for verb in verbs]


def test_trains_evaluates_and_samples(checkout):
  code, output, verbs = quickstart(checkout)
  assert (code, verbs) == (0, ['train', 'evaluate', 'generate']), output
  assert 'finished' in output


def test_goes_on_after_an_interruption_and_passes_errors_on(checkout):
  for number in (130, 143):
    code, output, verbs = quickstart(checkout, code=number)
    assert (code, verbs) == (number, ['train'])
    assert 'goes on from here' in output
  for number in (1, 2, 3):
    code, output, verbs = quickstart(checkout, code=number)
    assert (code, verbs) == (number, ['train'])
    assert 'finished' not in output


def test_a_finished_run_is_not_evaluated_again(checkout):
  run = checkout / 'runs' / 'quickstart'
  run.mkdir(parents=True)
  (run / 'manifest.json').write_text('{}')
  (run / 'expert_load.png').write_text('')
  os.utime(run / 'manifest.json', (1, 1))
  code, output, verbs = quickstart(checkout)
  assert (code, verbs) == (0, ['train'])
  assert 'evaluated before' in output
  # Trained further since: the old figure is not of this run.
  os.utime(run / 'expert_load.png', (0, 0))
  assert quickstart(checkout)[2] == ['train', 'evaluate', 'generate']


def test_sets_up_alone(checkout):
  code, output, verbs = quickstart(checkout, '--setup')
  assert (code, verbs) == (0, []) and '.venv/bin/activate' in output
  (checkout / '.venv' / 'installed-').unlink()
  quickstart(checkout, '--setup')
  assert 'pip install' in (checkout / 'calls').read_text()


def test_takes_no_other_argument(checkout):
  code, output, verbs = quickstart(checkout, '--config=mine.py')
  assert (code, verbs) == (2, [])
  assert output.startswith('error: argument=--config=mine.py')
