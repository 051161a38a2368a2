"""The registry as users see it: the command, the table of the README, and a run of every preset."""

import importlib
import json

import numpy as np
import pytest

from configs import presets
from moe_jax import config as schema
from moe_jax import routing
from moe_jax.errors import UserError
from moe_jax.train import accounting, loop, manifest
from moe_jax.train.metrics import read_metrics
from tests import tiny

PRESETS = sorted(p.stem for p in (tiny.REPOSITORY / 'configs' / 'presets').glob('[a-z]*.py'))


def preset(name, base=''):
  return importlib.import_module(f'configs.presets.{name}').get_config(base)


def test_the_command_prints_every_router():
  result = tiny.command('routers', '--json')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert {row['name'] for row in rows} == set(routing.ROUTERS)
  for row in rows:
    router = routing.ROUTERS[row['name']]
    assert (row['causal'], row['learns']) == (router.causal, router.learns)
    if row['preset']:
      assert (tiny.REPOSITORY / row['preset']).exists()
  assert next(row for row in rows if row['name'] == 'loss_free')['state'] == ['bias']


def test_the_table_of_the_readme_is_that_of_the_registry():
  table = tiny.command('routers').out
  assert table.count('\n') == len(routing.ROUTERS) + 2
  readme = (tiny.REPOSITORY / 'README.md').read_text(encoding='utf-8')
  missing = [line for line in table.splitlines() if line not in readme]
  assert not missing, 'put what `python -m moe_jax.routers` prints into README.md'
  assert table in readme


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_fits_every_base(name):
  for base in ('', 'quickstart', 'lm_small'):
    config = preset(name, base)
    if name != 'dense' or not base:
      schema.validate(config)
  with pytest.raises(UserError, match='nonsense'):
    preset(name, 'nonsense')


def test_a_preset_leaves_no_choice_open():
  choices = {name: preset('switch').moe[name] for name in presets.SILENT}
  presets.make('', **choices)
  for name in presets.SILENT:
    with pytest.raises(TypeError, match=f'moe.{name} open'):
      presets.make('', **{key: value for key, value in choices.items() if key != name})


def test_segments_keep_what_is_active():
  config = preset('top_k')
  before = accounting.parameter_counts(config, 258)
  router = config.model.num_layers * config.model.embed_dim * config.moe.num_experts
  presets.segmented(config, 4)
  moe = config.moe
  assert (moe.num_experts, moe.num_selected_experts, moe.mlp_dim) == (32, 8, 8)
  after = accounting.parameter_counts(config, 258)
  assert {name: after[name] - before[name] for name in before} == dict.fromkeys(before, 3 * router)
  with pytest.raises(UserError, match='moe.mlp_dim=8: must be divisible into 3 parts'):
    presets.segmented(config, 3)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_learns(name, text, tmp_path):
  """A few hundred steps: the loss falls far below that of letter frequencies, all is finite."""
  config = preset(name)
  config.data.update(sequence_length=32, **{k[5:]: v for k, v in text.items()})
  config.data.update(valid_fraction=0.2, test_fraction=0.2)
  config.train.update(num_steps=200, checkpoint_every=200, log_every=20)
  schema.validate(config)
  assert loop.train(config, str(tmp_path / 'run')).finished
  facts = manifest.read(tmp_path / 'run')
  assert facts['compilations'] == 1
  assert facts['causal'] == routing.ROUTERS[config.moe.router].causal or (
    config.moe.priority != 'token'
  )
  records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  first, last = records[0], records[-1]
  assert last['step'] == 200
  # Five words of two domains, drawn independently: about 1 nat per letter; letters alone 2.7.
  assert last['loss'] < 1.6 < first['loss']
  for record in records:
    numbers = np.concatenate([np.ravel(value) for k, value in record.items() if k != 'split'])
    assert np.isfinite(numbers.astype(np.float64)).all()
