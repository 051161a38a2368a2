"""Fields that nothing reads are refused in a new run, and what the tables say is what is read."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from experiments.dropping import study as dropping
from experiments.expert_count import study as expert_count
from experiments.expert_count_short import study as expert_count_short
from experiments.learning_rate import study as learning_rate
from experiments.load_balance import study as load_balance
from moe_jax import config as schema
from moe_jax import optim, routing, unread
from moe_jax.errors import UserError
from moe_jax.routing import groups
from moe_jax.run import single
from moe_jax.schema import SCHEMA
from moe_jax.study import Study, point, product
from moe_jax.sweep import trials
from tests import tiny
from tests.golden import regenerate

STUDIES = (dropping, expert_count, expert_count_short, learning_rate, load_balance)
OTHER = {
  'b1': 0.8,
  'b2': 0.9,
  'epsilon': 1e-3,
  'momentum': 0.5,
  'adam_learning_rate': 0.3,
  'final_fraction': 0.4,
  'decay_fraction': 0.5,
}


def _config(changes=None):
  config = schema.get_config()
  for field, value in (changes or {}).items():
    room, _, name = field.partition('.')
    config[room][name] = value
  schema.validate(config)
  return config


def _begin(config):
  """Checks the config of a new run as `train` does."""
  unread.check_unread(config, unread.defaults(config))
  unread.check_decay(config)


def _after_three_steps(config):
  """Parameters of three kinds after updates that differ, and the rate along the schedule."""
  rng = np.random.default_rng(0)
  layers = {'mlp': {'w_in': rng.normal(size=(2, 4, 12)), 'w_out': rng.normal(size=(2, 6, 4))}}
  start = {'embedding': rng.normal(size=(9, 4)), 'layers': layers}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
  optimizer = optim.make_optimizer(config.optim, 1000)
  state = optimizer.init(params)
  for step in range(3):
    gradient = jax.tree.map(lambda p, step=step: jnp.sin(p * (1 + step)), params)
    updates, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  schedule = optim.make_schedule(config.optim, 1000)
  return jax.device_get((params, [schedule(step) for step in (0, 400, 700, 1000)]))


def _same(one, two):
  return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, two))


@pytest.mark.parametrize(
  ('choice', 'value'),
  [
    *(('name', name) for name in unread.OPTIMIZER_READS),
    *(('schedule', name) for name in unread.SCHEDULE_READS),
  ],
)
def test_the_tables_say_what_is_read_and_the_rest_is_refused(choice, value):
  """The oracle is the optimizer itself: a field is read if and only if it moves a result."""
  table = unread.OPTIMIZER_READS if choice == 'name' else unread.SCHEDULE_READS
  assert set(table) == set(
    SCHEMA['optim'][choice].allowed.removeprefix('must be one of ').split(', ')
  )
  base = {f'optim.{choice}': value, 'optim.warmup_steps': 0}
  expected = _after_three_steps(_config(base))
  for name in sorted({field for reads in table.values() for field in reads}):
    config = _config({**base, f'optim.{name}': OTHER[name]})
    read = name in table[value]
    assert _same(_after_three_steps(config), expected) == (not read), name
    if read:
      _begin(config)
      continue
    with pytest.raises(UserError) as error:
      _begin(config)
    why = f'nothing reads it with optim.{choice}={value}'
    assert str(error.value) == (
      f'optim.{name}={OTHER[name]!r}: must be {SCHEMA["optim"][name].default}: {why}'
    )


@pytest.mark.parametrize(
  ('changes', 'chosen'),
  [
    ({'moe.balance_devices': 4}, 'moe.balance_devices'),
    ({'model.mlp_dim': 99}, 'model.mlp_dim'),
    ({'moe.dispatch': 'dropless', 'moe.capacity_factor': 2.0}, 'moe.capacity_factor'),
    ({'moe.dispatch': 'dropless', 'moe.priority': 'random'}, 'moe.priority'),
    ({'train.accumulation_scope': 'batch'}, 'train.accumulation_scope'),
    (
      {
        'train.accumulation_scope': 'batch',
        'train.accumulation_steps': 2,
        'moe.balance_scope': 'sequence',
      },
      'train.accumulation_scope',
    ),
    (
      {'moe.load_balancing_weight': 0.0, 'moe.balance_normalization': 'k'},
      'moe.balance_normalization',
    ),
    ({'moe.load_balancing_weight': 0.0, 'moe.balance_scope': 'group'}, 'moe.balance_scope'),
    (
      {
        'train.accumulation_scope': 'batch',
        'train.accumulation_steps': 2,
        'moe.load_balancing_weight': 0.0,
      },
      'train.accumulation_scope',
    ),
    ({'moe.dispatch': 'dropless', 'moe.group_size': 2}, 'moe.group_size'),
    (
      {'moe.router': 'dense', 'moe.num_selected_experts': 8, 'moe.group_size': 2},
      'moe.group_size',
    ),
    ({'moe.device_balance_parts': 2}, 'moe.device_balance_parts'),
    ({'moe.every': 2, 'moe.layer_reduction': 'sum'}, 'moe.layer_reduction'),
    ({'data.name': 'tier1', 'data.valid_fraction': 0.2}, 'data.valid_fraction'),
    ({'data.name': 'tier2', 'data.test_fraction': 0.2}, 'data.test_fraction'),
    ({'moe.num_experts': 0, 'moe.mlp_dim': 99}, 'moe.mlp_dim'),
    ({'moe.num_experts': 0, 'train.load_decay': 0.5}, 'train.load_decay'),
  ],
)
def test_a_config_may_state_what_an_override_may_not_choose(changes, chosen):
  config = _config(changes)
  _begin(config)
  room, _, name = chosen.partition('.')
  default = SCHEMA[room][name].default
  with pytest.raises(UserError, match=f'^{chosen}=.*: must be {default}: nothing reads it with '):
    unread.check_unread(config, {chosen: default})


@pytest.mark.parametrize(
  'changes',
  [
    {'moe.balance_devices': 4, 'moe.balance_scope': 'device'},
    {'model.mlp_dim': 99, 'moe.every': 2},
    {'moe.balance_normalization': 'k', 'moe.layer_reduction': 'sum'},
    {'moe.device_balance_parts': 2, 'moe.device_balance_weight': 0.1},
    {'data.name': 'text:x', 'data.valid_fraction': 0.2, 'data.test_fraction': 0.2},
    {'model.mlp_dim': 99, 'moe.num_experts': 0},
    {'train.accumulation_scope': 'batch', 'train.accumulation_steps': 2},
    # Slots are shared, noise is drawn, or losses are formed within a group.
    {'moe.group_size': 2},
    {'moe.group_size': 2, 'moe.dispatch': 'dropless', 'moe.jitter': 0.1},
    {'moe.group_size': 2, 'moe.dispatch': 'dropless', 'moe.balance_scope': 'group'},
    {'moe.group_size': 2, 'moe.dispatch': 'dropless', 'moe.router': 'sinkhorn'},
    # Its slots are what it chooses by, whatever moves the tokens.
    {
      'moe.router': 'expert_choice',
      'moe.dispatch': 'dropless',
      'moe.capacity_factor': 2.0,
      'moe.renormalize': 'none',
    },
  ],
)
def test_what_is_read_may_be_chosen(changes):
  defaults = {f: SCHEMA[f.partition('.')[0]][f.partition('.')[2]].default for f in changes}
  unread.check_unread(_config(changes), defaults)


@pytest.mark.parametrize('name', [n for n, r in routing.ROUTERS.items() if not r.rejected])
def test_noise_on_tokens_and_the_start_of_weights_are_refused_where_there_are_none(name):
  router = routing.ROUTERS[name]
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  weights = router.params(schema.router_options(config), 8).values()
  found = unread.unread(config)
  assert ('moe.jitter' in found) == (not router.reads_tokens)
  assert ('moe.router_init_scale' in found) == (not any(w.init == 'scaled' for w in weights))
  for field, value in (('jitter', 0.1), ('router_init_scale', 0.7)):
    changed = config.copy_and_resolve_references()
    changed.moe[field] = value
    if f'moe.{field}' in found:
      with pytest.raises(UserError, match=f'moe.{field}={value}: .* nothing reads it with moe.ro'):
        _begin(changed)
    else:
      _begin(changed)


@pytest.mark.parametrize('name', routing.ROUTERS)
def test_a_router_says_whether_it_looks_at_tokens(name):
  router = routing.ROUTERS[name]
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  options = schema.router_options(config)
  weights = router.params(options, 8)
  params = {key: jnp.zeros(weight.shape) for key, weight in weights.items()}
  zeros = jnp.zeros((1, 6), jnp.int32)
  state = router.state(options, 8, 5)
  if router.from_counts is not None:
    state = router.from_counts(state, np.arange(5), options)
  keys = jax.random.split(jax.random.key(0), 1)

  def choose(tokens):
    seen = routing.RouterInputs(tokens, jnp.ones((1, 6), bool), zeros, zeros, keys)
    return router.choose(params, state, seen, options)

  traced = jax.make_jaxpr(choose)(jnp.zeros((1, 6, 8))).jaxpr
  used = {id(var) for equation in traced.eqns for var in equation.invars}
  assert (id(traced.invars[0]) in used) == router.reads_tokens


def _chosen(router, options, size):
  """Returns what a router says of 4 sequences of 6 tokens in groups of so many, by sequence."""
  rng = np.random.default_rng(0)
  weights = router.params(options, 8)
  params = {key: rng.normal(size=weight.shape) for key, weight in weights.items()}
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = router.state(options, 8, 5)
  if router.from_counts is not None:
    state = router.from_counts(state, np.arange(5), options)
  slots = 6 * size * options.num_selected_experts // options.num_experts
  options = dataclasses.replace(options, group_size=size, capacity=slots)
  ids, places = rng.integers(0, 5, (4, 6)), np.broadcast_to(np.arange(6), (4, 6))
  by_token = jnp.ones((4, 6), bool), jnp.asarray(ids), jnp.asarray(places)
  inputs = routing.RouterInputs(
    groups.to_groups(jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32), size),
    *(groups.to_groups(x[..., None], size)[..., 0] for x in by_token),
    jax.random.split(jax.random.key(0), 4 // size),
  )
  choice = jax.jit(lambda *args: router.choose(*args, options))(params, state, inputs)
  by_sequence = [groups.from_groups(x.astype(jnp.float32), size) for x in choice[:-1]]
  return [*by_sequence, *(jnp.sum(x, axis=0) for x in choice.sums.values())]


@pytest.mark.parametrize('name', [n for n, r in routing.ROUTERS.items() if not r.rejected])
def test_a_router_says_whether_it_looks_at_its_group(name):
  router = routing.ROUTERS[name]
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  options = schema.router_options(config)
  one, two = (_chosen(router, options, size) for size in (1, 2))
  same = all(np.allclose(a, b, atol=1e-5) for a, b in zip(one, two, strict=True))
  assert same == (not router.by_group), f'{name}: by_group must be {not same}'


def test_everything_here_may_begin():
  """Named configs, presets on every base, and the arms of the studies."""
  for config in regenerate.named_configs().values():
    _begin(config)
  for name, router in routing.ROUTERS.items():
    module = importlib.import_module(f'configs.presets.{name}')
    for base in presets._BASES if not router.rejected else ():
      _begin(module.get_config(base))
  for module in STUDIES:
    study = module.get_study()
    trials.check_new(study, trials.trials_of(study), None)


def _study(arms):
  return Study('s', 'Which?', tiny.config(), arms, (0,), may_differ=('compute',))


@pytest.mark.parametrize(
  ('arms', 'words'),
  [
    (
      product({'optim.name': ('adamw', 'sgd'), 'optim.b1': (0.8,)}),
      "study.arms='name=sgd, b1=0.8': optim.b1=0.8: must be 0.9: nothing reads it",
    ),
    (point('a', {'moe.balance_devices': 4}), 'moe.balance_devices=4: must be 8'),
    (point('a', {'moe.num_experts': 0, 'moe.mlp_dim': 8}), 'moe.mlp_dim=8: must be 16'),
  ],
)
def test_an_arm_that_changes_nothing_is_refused_before_it_begins(arms, words, tmp_path):
  study = _study(arms)
  made = trials.trials_of(study)
  with pytest.raises(UserError) as error:
    trials.check_new(study, made, tmp_path)
  assert words in str(error.value)
  # A trial that has begun goes on.
  for trial in made:
    trial.folder(tmp_path).mkdir(parents=True)
    (trial.folder(tmp_path) / 'manifest.json').write_text('{}', encoding='utf-8')
  trials.check_new(study, made, tmp_path)


def test_two_arms_that_differ_in_what_nothing_reads_are_one_model():
  study = _study(product({'optim.name': ('adafactor',), 'optim.b1': (0.8, 0.7)}))
  with pytest.raises(UserError, match='study.arms'):
    trials.trials_of(study)


def test_the_command_refuses_a_new_run_and_goes_on_with_an_old_one(text, tmp_path):
  overrides = {**text, 'train.num_steps': 1, 'mesh.data': 1, 'mesh.expert': 1}
  path, workdir = tiny.config_file(tmp_path, overrides), tmp_path / 'run'
  flags = f'--config={path}', f'--workdir={workdir}'
  for override in ('optim.b1=0.8', 'moe.balance_devices=4'):
    tiny.command('train', *flags, f'--config.{override}').assert_error('nothing reads it with')
  assert not workdir.exists()
  old = tiny.config({**overrides, 'optim.b1': 0.8, 'moe.balance_devices': 4})
  assert single.train(old, str(workdir)).finished
  again = tiny.command('train', *flags, '--config.optim.b1=0.8', '--config.moe.balance_devices=4')
  assert again.code == 0 and 'finished at step 1' in again.out, again.err


@pytest.mark.parametrize(
  ('steps', 'warmup', 'fraction', 'words'),
  [
    (110, 100, 0.2, 'a decay of 22 of train.num_steps=110 would begin within optim.warmup_steps'),
    (110, 89, 0.2, 'a decay of 22'),
    (110, 88, 0.2, ''),
    (1000, 0, 0.9999, ''),
    (1000, 100, 0.0, 'is less than one of train.num_steps=1000'),
    (100, 10, 0.001, 'is less than one of train.num_steps=100'),
  ],
)
def test_a_decay_that_does_not_end_where_it_says_is_refused(steps, warmup, fraction, words):
  """88 steps of warm-up and 22 of decay make 110: the rate ends at final_fraction."""
  changes = {'optim.schedule': 'wsd', 'optim.decay_fraction': fraction, 'optim.final_fraction': 0.3}
  changes |= {'optim.warmup_steps': warmup, 'train.num_steps': steps}
  config = _config(changes)
  end = float(optim.make_schedule(config.optim, steps)(steps))
  if words:
    with pytest.raises(UserError, match='^optim.decay_fraction=.*final_fraction|constant') as error:
      _begin(config)
    assert words in str(error.value)
  else:
    _begin(config)
    np.testing.assert_allclose(end, 0.3, atol=1e-6)


def test_training_refuses_such_a_decay(tmp_path):
  changes = {'optim.schedule': 'wsd', 'optim.warmup_steps': 5, 'optim.decay_fraction': 0.5}
  with pytest.raises(UserError, match='a decay of 3 of train.num_steps=6 would begin within'):
    single.train(tiny.config({**changes, 'mesh.data': 1, 'mesh.expert': 1}), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'wsd'])
def test_every_schedule_that_is_not_refused_ends_at_its_final_fraction(schedule):
  for steps in (1, 2, 7, 100):
    for warmup in {0, 1, steps // 2, steps - 1} - {steps}:
      for fraction in (0.0, 0.2, 0.5, 0.97):
        changes = {'optim.schedule': schedule, 'optim.final_fraction': 0.3}
        changes |= {'optim.warmup_steps': warmup, 'train.num_steps': steps}
        if schedule == 'wsd':
          changes['optim.decay_fraction'] = fraction
        config = _config(changes)
        end = float(optim.make_schedule(config.optim, steps)(steps))
        try:
          _begin(config)
        except UserError:
          continue
        assert abs(end - 0.3) < 1e-6, changes
