"""`python -m moe_jax.routers new NAME`: three files that pass the tests as they stand."""

import os
import shutil
import subprocess
import sys

import pytest

from moe_jax import routers
from moe_jax.errors import UserError
from tests import tiny

# All that is about one router and takes seconds: its own tests, its options, its preset, the layer.
_TESTS = (
  'tests/routing/routers/test_nearest.py',
  'tests/test_config.py',
  'tests/test_routers.py',
  'tests/test_router_options.py',
  'tests/test_unread.py',
  'tests/train/test_causal_claim.py',
  'tests/layers/test_every_router.py',
)
# Of the layer, the mesh and the gradients: each of the others compiles a program of its own.
_SELECTED = (
  'nearest and not every_dispatcher and not mesh1 and not mesh2 and not not_a_number',
  'as_reviewed or list_of_fields or table_of_the_readme or tests_of_its_own',
)


@pytest.mark.slow
def test_the_template_passes_the_tests_as_it_stands(tmp_path):
  for name in ('moe_jax', 'configs', 'tests'):
    leave = shutil.ignore_patterns('__pycache__', 'runs')
    shutil.copytree(tiny.REPOSITORY / name, tmp_path / name, ignore=leave)
  for name in ('setup.cfg', '.ruff.toml'):
    shutil.copy(tiny.REPOSITORY / name, tmp_path)
  (tmp_path / 'experiments').symlink_to(tiny.REPOSITORY / 'experiments')
  selected = ' or '.join(f'({words})' for words in _SELECTED)
  script = [
    'python -m moe_jax.routers new nearest',
    'python -m tests.golden.regenerate',
    'python -m ruff format --check configs moe_jax tests',
    'python -m ruff check configs moe_jax tests',
    f'python -m pytest --durations=10 -m "not all" -k "{selected}" {" ".join(_TESTS)}',
  ]
  done = subprocess.run(
    ['bash', '-c', ' && '.join(script).replace('python', sys.executable)],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(tmp_path), 'PYTEST_ADDOPTS': ''},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert 'configs/presets/nearest.py' in done.stdout
  table = (tmp_path / 'moe_jax' / 'routing' / 'README.md').read_text(encoding='utf-8')
  assert '\n| `nearest` | K largest logits; ' in table


@pytest.mark.parametrize(
  ('words', 'reason'),
  [
    (['top_k'], "new='top_k': moe_jax/routing/routers/top_k.py is there already"),
    (['switch'], "new='switch': configs/presets/switch.py is there already"),
    (['Nearest'], "new='Nearest': must be a name in Python"),
    (['../near'], "new='../near': must be a name in Python"),
    (['lambda'], "new='lambda': must be a name in Python"),
    (['a' * 25], 'must have at most 24 letters'),
    ([], "new='': must have one name"),
    (['near', 'far'], "new='near far': must have one name"),
    (['near', '--json'], "new='near': must have one name, and no flags"),
  ],
)
def test_what_is_no_new_router_is_an_error_line(words, reason):
  tiny.command('routers', 'new', *words).assert_error(reason)


def test_an_installed_package_is_no_place_for_a_router(tmp_path):
  (tmp_path / 'moe_jax' / 'routing' / 'routers').mkdir(parents=True)
  with pytest.raises(UserError, match=r"new='nearest': needs a checkout, .* is none"):
    routers.new('nearest', tmp_path)
  assert not list(tmp_path.rglob('*.py'))


def test_no_name_makes_a_line_too_long_and_nothing_is_overwritten(tmp_path):
  for folder in ('moe_jax/routing/routers', 'tests/routing/routers', 'configs/presets'):
    (tmp_path / folder).mkdir(parents=True)
  for name in ('n', 'n' * 24):
    paths = [tmp_path / path for path in routers.new(name, tmp_path)]
    texts = [path.read_text(encoding='utf-8') for path in paths]
    assert not any('$' in text for text in texts)
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100
    paths[0].unlink()
    with pytest.raises(UserError, match='is there already; nothing was written'):
      routers.new(name, tmp_path)
    assert not paths[0].exists()
