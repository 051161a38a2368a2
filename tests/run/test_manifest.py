"""Readers of manifests against fields that are missing or of another kind."""

import copy

import pytest

from moe_jax import config as config_lib
from moe_jax.errors import DamagedError, UserError
from moe_jax.results import records as records_lib
from moe_jax.run import manifest, manifest_kinds, same_run, setup
from moe_jax.schema import FREE_FIELDS, LATER_FIELDS, LATER_FIELDS_IN_IDS, SCHEMA
from tests import tiny

WRONG = (None, True, -1, 1.5, 'text', [], [7], {}, {'a': 'b'})


@pytest.fixture(scope='module')
def whole():
  """A manifest with every field."""
  config = tiny.config()
  data = {'name': 'x', 'fingerprint': 'f', 'tokenizer': 't', 'domains': ['a'], 'provenance': None}
  facts = manifest.new_manifest(config, setup.mesh_of(config), 258, data)
  facts |= {'resumed_from': [{'step': 3}], 'logging': [[0, 1, 0]], 'seconds': {'training': 1.5}}
  facts |= {'compilations': 1, 'pack': 2, 'packed_with': 1, 'cause': 'loss=nan'}
  facts |= {'ancestry': [{'workdir': 'runs/first'}], 'lengthened': [{'from': 3, 'to': 6}]}
  return facts


def test_a_whole_manifest_is_read_and_has_every_field(whole, tmp_path):
  manifest.write(tmp_path, whole)
  assert manifest.read(tmp_path) == whole
  fields = set(whole) | {f'{s}.{k}' for s in ('data', 'devices') for k in whole[s]}
  # Of these nothing is read.
  assert fields - set(manifest_kinds.KINDS) == {'data.provenance'}


@pytest.mark.parametrize('field', manifest_kinds.KINDS)
def test_a_field_of_another_kind_is_damage(whole, tmp_path, field):
  section, _, name = field.partition('.')
  good = whole[section][name] if name else whole[section]
  refused = []
  for value in WRONG:
    facts = copy.deepcopy(whole)
    (facts[section] if name else facts)[name or section] = value
    manifest.write(tmp_path, facts)
    try:
      manifest.read(tmp_path)
    except DamagedError as error:
      assert f'damaged: {field}' in str(error) or f'it lacks {field}.' in str(error)
      refused.append(value)
  # What is of the kind of the good one may pass: 'text' for text, {} for an object.
  passed = [value for value in WRONG if value not in refused]
  nullable = manifest_kinds.KINDS[field].endswith('null')
  kinds = {type(good), *({type(None)} if nullable else set()), *({float} if good == 1.5 else set())}
  if manifest_kinds.KINDS[field] == 'a number':
    kinds |= {int, float}
  assert {type(value) for value in passed} <= kinds
  assert len(refused) >= 5


@pytest.mark.parametrize(
  'content', [b'', b'{"config": ', b'[]', b'7', b'\xff{}', b'[' * 20_000, b'9' * 5000, b'{}']
)
def test_what_is_no_manifest_is_damage(tmp_path, content):
  (tmp_path / 'manifest.json').write_bytes(content)
  with pytest.raises(DamagedError, match='manifest.json is damaged'):
    manifest.read(tmp_path)


@pytest.mark.parametrize('field', manifest_kinds.NEEDED)
def test_a_missing_field_is_damage(whole, tmp_path, field):
  facts = copy.deepcopy(whole)
  section, _, name = field.partition('.')
  del (facts[section] if name else facts)[name or section]
  manifest.write(tmp_path, facts)
  with pytest.raises(DamagedError, match=f'it lacks {field}'):
    manifest.read(tmp_path)


def test_fields_of_the_config_are_known_and_of_their_type(whole):
  facts = copy.deepcopy(whole)
  facts['config']['moe']['num_experts'] = 'many'
  words = r"^runs/a/manifest.json is damaged: moe.num_experts='many' is not of type int$"
  with pytest.raises(DamagedError, match=words):
    manifest.config_of(facts, 'runs/a')
  facts['config']['moe'] = {'no_such_field': 1}
  with pytest.raises(UserError, match='moe.no_such_field=1: of the run in runs/a is unknown'):
    manifest.config_of(facts, 'runs/a')


def test_the_pace_of_old_manifests(whole):
  old = {key: value for key, value in whole.items() if key not in ('logging', 'resumed_from')}
  config = tiny.config({'train.log_every': 5})
  assert manifest.paces(old) == [(0, 1, 0)]
  # One that went on before its pace was written down.
  assert manifest.paces(old | {'resumed_from': [{}]}) == []
  assert manifest.paces(manifest.stand_in(3, old['config'])) == []
  assert manifest.paces_from(None, config, 0) == [(0, 5, 0)]
  assert manifest.paces_from(old, config, 4) == [(0, 1, 0), (4, 5, 0)]
  # What was done past the step is done again.
  later = old | {'logging': [[0, 1, 0], [3, 2, 0], [6, 9, 0]]}
  assert manifest.paces_from(later, config, 6) == [(0, 1, 0), (3, 2, 0), (6, 5, 0)]


def oldest_config(study):
  """Returns the config with the fewest fields among the committed results of a study."""
  path = tiny.REPOSITORY / 'experiments' / study / 'results.jsonl'
  records = records_lib.read_records(path)
  return min(
    (record.config for record in records if record.config),
    key=lambda config: sum(map(len, config.values())),
  )


@pytest.mark.parametrize(
  ('study', 'lacks'),
  [
    ('load_balance', {'moe.null_balance_weight', 'moe.router_dtype'}),
    ('expert_count', {'moe.router_dtype'}),
  ],
)
def test_a_run_from_before_a_field_came_is_read_and_goes_on(study, lacks):
  """Of committed results, so as old manifests were."""
  old = oldest_config(study)
  absent = {f'moe.{name}' for name in SCHEMA['moe'] if name not in old['moe']}
  assert absent - {*FREE_FIELDS} == lacks
  facts = {'config': old, 'status': 'interrupted'}
  config = manifest.config_of(facts, 'DIR')
  config_lib.validate(config)
  same_run.check_same_config('DIR', facts, config)
  assert same_run.first_difference(old, config.to_dict()) is None
  config.moe.router_dtype = 'bfloat16'
  with pytest.raises(UserError, match=r"router_dtype='bfloat16': the run in DIR has 'float32'"):
    same_run.check_same_config('DIR', facts, config)
  assert same_run.first_difference(old, config.to_dict()) == 'moe.router_dtype'


def test_every_field_is_in_a_manifest_or_has_a_default_for_one_without():
  """Without a field that came later than the oldest results, a run has its default."""
  old = oldest_config('learning_rate')
  there = {f'{room}.{name}' for room in old for name in old[room]}
  every = {f'{room}.{name}' for room in SCHEMA for name in SCHEMA[room]}
  assert every - there - {*FREE_FIELDS} == {*LATER_FIELDS, *LATER_FIELDS_IN_IDS}
