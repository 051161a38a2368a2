"""The studies of the repository: every trial is valid, and arms start from the same place."""

import functools
import re

import jax
import numpy as np
import pytest

from experiments.performance import tables
from moe_jax.data import ByteTokenizer
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.results import thin
from moe_jax.sweep import trials
from moe_jax.train.state import init_params
from tests import tiny

STUDIES = sorted((tiny.REPOSITORY / 'experiments').glob('*/study.py'))
RUN = [path for path in STUDIES if (path.parent / 'results.jsonl').exists()]


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.parent.name)
def test_every_trial_is_valid_and_arms_have_equal_compute(path):
  study = trials.load_study(str(path))
  found = trials.trials_of(study)
  assert study.name == path.parent.name
  # What chooses settings looks at no test document, and at no seed of a study.
  if study.split == 'valid':
    assert study.seeds == (100,)
  else:
    assert study.split == 'test' and len(study.seeds) >= 3 and study.comparisons
    assert 100 not in study.seeds
  flops = {trial.arm: trials.training_flops(trial.config) for trial in found}
  # To the router's own matmuls: PROTOCOL.md, point 4.
  assert max(flops.values()) < 1.06 * min(flops.values())


def test_most_studies_have_been_run():
  assert len(RUN) >= 5


@pytest.mark.parametrize('path', RUN, ids=lambda path: path.parent.name)
def test_its_tables_are_those_of_its_results(path, tmp_path):
  folder = path.parent
  flags = f'--study={path}', f'--results={folder / "results.jsonl"}', f'--out={tmp_path / "r"}'
  result = tiny.command('report', *flags, '--nofigures')
  assert result.code == 0, result.err
  names = ('table.md', 'table.tex', 'methods.tex', 'cite.bib', 'scaling.md')
  kept = [name for name in names if (folder / name).exists()]
  assert 'table.md' in kept
  for name in kept:
    assert (tmp_path / 'r' / name).read_text() == (folder / name).read_text(), name


def test_the_performance_tables_are_those_of_the_committed_results():
  readme = (tables.FOLDER / 'README.md').read_text(encoding='utf-8')
  again = tables.with_tables(readme)
  assert again == readme, 'run python -m experiments.performance.tables'
  shown = {name for _, name, _ in tables.SECTIONS}
  assert shown == {path.stem for path in (tables.FOLDER / 'results').iterdir()}


@pytest.mark.parametrize('path', STUDIES, ids=lambda path: path.parent.name)
def test_what_it_commits_is_small_and_shown(path):
  folder = path.parent
  results = folder / 'results.jsonl'
  if results.exists():
    assert results.stat().st_size <= thin.LIMIT
  readme = folder / 'README.md'
  shown = (
    set(re.findall(r'\]\((figures/[^)]+)\)', readme.read_text())) if readme.exists() else set()
  )
  there = {file.relative_to(folder).as_posix() for file in folder.glob('figures/*')}
  assert there == shown


def start_of(overrides):
  config = tiny.config({'mesh.data': 1, 'mesh.expert': 1, 'train.seed': 3, **overrides})
  model = build_task(config, make_mesh(1, 1), ByteTokenizer().vocab_size, 'train', 16)
  return tiny.leaves(jax.jit(functools.partial(init_params, model))(config.train.seed))


def test_arms_of_a_seed_start_from_the_same_values_outside_experts_and_routers():
  arms = [
    start_of(overrides)
    for overrides in (
      {},
      {'moe.num_experts': 16, 'moe.mlp_dim': 8},
      {'moe.router': 'loss_free', 'moe.score': 'sigmoid'},
      {'moe.num_experts': 0},
      {'train.seed': 4},
    )
  ]
  shared = [name for name in arms[0] if "'moe'" not in name]
  assert len(shared) > 6
  for arm in arms[1:4]:
    for name in shared:
      np.testing.assert_array_equal(arm[name], arms[0][name], err_msg=name)
  different = [name for name in shared if not np.array_equal(arms[4][name], arms[0][name])]
  # All but the scales of norms, which start at 1.
  assert len(different) >= len(shared) - 3


def test_the_order_of_the_text_does_not_depend_on_the_arm(text):
  from moe_jax.data import train_iterator
  from moe_jax.run import setup

  dataset = setup.dataset_of(tiny.config(text))
  windows = dataset.windows('train', 16)
  first, again, other = (
    next(train_iterator(windows, batch_size=8, seed=seed, process_index=0, process_count=1))
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first['inputs'], again['inputs'])
  assert not np.array_equal(first['inputs'], other['inputs'])
