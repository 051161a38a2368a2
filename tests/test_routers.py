"""The registry as users see it: the command, the table of the README, and a run of every preset."""

import dataclasses
import functools
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from moe_jax import config as schema
from moe_jax import routing
from moe_jax.errors import UserError
from moe_jax.run import manifest, single
from moe_jax.run.metrics_file import read_metrics
from moe_jax.schema import ROUTER_FIELDS
from moe_jax.train import accounting
from tests import tiny
from tests.golden import regenerate

# All that is watched of every router, also of a loss whose weight is 0.
WATCHED = {
  *('load_balancing_loss', 'z_loss', 'importance_loss', 'device_balance_loss', 'own_loss'),
  *('drop_share', 'drop_share_per_layer', 'token_drop_share', 'load', 'load_kept'),
  *('max_violation', 'running_max_violation', 'load_cv', 'load_entropy', 'rank_imbalance'),
  *('dead_experts', 'running_dead_experts', 'padding_waste'),
  *('entropy', 'top_prob', 'largest_logsumexp'),
}
PRESETS = sorted(p.stem for p in (tiny.REPOSITORY / 'configs' / 'presets').glob('[a-z]*.py'))
# One of each kind of balance, which train on every run of the tests; the others with `--all`.
ALWAYS_TRAINED = ('switch', 'loss_free', 'expert_choice', 'hash', 'kmeans')


def preset(name, base=''):
  return importlib.import_module(f'configs.presets.{name}').get_config(base)


def test_the_command_prints_every_router():
  result = tiny.command('routers', '--json')
  assert result.code == 0, result.err
  rows = json.loads(result.out)
  assert {row['name'] for row in rows} == set(routing.ROUTERS)
  for row in rows:
    router = routing.ROUTERS[row['name']]
    assert (row['causal'], row['learns']) == (router.causal, router.learns)
    assert (tiny.REPOSITORY / row['preset']).exists()
    assert row['in_causal_lm'] == (row['name'] != 'soft')
  assert next(row for row in rows if row['name'] == 'loss_free')['state'] == ['bias']


def test_the_table_of_the_readme_is_that_of_the_registry():
  table = tiny.command('routers').out
  assert table.count('\n') == len(routing.ROUTERS) + 2
  assert table in regenerate.ROUTERS.read_text(encoding='utf-8'), (
    'if the change is meant, run python -m tests.golden.regenerate'
  )


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_fits_every_base(name):
  for base in ('', 'quickstart', 'lm_small'):
    if name == 'soft':
      with pytest.raises(UserError, match="moe.router='soft': not in a causal language model: "):
        schema.validate(preset(name, base))
    else:
      schema.validate(preset(name, base))
  with pytest.raises(UserError, match='nonsense'):
    preset(name, 'nonsense')


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_says_what_its_experts_run(name):
  text = ' '.join(importlib.import_module(f'configs.presets.{name}').__doc__.split())
  words = {'swiglu': 'SwiGLU', 'geglu': 'GEGLU', 'gelu': 'GELU', 'relu': 'ReLU'}
  said = words[preset(name).model.activation]
  assert re.search(rf'Its experts run {said}\b', text), (
    f"say in the docstring of configs/presets/{name}.py: 'Its experts run {said}, ...'"
  )


def test_presets_have_the_activation_of_their_papers():
  papers = {
    'switch': 'relu',
    'gshard': 'relu',
    'st_moe': 'geglu',
    'vmoe': 'gelu',
    'top_k': 'swiglu',
  }
  assert {name: preset(name).model.activation for name in papers} == papers
  for base in ('quickstart', 'lm_small'):
    assert preset('switch', base).model.activation == 'relu'


@pytest.mark.parametrize('name', ['switch', *(n for n, r in routing.ROUTERS.items() if r.reads)])
def test_a_preset_leaves_no_choice_open(name):
  names = (*presets.SILENT, *routing.ROUTERS[preset(name).moe.router].reads)
  choices = {field: preset(name).moe[field] for field in names}
  presets.make('', activation='relu', **choices)
  with pytest.raises(TypeError, match=r'model\.activation open'):
    presets.make('', **choices)
  for field in names:
    with pytest.raises(TypeError, match=f'moe.{field} open'):
      presets.make('', activation='relu', **{k: v for k, v in choices.items() if k != field})


def test_what_every_router_reads_has_one_default():
  for option in dataclasses.fields(routing.RouterOptions):
    if option.name in ('capacity', 'training'):  # the layer says
      continue
    field = schema.SCHEMA['moe'][option.name]
    if option.default is not dataclasses.MISSING:
      assert (option.default, type(option.default)) == (field.default, type(field.default))


def watched(options, seen):
  """Returns the same options, which remember what is read of them."""

  def read(self, name):
    if not name.startswith('_'):
      seen.add(name)
    return object.__getattribute__(self, name)

  cls = type('Watched', (type(options),), {'__getattribute__': read})
  return cls(**dataclasses.asdict(options))


@pytest.mark.parametrize('name', routing.ROUTERS)
def test_a_router_reads_all_that_it_declares(name):
  """All its functions are traced, in training and evaluation, with the choices of its preset.

  That it reads nothing else needs no test: its options have nothing else.
  """
  router, config = routing.ROUTERS[name], preset(name)
  seen = set()

  def run(options, state):
    weights = router.params(options, 8)
    params = {key: jnp.zeros(weight.shape) for key, weight in weights.items()}
    zeros, keys = jnp.zeros((1, 6), jnp.int32), jax.random.split(jax.random.key(0), 1)
    valid = jnp.ones((1, 6), bool)
    inputs = routing.RouterInputs(jnp.zeros((1, 6, 8)), valid, zeros, zeros, keys)
    choice = router.choose(params, state, inputs, options)
    made = routing.make_plan(choice, valid, keys, capacity=6)
    sums = routing.router_sums(choice, made, valid, zeros[:, :1], 1)
    sums = sums._replace(**{f: getattr(sums, f)[0] for f in ('tokens', 'tokens_per_expert')})
    if router.mix is not None:
      router.mix(params, state, inputs, options)
    if router.loss is not None:
      router.loss(sums, state, options)
    if router.update is not None:
      router.update(state, sums, options)

  options = schema.router_options(config)
  for training in (True, False):
    for evaluation in ('threshold', 'token_choice'):
      changes = {'evaluation': evaluation} if 'evaluation' in router.reads else {}
      told = watched(dataclasses.replace(options, training=training, **changes), seen)
      state = router.state(told, 8, 5)
      if router.from_counts is not None:
        state = router.from_counts(state, np.arange(5), told)
      jax.eval_shape(functools.partial(run, told), state)
  own = seen - set(routing.COMMON_FIELDS)
  assert own == set(router.reads), (
    f'moe_jax/routing/routers/{name}.py: Options declares what nothing reads, or `always` names '
    f'what is read: {sorted(own ^ set(router.reads))}'
  )
  assert ('capacity' in seen) == router.fills_slots


def another(field, inert):
  """Returns an allowed value that is not inert, None if no choice is left."""
  kind = type(field.default)
  values = field.choices or (kind(value) for value in (2, 3, 0.25, 0.5))
  return next((value for value in values if value not in inert and field.check(value)), None)


@pytest.mark.parametrize('name', [n for n, r in routing.ROUTERS.items() if not r.rejected])
def test_what_a_router_does_not_read_cannot_be_changed(name):
  """Or two arms of a study would differ in name alone."""
  router = routing.ROUTERS[name]
  for field, field_of in ROUTER_FIELDS.items():
    if field in router.reads:
      continue
    config = preset(name)
    inert = {field_of.default, router.always.get(field, field_of.default)}
    for config.moe[field] in inert:
      if not router.allowed(schema.router_options(config)):
        schema.validate(config)
    value = another(field_of, inert)
    if value is None:
      assert set(field_of.choices) == inert
      continue
    config.moe[field] = value
    with pytest.raises(UserError, match=f'^moe.{field}='):
      schema.validate(config)


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


def test_a_preset_of_every_kind_of_balance_is_always_trained():
  kinds = [routing.ROUTERS[preset(name).moe.router].balance for name in ALWAYS_TRAINED]
  assert sorted(kinds) == sorted({router.balance for router in routing.ROUTERS.values()})


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in ALWAYS_TRAINED else pytest.mark.all)
    for name in PRESETS
    if name != 'soft'
  ],
)
def test_every_preset_learns(name, text, tmp_path, capsys):
  """A few hundred steps: the loss falls far below that of letter frequencies, all is finite."""
  config = preset(name)
  config.data.update(sequence_length=32, **{k[5:]: v for k, v in text.items()})
  config.data.update(valid_fraction=0.2, test_fraction=0.2)
  config.train.update(num_steps=200, checkpoint_every=200, log_every=20)
  schema.validate(config)
  assert single.train(config, str(tmp_path / 'run')).finished
  facts = manifest.read(tmp_path / 'run')
  assert facts['compilations'] == 1
  causal = routing.ROUTERS[config.moe.router].causal and config.moe.priority == 'token'
  assert facts['causal'] == causal
  assert ('is not causal' in capsys.readouterr().out) == (not causal)
  records = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  first, last = records[0], records[-1]
  assert last['step'] == 200
  # Five words of two domains, drawn independently: about 1 nat per letter; letters alone 2.7.
  assert last['loss'] < 1.6 < first['loss']
  assert {f'router/{statistic}' for statistic in WATCHED} <= set(last)
  for record in records:
    numbers = np.concatenate([np.ravel(value) for k, value in record.items() if k != 'split'])
    assert np.isfinite(numbers.astype(np.float64)).all()
