"""Errors where a package that moe_jax needs is not installed."""

import configparser
import os
import re
import subprocess
import sys

import pytest

from moe_jax import installed
from tests import tiny


def test_it_knows_the_packages_of_setup_cfg():
  config = configparser.ConfigParser()
  config.read(tiny.REPOSITORY / 'setup.cfg')
  wanted = config['options']['install_requires'].split()
  assert {re.split('[<>=]', line)[0] for line in wanted} == set(installed.NEEDED.values())


@pytest.mark.parametrize('verb', ['', '.train', '.sweep', '.report', '.runs'])
def test_a_python_without_packages_is_one_error_line(verb):
  """`-S` leaves out everything that was installed."""
  done = subprocess.run(
    [sys.executable, '-S', '-m', f'moe_jax{verb}'],
    cwd=tiny.REPOSITORY,
    env={**os.environ, 'PYTHONPATH': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  result = tiny.Result(done.returncode, done.stdout, done.stderr)
  result.assert_error(
    "package='", sys.executable, 'source .venv/bin/activate', './launch/quickstart'
  )


def test_a_package_that_a_command_needs_later(monkeypatch, tmp_path):
  path = tmp_path / 'study.py'
  path.write_text('import tqdm\n')
  monkeypatch.setitem(sys.modules, 'tqdm', None)
  result = tiny.command('sweep', f'--study={path}', '--dry_run')
  result.assert_error("package='tqdm'", 'pip install -e .')


def test_a_package_that_a_config_file_needs(monkeypatch, tmp_path):
  path = tmp_path / 'config.py'
  path.write_text('import optax\n')
  monkeypatch.setitem(sys.modules, 'optax', None)
  result = tiny.command('train', f'--config={path}', f'--workdir={tmp_path / "run"}')
  result.assert_error("package='optax'", 'source .venv/bin/activate')


def test_other_import_errors_are_not_hidden():
  assert not installed.missing(ImportError('cannot import name', name='jax'))
  for name in ('moe_jax.none', 'jax.none', 'none', None):
    assert not installed.missing(ModuleNotFoundError('No module', name=name))
  for name in ('jax', 'orbax', 'orbax.checkpoint'):
    assert installed.missing(ModuleNotFoundError('No module', name=name))
