"""Every field has bounds, and every wrong value is an error that names the field and the value."""

import importlib
import json
import math
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import ml_collections
import numpy as np
import pytest

from configs import debug, dense_matched, lm_small, quickstart
from moe_jax import config as schema
from moe_jax import data, dispatch, experts, optim, routing
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.errors import UserError
from moe_jax.layers import moe_layer
from moe_jax.models import build
from moe_jax.models.build import build_task
from moe_jax.models.decoder import forward
from moe_jax.parallel.mesh import make_mesh
from moe_jax.schema import FAMILIES, FREE_FIELDS, LATER_FIELDS, LATER_FIELDS_IN_IDS
from moe_jax.train import accounting
from moe_jax.train.state import init_params
from tests import tiny
from tests.golden import regenerate

FIELDS = [(room, name) for room, fields in schema.SCHEMA.items() for name in fields]


def _allowed(room, name):
  """The choices a field of text names in its `allowed`."""
  return tuple(schema.SCHEMA[room][name].allowed.removeprefix('must be one of ').split(', '))


@pytest.mark.parametrize('name', sorted(regenerate.named_configs()))
def test_named_config_is_valid_and_as_reviewed(name):
  """Changed on purpose: python -m tests.golden.regenerate."""
  config = regenerate.named_configs()[name]
  schema.validate(config)
  golden = regenerate.FOLDER / f'{name}.txt'
  same = regenerate.as_text(config) == golden.read_text(encoding='utf-8')
  assert same, f'{name}: if the change is meant, run python -m tests.golden.regenerate'


def test_fields_that_are_newer_than_results_are_named():
  """A run goes on, and a trial keeps its id, though it began before there was the field."""
  results = tiny.REPOSITORY / 'experiments' / 'expert_count' / 'results.jsonl'
  with results.open(encoding='utf-8') as lines:
    config = json.loads(next(lines))['config']
  # Some came without being named: since then runs have them, and their ids count them.
  old = {f'{room}.{name}' for room in config for name in config[room]} | {*LATER_FIELDS_IN_IDS}
  new = {f'{room}.{name}' for room, name in FIELDS} - old - {*FREE_FIELDS, *LATER_FIELDS}
  assert not new, f'add {sorted(new)} to LATER_FIELDS in moe_jax/schema.py'
  assert not old & set(LATER_FIELDS)


def test_the_families_of_the_schema_are_those_that_can_be_built():
  assert set(FAMILIES) == set(build.FAMILIES)


def test_the_list_of_fields_is_that_of_the_schema():
  assert regenerate.FIELDS.read_text(encoding='utf-8') == regenerate.fields_page(), (
    'if the change is meant, run python -m tests.golden.regenerate'
  )


def test_every_config_file_has_a_golden_text():
  files = {path.stem for path in pathlib.Path(debug.__file__).parent.glob('*.py')} - {'__init__'}
  assert files == {name.split('.')[0] for name in regenerate.named_configs()}
  goldens = {path.stem for path in regenerate.FOLDER.glob('*.txt')}
  assert goldens == set(regenerate.named_configs())


@pytest.mark.parametrize('module', [debug, lm_small, quickstart, dense_matched])
def test_an_argument_that_a_config_does_not_know_is_an_error(module):
  with pytest.raises(ValueError, match='nonsense'):
    module.get_config('nonsense')


def test_defaults_are_valid():
  schema.validate(schema.get_config())


@pytest.mark.parametrize(('room', 'name'), FIELDS)
def test_every_field_says_what_it_means_and_allows(room, name):
  field = schema.SCHEMA[room][name]
  assert field.meaning.endswith('.')
  assert field.allowed.startswith('must be ')
  assert field.check(field.default)


def test_the_schema_is_printed():
  text = tiny.command('config').out
  found = json.loads(tiny.command('config', '--json').out)
  assert set(found) == {f'{room}.{name}' for room, name in FIELDS}
  for room, name in FIELDS:
    assert f'{room}.{name} = ' in text
    assert found[f'{room}.{name}']['default'] == schema.SCHEMA[room][name].default


def _error(overrides):
  """Validates the defaults with overrides, past ConfigDict's own type check."""
  values = schema.get_config().to_dict()
  for key, value in overrides.items():
    room, field = key.split('.')
    values[room][field] = value
  with pytest.raises(UserError) as caught:
    schema.validate(ml_collections.ConfigDict(values))
  return caught.value


def _wrong_types(default):
  everything = {bool: True, int: 1, float: 0.5, str: 'x', list: [1], type(None): None}
  kind = type(default)
  return [v for k, v in everything.items() if k is not kind and (k, kind) != (int, float)]


@pytest.mark.parametrize(('room', 'name'), FIELDS)
def test_wrong_types_are_errors(room, name):
  for value in _wrong_types(schema.SCHEMA[room][name].default):
    error = _error({f'{room}.{name}': value})
    assert (error.field, error.value) == (f'{room}.{name}', value)
    assert f'{room}.{name}={value!r}: must be ' in str(error)


NUMBERS = [f for f in FIELDS if type(schema.SCHEMA[f[0]][f[1]].default) in (int, float)]
TEXTS = [f for f in FIELDS if schema.SCHEMA[f[0]][f[1]].allowed.startswith('must be one of ')]


@pytest.mark.parametrize(('room', 'name'), NUMBERS)
def test_numbers_out_of_bounds_are_errors(room, name):
  kind = type(schema.SCHEMA[room][name].default)
  wrong = [-1, -(10**9)] if kind is int else [-1e-9, -1.0, math.nan, math.inf, -math.inf]
  if name == 'entropy_weight':
    wrong = wrong[2:]  # Any sign.
  for value in wrong:
    error = _error({f'{room}.{name}': value})
    assert error.field == f'{room}.{name}'
    assert repr(value) in str(error)


@pytest.mark.parametrize(('room', 'name'), TEXTS)
@hypothesis.given(value=st.text(max_size=20))
def test_other_words_are_errors(room, name, value):
  hypothesis.assume(value not in _allowed(room, name))
  error = _error({f'{room}.{name}': value})
  assert (error.field, error.value) == (f'{room}.{name}', value)
  assert '\n' not in str(error)


def test_a_name_that_is_nearly_right_is_named():
  assert str(_error({'moe.router': 'topk'})).endswith('; did you mean top_k?')
  assert str(_error({'optim.name': 'adam'})).endswith('; did you mean adamw?')


@pytest.mark.parametrize(
  ('room', 'name'),
  [
    ('moe', 'capacity_factor'),
    ('moe', 'eval_capacity_factor'),
    ('moe', 'num_selected_experts'),
    ('moe', 'group_size'),
    ('mesh', 'data'),
    ('mesh', 'expert'),
    ('model', 'num_layers'),
    ('data', 'batch_size'),
    ('train', 'num_steps'),
    ('train', 'log_every'),
    ('train', 'checkpoint_every'),
    ('train', 'keep_checkpoints'),
    ('optim', 'learning_rate'),
  ],
)
def test_zero_is_an_error_where_it_means_nothing(room, name):
  zero = type(schema.SCHEMA[room][name].default)(0)
  assert _error({f'{room}.{name}': zero}).field == f'{room}.{name}'


@pytest.mark.parametrize(
  ('room', 'name'), [(r, n) for r, n in FIELDS if isinstance(schema.SCHEMA[r][n].default, float)]
)
def test_a_number_is_what_float32_makes_of_it(room, name):
  """1e308 would be inf in the program, 1e-300 and 1e-39 would be 0, and 1 - 1e-9 would be 1."""
  check = schema.SCHEMA[room][name].check
  in_programs = room != 'data'
  assert check(schema.SCHEMA[room][name].default)
  assert not check(1e308) and not check(3.5e38) and not check(float('nan')) and not check(-1e308)
  if in_programs:
    assert not check(1e-300) and not check(1e-39)
    assert check(0.0) or not check(1e-46)
  if 'below 1' in schema.SCHEMA[room][name].allowed and in_programs:
    assert check(0.999) and not check(1 - 1e-9)
  if '> 1' in schema.SCHEMA[room][name].allowed:
    assert check(1.001) and not check(1 + 1e-9)


@pytest.mark.parametrize(
  ('overrides', 'field', 'value'),
  [
    ({'optim.learning_rate': 1e308}, 'optim.learning_rate', 1e308),
    ({'optim.epsilon': 1e-300}, 'optim.epsilon', 1e-300),
    ({'moe.num_selected_experts': 9}, 'moe.num_selected_experts', 9),
    ({'moe.router': 'soft'}, 'moe.router', 'soft'),
    ({'moe.router': 'dense'}, 'moe.num_selected_experts', 2),
    ({'moe.router_loss_weight': 0.1}, 'moe.router_loss_weight', 0.1),
    ({'moe.device_balance_parts': 3}, 'moe.device_balance_parts', 3),
    ({'moe.softmax_order': 'after', 'moe.score': 'sigmoid'}, 'moe.softmax_order', 'after'),
    ({'moe.num_selected_experts': 1}, 'moe.renormalize', 'before_drop'),
    (
      {'moe.num_selected_experts': 1, 'moe.renormalize': 'after_drop'},
      'moe.renormalize',
      'after_drop',
    ),
    (
      {'moe.num_selected_experts': 1, 'moe.renormalize': 'none', 'moe.softmax_order': 'after'},
      'moe.softmax_order',
      'after',
    ),
    ({'mesh.expert': 3, 'data.batch_size': 33}, 'mesh.expert', 3),
    ({'mesh.model': 2}, 'mesh.model', 2),
    ({'moe.every': 3}, 'moe.every', 3),
    ({'mesh.data': 3}, 'data.batch_size', 32),
    ({'data.batch_size': 30, 'mesh.expert': 4}, 'data.batch_size', 30),
    ({'moe.group_size': 3}, 'data.batch_size', 32),
    ({'train.accumulation_steps': 5}, 'train.accumulation_steps', 5),
    ({'train.accumulation_steps': 8, 'mesh.expert': 8}, 'data.batch_size', 32),
    ({'moe.balance_scope': 'device', 'moe.balance_devices': 5}, 'moe.balance_devices', 5),
    ({'moe.bias_rate': 1e38}, 'moe.bias_rate', 1e38),
    (
      {'moe.balance_scope': 'sequence', 'train.accumulation_scope': 'running'},
      'train.accumulation_scope',
      'running',
    ),
    (
      {
        'moe.balance_scope': 'device',
        'moe.balance_devices': 2,
        'train.accumulation_steps': 4,
        'train.accumulation_scope': 'batch',
      },
      'moe.balance_devices',
      2,
    ),
    ({'model.num_kv_heads': 3}, 'model.num_kv_heads', 3),
    ({'model.embed_dim': 130}, 'model.embed_dim', 130),
    ({'model.head_dim': 3}, 'model.head_dim', 3),
    ({'model.embed_dim': 12}, 'model.head_dim', 3),
    ({'data.vocab_size': 512}, 'data.vocab_size', 512),
    ({'data.tokenizer': 'bpe', 'data.vocab_size': 300}, 'data.vocab_size', 300),
    ({'data.tokenizer': 'bpe'}, 'data.vocab_size', 0),
    ({'data.valid_fraction': 0.5}, 'data.valid_fraction', 0.5),
    ({'optim.warmup_steps': 1000}, 'optim.warmup_steps', 1000),
    ({'train.seed': 2**31}, 'train.seed', 2**31),
  ],
)
def test_fields_that_do_not_fit_together_are_errors(overrides, field, value):
  error = _error(overrides)
  assert (error.field, error.value) == (field, value)
  assert f'{field}={value!r}: ' in str(error)


@pytest.mark.parametrize(
  'overrides',
  [
    {'moe.num_selected_experts': 1, 'moe.renormalize': 'none'},
    {'moe.num_selected_experts': 8},
    {'moe.num_experts': 0, 'mesh.expert': 4, 'moe.num_selected_experts': 99},
    {'optim.warmup_steps': 1000, 'optim.schedule': 'constant'},
    {'moe.load_balancing_weight': 0.0, 'moe.router_z_weight': 0.0},
    {'moe.group_size': 32},
    {'train.seed': 2**31 - 1},
  ],
)
def test_edges_are_allowed(overrides):
  config = schema.get_config()
  for key, value in overrides.items():
    room, field = key.split('.')
    config[room][field] = value
  schema.validate(config)


def test_unknown_and_missing_fields_are_errors():
  values = schema.get_config().to_dict()
  values['moe']['num_expert'] = 4
  with pytest.raises(UserError, match=r'moe\.num_expert=4: unknown; did you mean num_experts'):
    schema.validate(ml_collections.ConfigDict(values))
  values = schema.get_config().to_dict()
  values['moe']['frobnicate'] = 4
  with pytest.raises(UserError, match=r'moe\.frobnicate=4: unknown; must be one of num_experts'):
    schema.validate(ml_collections.ConfigDict(values))
  values = schema.get_config().to_dict()
  values['trian'] = {}
  with pytest.raises(UserError, match=r'config\.trian'):
    schema.validate(ml_collections.ConfigDict(values))
  for room, name in FIELDS:
    values = schema.get_config().to_dict()
    del values[room][name]
    with pytest.raises(UserError, match=rf'{room}\.{name}=None: missing'):
      schema.validate(ml_collections.ConfigDict(values))


def test_choices_are_those_of_the_rooms_that_implement_them():
  assert set(_allowed('moe', 'router')) == set(routing.ROUTERS)
  assert set(_allowed('moe', 'score')) == set(routing.SCORES)
  assert set(_allowed('moe', 'softmax_order')) == set(routing.SOFTMAX_ORDERS)
  assert set(_allowed('moe', 'renormalize')) == set(routing.RENORMALIZATIONS)
  assert set(_allowed('moe', 'dispatch')) == set(dispatch.DISPATCHERS)
  assert set(_allowed('moe', 'exchange')) == set(dispatch.EXCHANGES)
  assert set(_allowed('model', 'activation')) == set(experts.ACTIVATIONS)
  assert set(_allowed('data', 'tokenizer')) == set(tokenizer_lib.KINDS)
  assert {data.ByteTokenizer.name, data.BpeTokenizer.name} == set(tokenizer_lib.KINDS)
  assert set(_allowed('moe', 'priority')) == set(routing.PRIORITIES)
  assert set(_allowed('moe', 'balance_normalization')) == set(routing.NORMALIZATIONS)


@pytest.mark.parametrize(('name', 'make'), [('name', 'optimizer'), ('schedule', 'schedule')])
def test_every_optimizer_and_schedule_of_the_schema_is_implemented(name, make):
  function = {'optimizer': optim.make_optimizer, 'schedule': optim.make_schedule}[make]
  config = schema.get_config()
  for choice in _allowed('optim', name):
    config.optim[name] = choice
    function(config.optim, 1000)
  config.optim[name] = 'nonsense'
  with pytest.raises(UserError, match='nonsense'):
    function(config.optim, 1000)


def test_only_token_priority_is_causal():
  config = schema.get_config()
  for priority in routing.PRIORITIES:
    config.moe.priority = priority
    assert schema.is_causal(config) == (priority == 'token')
    # Where nobody is dropped there is no order.
    config.moe.dispatch = 'dropless'
    assert schema.is_causal(config)
    config.moe.dispatch = 'gather'
  config.moe.num_experts = 0
  assert schema.is_causal(config)


@pytest.mark.parametrize(
  ('changes', 'capacity'),
  [
    ({}, 80),  # 256 tokens x 2 x 1.25 / 8
    ({'capacity_factor': 100.0}, 256),
    ({'dispatch': 'dropless'}, 256),
    ({'router': 'dense', 'capacity_factor': 0.1}, 256),
    # Chooses by the number of slots, whatever moves the tokens.
    ({'router': 'expert_choice', 'dispatch': 'dropless'}, 80),
  ],
)
def test_capacity_of_training_is_that_of_the_layer(changes, capacity):
  config = schema.get_config()
  config.moe.update(changes)
  assert schema.training_capacity(config) == capacity
  task = build_task(config, make_mesh(1, 1), tiny.VOCAB_SIZE, 'train', 4)
  assert moe_layer.sizes_of(task.moe, config.data.sequence_length).capacity == capacity


@pytest.mark.parametrize(
  ('field', 'value'),
  [('hash_seed', 2**32), ('kmeans_reseed_after', 10**10), ('num_null_experts', 10**12)],
)
def test_integers_that_no_array_can_hold_are_errors(field, value):
  config = schema.get_config()
  config.moe[field] = value
  with pytest.raises(UserError, match=f'^moe.{field}={value}'):
    schema.validate(config)


@pytest.mark.parametrize(
  ('overrides', 'expected'),
  [
    ({}, 1),
    ({'moe.balance_scope': 'group'}, 8),
    ({'moe.balance_scope': 'group', 'moe.group_size': 2}, 4),
    ({'moe.balance_scope': 'sequence', 'moe.group_size': 2}, 8),
    ({'moe.balance_scope': 'device', 'moe.balance_devices': 4}, 4),
    (
      {
        'moe.balance_scope': 'device',
        'train.accumulation_steps': 4,
        'train.accumulation_scope': 'batch',
      },
      2,
    ),
  ],
)
def test_balance_scopes(overrides, expected):
  config = schema.get_config()
  for key, value in overrides.items():
    room, field = key.split('.')
    config[room][field] = value
  assert schema.balance_scopes(config, 8) == expected


@pytest.mark.parametrize('name', ['debug', 'quickstart', 'lm_small'])
def test_dense_twin_has_the_same_active_flops_but_for_the_router(name):
  sparse = {'debug': debug, 'quickstart': quickstart, 'lm_small': lm_small}[name].get_config()
  dense = dense_matched.get_config(name)
  vocab_size = sparse.data.vocab_size or tiny.VOCAB_SIZE
  moe_layers = sparse.model.num_layers // sparse.moe.every
  router = 6 * sparse.model.embed_dim * sparse.moe.num_experts * moe_layers
  flops = accounting.training_flops_per_token
  assert flops(sparse, vocab_size) - flops(dense, vocab_size) == router
  assert router < 0.03 * flops(sparse, vocab_size)


def test_flops_and_parameters_are_those_of_the_compiled_dense_model():
  config = dense_matched.get_config('debug')
  model = build_task(config, make_mesh(1, 1), tiny.VOCAB_SIZE, 'eval')
  tokens = jax.ShapeDtypeStruct((4, config.data.sequence_length), np.int32)
  params = jax.eval_shape(lambda: init_params(model, jax.numpy.int32(0)))
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  counts = accounting.parameter_counts(config, tiny.VOCAB_SIZE)
  assert counts == {'total': size, 'active': size}
  # One layer: XLA counts the body of a scan once.
  config.model.num_layers = 1
  model = build_task(config, make_mesh(1, 1), tiny.VOCAB_SIZE, 'eval')
  params = jax.eval_shape(lambda: init_params(model, jax.numpy.int32(0)))
  compiled = jax.jit(lambda p, *x: forward(model.network, p, *x).logits).lower(
    params, *[tokens] * 3
  )
  measured = compiled.compile().cost_analysis()['flops'] / tokens.size
  expected = accounting.training_flops_per_token(config, tiny.VOCAB_SIZE) / 3
  # Norms, softmax, rotation and activation come on top of the matmuls.
  assert expected <= measured < 1.2 * expected


def test_random_drop_share_is_that_of_simulated_routing():
  config = debug.get_config()
  rng = np.random.default_rng(0)
  tokens, experts, selected, capacity = 64, 4, 2, 34
  drops = 0
  for _ in range(400):
    order = np.argsort(rng.random((tokens, experts)), axis=1)[:, :selected]
    drops += np.maximum(np.bincount(order.ravel(), minlength=experts) - capacity, 0).sum()
  share = accounting.random_drop_share(config, capacity)
  np.testing.assert_allclose(share, drops / (400 * tokens * selected), rtol=0.1)
  assert accounting.tokens_per_expert(config) == 32


@pytest.mark.parametrize('changes', [{}, {'num_selected_experts': 1}, {'num_shared_experts': 1}])
def test_flops_of_a_sparse_model_are_those_of_the_compiled_gradient(changes):
  config = debug.get_config()
  # One layer: XLA counts the body of a scan once. Slots for exactly the assignments: empty slots
  # are computed, and are not counted as active.
  config.model.num_layers = 1
  config.moe.update(num_experts=4, capacity_factor=1.0, renormalize='none', **changes)
  schema.validate(config)
  model = build_task(config, make_mesh(1, 1), tiny.VOCAB_SIZE, 'train', 4)
  tokens = jax.ShapeDtypeStruct((4, config.data.sequence_length), np.int32)
  params = jax.eval_shape(lambda: init_params(model, jax.numpy.int32(0)))
  key = jax.eval_shape(lambda: jax.random.key(0))

  def loss(params, key, *rows):
    return jax.numpy.sum(forward(model.network, params, *rows, key=key).logits ** 2)

  compiled = jax.jit(jax.grad(loss)).lower(params, key, *[tokens] * 3).compile()
  measured = compiled.cost_analysis()['flops'] / tokens.size
  expected = accounting.training_flops_per_token(config, tiny.VOCAB_SIZE)
  # Norms, softmax, activation, routing and the square come on top of the matmuls.
  assert 0.98 * expected <= measured < 1.25 * expected


@pytest.mark.parametrize(
  'name',
  # A model cannot have Soft MoE.
  sorted(
    p.stem for p in (tiny.REPOSITORY / 'configs' / 'presets').glob('[a-z]*.py') if p.stem != 'soft'
  ),
)
def test_parameters_of_every_preset_are_those_of_its_model(name):
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  model = build_task(config, make_mesh(1, 1), tiny.VOCAB_SIZE, 'eval')
  params = jax.eval_shape(lambda: init_params(model, jax.numpy.int32(0)))
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  counts = accounting.parameter_counts(config, tiny.VOCAB_SIZE)
  assert counts['total'] == sum(leaf.size for _, leaf in flat)
  # Active: all but the experts that a token does not pass.
  moe, choice = config.moe, schema.router_options(config)
  kept = [(path, leaf) for path, leaf in flat if len(path) > 1 and path[-2].key == 'moe']
  experts = sum(leaf.size for path, leaf in kept if path[-1].key in ('w_in', 'w_out'))
  passed = moe.num_experts if name == 'dense' else choice.num_selected_experts
  assert counts['active'] == counts['total'] - experts + experts * passed // moe.num_experts
