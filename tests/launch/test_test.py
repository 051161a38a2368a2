"""Commands of `launch/test` and its exit code; stand-ins for Python and linters log their calls."""

import os
import shutil
import subprocess

import pytest

from tests import tiny

# Each writes what it was called with, and ends with the code in the variable of its name.
_STAND_IN = """#!/usr/bin/env bash
case "$*" in *sched_getaffinity*) echo 2; exit ;; -c*) exit ;; esac
echo "$(basename "$0") $*" >> calls
name=$(basename "$0" | tr - _)_code
exit "${!name:-0}"
"""
_LINT = ['ruff check .', 'ruff format --check .', 'mypy ', 'lint-imports ']


@pytest.fixture
def checkout(tmp_path):
  """A checkout whose .venv says that everything is installed."""
  for name in ('launch/test', 'launch/environment.sh', 'setup.cfg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy2(tiny.REPOSITORY / name, tmp_path / name)
  for name in ('python', 'ruff', 'mypy', 'lint-imports', 'chromium', 'chromedriver'):
    path = tmp_path / ('tools' if 'chrom' in name else '.venv/bin') / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_STAND_IN)
    path.chmod(0o755)
  (tmp_path / 'tools' / 'nvidia-smi').write_text('exit 1\n')
  for name in ('a/test_one.py', 'a/test_two.py', 'test_three.py'):
    (tmp_path / 'tests' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'tests' / name).touch()
  with open(tmp_path / 'setup.cfg', 'rb') as file:
    checksum = subprocess.check_output('cksum', stdin=file, text=True).strip()
  for extras in ('test', 'test,tpu'):
    (tmp_path / '.venv' / f'installed-{extras}').write_text(f'{checksum} [{extras}] {tmp_path}\n')
  return tmp_path


def run(checkout, *arguments, **codes):
  """Returns (exit code, calls, output) of the script when tools end with the given codes."""
  (checkout / 'calls').unlink(missing_ok=True)
  done = subprocess.run(
    [checkout / 'launch' / 'test', *arguments],
    env={
      **os.environ,
      'PATH': f'{checkout}/tools:{os.environ["PATH"]}',
      **{f'{name}_code': str(code) for name, code in codes.items()},
    },
    capture_output=True,
    text=True,
    check=False,
  )
  calls = (checkout / 'calls').read_text().splitlines() if (checkout / 'calls').exists() else []
  return done.returncode, calls, done.stdout + done.stderr


def test_everything_is_tests_then_lint(checkout):
  pytest_call = 'python -m pytest -n 2 --dist loadfile'
  most = f'{pytest_call} -m not all'
  assert run(checkout)[:2] == (0, [most, *_LINT])
  assert run(checkout, '--all')[:2] == (0, [pytest_call, *_LINT])
  fast = f'{pytest_call} -m not slow'
  assert run(checkout, '--fast')[:2] == (0, [f'{fast} and not all', *_LINT])
  assert run(checkout, '--fast', '--all')[:2] == (0, [fast, *_LINT])
  # Words for pytest alone choose among all files.
  assert run(checkout, '-k', 'name')[:2] == (0, [f'{most} -k name', *_LINT])


def test_either_fails_all_and_neither_hides_the_other(checkout):
  for code in (1, 2, 5):
    found, calls, _ = run(checkout, python=code)
    assert (found, calls[1:]) == (code, _LINT)
    assert run(checkout, python=code, ruff=1)[0] == code
  for tool in ('ruff', 'mypy', 'lint_imports'):
    found, calls, _ = run(checkout, **{tool: 1})
    assert (found, calls[1:]) == (1, _LINT), tool


def test_paths_are_tested_at_once_without_lint(checkout):
  one, two = 'tests/a/test_one.py', 'tests/test_three.py::test_x'
  call = 'python -m pytest -n {} --dist loadfile -m not all {}'.format
  assert run(checkout, one, ruff=1)[:2] == (0, [call(0, one)])
  assert run(checkout, f'./{one}', ruff=1)[:2] == (0, [call(0, one)])
  # One test by its name runs whatever its mark.
  named = call(0, f'{two} -x').replace('-m not all ', '')
  assert run(checkout, two, '-x')[:2] == (0, [named])
  assert run(checkout, one, 'tests/a/test_two.py')[:2] == (
    0,
    [call(2, f'{one} tests/a/test_two.py')],
  )
  assert run(checkout, 'tests/a', '--fast')[:2] == (
    0,
    [call(2, 'tests/a').replace('not all', 'not slow and not all')],
  )
  assert run(checkout, one, python=1)[0] == 1
  code, calls, output = run(checkout, 'tests/a/test_none.py')
  assert (code, calls) == (2, []) and output.startswith('error: path=tests/a/test_none.py')


def test_lint_alone(checkout):
  assert run(checkout, '--lint')[:2] == (0, _LINT)
  for tool in ('ruff', 'mypy', 'lint_imports'):
    assert run(checkout, '--lint', **{tool: 1})[:2] == (1, _LINT)
  code, calls, output = run(checkout, '--lint', 'tests/a')
  assert (code, calls) == (2, []) and output.startswith('error: --lint')


def test_a_browser_is_looked_for_only_where_a_test_drives_it(checkout):
  for name in ('chromium', 'chromedriver'):
    (checkout / 'tools' / name).unlink()
  with open(checkout / 'launch' / 'environment.sh', 'a') as file:
    file.write('prepare_browser() { fail browser; }\n')
  assert run(checkout)[0] == 0
  (checkout / 'tests' / 'a' / 'test_page_browser.py').touch()
  assert 'error: browser' in run(checkout)[2]
  assert 'error: browser' in run(checkout, 'tests/a')[2]
  assert 'error: browser' in run(checkout, 'tests/a/test_page_browser.py::test_x')[2]
  assert run(checkout, 'tests/a/test_one.py')[0] == 0
  assert run(checkout, '--fast')[0] == 0
