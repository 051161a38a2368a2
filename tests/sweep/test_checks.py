"""Malformed studies: each is one line that names the field and its value."""

import dataclasses
import math

import ml_collections
import pytest

from moe_jax.errors import UserError
from moe_jax.schema import FREE_FIELDS
from moe_jax.study import Comparison, Metric, Point, Study, chain, point, product
from moe_jax.sweep import checks, trials
from tests import tiny

LIGHT, NONE = 'load_balancing_weight=0.01', 'load_balancing_weight=0'


def make_study(**changes):
  arms = product({'moe.load_balancing_weight': (0, 0.01)})
  study = Study('test', 'does it?', tiny.config(), arms, (0, 1))
  for name, value in changes.items():
    # Outside of tests nothing checks the annotations.
    object.__setattr__(study, name, value)
  return study


def refused(**changes):
  with pytest.raises(UserError) as caught:
    trials.trials_of(make_study(**changes))
  text = str(caught.value)
  assert '\n' not in text
  return text


# The one before the last is half a surrogate pair, which no terminal and no file takes.
WRONG = (None, 3, 0.5, True, 'text', b'bytes', (), [1], {}, {'a': 1}, (None,), len, '\ud800', math)
# What of these a field takes.
RIGHT: dict[tuple[type, str], tuple] = {
  (Study, 'name'): ('text',),
  (Study, 'question'): ('text',),
  (Study, 'seeds'): ([1],),
  (Study, 'comparisons'): ((),),
  (Study, 'may_differ'): ((),),
  (Study, 'scaling'): (True,),
  (Study, 'metrics'): ({},),
  (Study, 'equivalence_margin'): (None, 3, 0.5),
  (Point, 'name'): ('text',),
  (Point, 'changes'): ({},),
  (Point, 'dropped'): ('text',),
  (Point, 'label'): ('text',),
  (Metric, 'unit'): ('text',),
  (Metric, 'lower_is_better'): (True,),
}


def test_every_field_of_a_study_has_its_type():
  for kind, fields in checks.TYPES.items():
    names = (
      [field.name for field in dataclasses.fields(kind)] if kind is Study else list(kind._fields)
    )
    assert list(fields) == names, kind


@pytest.mark.parametrize('field', ['name', 'label'])
def test_an_arm_is_named_in_one_line(field):
  arm = Point(**{'name': 'a', 'changes': {}, field: 'a\nb'})
  assert refused(arms=(arm,)).startswith(f"study.arms[0].{field}='a\\nb': must be text in one line")


@pytest.mark.parametrize('field', checks.TYPES[Study])
def test_a_field_of_the_study_of_a_wrong_type(field):
  trials.trials_of(make_study())
  for value in WRONG:
    if value in RIGHT.get((Study, field), ()):
      trials.trials_of(make_study(**{field: value}))
    else:
      assert refused(**{field: value}).startswith(f'study.{field}'), value


@pytest.mark.parametrize(
  ('kind', 'field'),
  [(kind, field) for kind in (Point, Comparison, Metric) for field in checks.TYPES[kind]],
)
def test_a_field_of_an_arm_a_comparison_or_the_metric_of_a_wrong_type(kind, field):
  for value in WRONG:
    good = {
      Point: Point('wide', {'moe.capacity_factor': 3.0}),
      Comparison: Comparison(NONE, LIGHT),
      Metric: Metric(),
    }[kind]
    bad = good._replace(**{field: value})
    changes = {
      Point: {'arms': (*product({'moe.load_balancing_weight': (0, 0.01)}), bad)},
      Comparison: {'comparisons': (bad,)},
      Metric: {'metric': bad},
    }[kind]
    if value in RIGHT.get((kind, field), ()):
      # An arm without changes is the base, and here that is one of the others.
      checks.check_study(make_study(**changes))
    else:
      where = {Point: 'study.arms', Comparison: 'study.comparisons', Metric: 'study.metric'}[kind]
      text = refused(**changes)
      assert text.startswith(where) or (value == {'a': 1} and text.startswith('a=1: of arm')), value


def test_an_arm_that_changes_a_field_to_a_wrong_type():
  for value in WRONG:
    text = refused(arms=point('a', {'moe.num_experts': value}) + point('b', {}))
    assert 'moe.num_experts=' in text or value == 3, value
  # Too large for a float, though not for an int.
  assert 'float' in refused(arms=point('a', {'optim.learning_rate': 10**400}))
  text = refused(arms=point('a', {'moe.num_expert': 4}))
  assert 'did you mean moe.num_experts' in text


def frozen(config):
  return ml_collections.FrozenConfigDict(config)


def test_a_base_that_is_no_config():
  assert refused(base=ml_collections.ConfigDict()).startswith("study.base='...model'")
  good = tiny.config().to_dict()
  for words, changes in (
    ("study.base='...model'", {'model': 3}),
    ('moe.num_exprets=3: of study.base: unknown', {'moe': {**good['moe'], 'num_exprets': 3}}),
    ("study.base='moe.num_experts': is missing", {'moe': {'mlp_dim': 3}}),
    ('new={}: of study.base: unknown section; must be one of model', {'new': {}}),
    (
      "optims={'name': 'x'}: of study.base: unknown section; did you mean optim?",
      {'optims': {'name': 'x'}},
    ),
    (
      "moe.num_experts='four': must be of type int",
      {'moe': {**good['moe'], 'num_experts': 'four'}},
    ),
  ):
    assert words in refused(base=ml_collections.ConfigDict({**good, **changes})), words
  ids = [trial.id for trial in trials.trials_of(make_study())]
  assert [t.id for t in trials.trials_of(make_study(base=frozen(tiny.config())))] == ids


@pytest.mark.parametrize('name', ['..', '.', 'a/b', 'a\nb', 'a\0', '\udc80', 'x' * 300])
def test_a_name_that_is_no_folder(name):
  assert refused(name=name).startswith('study.name=')


def test_seeds_are_those_of_the_study():
  text = refused(arms=point('a', {'train.seed': 7}) + point('b', {'moe.capacity_factor': 3.0}))
  assert text.startswith('train.seed=7') and 'study.seeds' in text


def test_arms_that_differ_little_are_two_models():
  for common, changes in (
    ({}, {'model.head_dim': 4}),
    ({'optim.name': 'muon'}, {'optim.adam_learning_rate': 0.2}),
    ({'train.accumulation_steps': 2}, {'train.accumulation_scope': 'batch'}),
    ({'train.accumulation_steps': 2}, {'train.accumulation_scope': 'running'}),
    ({'moe.balance_scope': 'group', 'moe.group_size': 2}, {'moe.balance_scope': 'sequence'}),
    ({'moe.capacity_factor': 1.25}, {'moe.capacity_factor': 1.3}),
    ({}, {'moe.capacity_factor': 3.0}),
    ({'moe.dispatch': 'dropless', 'moe.jitter': 0.1}, {'moe.group_size': 2}),
    ({'moe.dispatch': 'dropless', 'moe.balance_scope': 'group'}, {'moe.group_size': 2}),
    ({'moe.dispatch': 'dropless', 'moe.router': 'noisy_top_k'}, {'moe.group_size': 2}),
  ):
    base = tiny.config({'mesh.data': 1, 'mesh.expert': 1})
    arms = point('one', common) + point('other', {**common, **changes})
    study = make_study(base=base, arms=arms, may_differ=('compute',))
    assert len(trials.trials_of(study)) == 4, changes


def test_a_base_has_no_seed_of_its_own():
  said = refused(base=tiny.config({'train.seed': 7}))
  assert said.startswith('train.seed=7: of study.base: must be 0; seeds are those of study.seeds')


@pytest.mark.parametrize('field', ['data.valid_fraction', 'data.test_fraction'])
def test_other_splits_are_other_data(field):
  arms = point('a', {}) + point('b', {field: 0.3})
  base = tiny.config({'data.name': 'text:x'})
  text = refused(arms=arms, base=base)
  assert text.startswith(f'{field}=') and "'data' to its may_differ" in text
  assert len(trials.trials_of(make_study(arms=arms, base=base, may_differ=('data',)))) == 4
  # The tiers hold out fixed works.
  assert 'is the same as arm' in refused(arms=arms)


def test_a_margin_is_above_zero():
  for margin in (0, -1, float('inf'), float('nan')):
    assert refused(equivalence_margin=margin).startswith('study.equivalence_margin=')


def test_a_comparison_counts_once_in_whichever_direction():
  text = refused(comparisons=(Comparison(NONE, LIGHT), Comparison(LIGHT, NONE)))
  assert 'stands there twice' in text


@pytest.mark.parametrize(
  ('common', 'changes'),
  [
    # Nothing of experts is read by a dense model.
    ({'moe.num_experts': 0}, {'moe.mlp_dim': 48}),
    # float32 holds the same number.
    ({}, {'optim.learning_rate': 0.1000000001}),
    ({'moe.dispatch': 'dropless'}, {'moe.capacity_factor': 3.0}),
    ({'moe.dispatch': 'dropless'}, {'moe.priority': 'choice'}),
    # Every evaluation sets it.
    ({}, {'moe.eval_capacity_factor': 3.0}),
    # What the router does whether one says so or not.
    ({'moe.router': 'sinkhorn'}, {'moe.score': 'sigmoid'}),
    ({}, {'train.log_every': 7}),
    # 16 / 2 heads; the rate of what muon leaves to AdamW.
    ({}, {'model.head_dim': 8}),
    ({'optim.name': 'muon'}, {'optim.adam_learning_rate': 0.1}),
    # No weight of a loss that is formed in scopes; without one of loads they are all the same.
    (
      {'moe.load_balancing_weight': 0.0, 'train.accumulation_steps': 2},
      {'train.accumulation_scope': 'batch'},
    ),
    (
      {
        'moe.load_balancing_weight': 0.0,
        'moe.importance_weight': 0.1,
        'train.accumulation_steps': 2,
      },
      {'train.accumulation_scope': 'running'},
    ),
    # A group of one sequence; 16 sequences in 16 parts; one group of all.
    ({'moe.balance_scope': 'group'}, {'moe.balance_scope': 'sequence'}),
    ({'moe.balance_scope': 'group'}, {'moe.balance_scope': 'device', 'moe.balance_devices': 16}),
    ({'moe.group_size': 2}, {'moe.balance_scope': 'device', 'moe.balance_devices': 1}),
    # Slots are whole: ceil(16 * 2 * 1.25 / 8) = ceil(16 * 2 * 1.2 / 8) = 5, and 16 at most.
    ({'moe.capacity_factor': 1.25}, {'moe.capacity_factor': 1.2}),
    ({'moe.capacity_factor': 4.0}, {'moe.capacity_factor': 8.0}),
    ({'moe.capacity_factor': 4.0}, {'moe.priority': 'choice'}),
    ({'moe.dispatch': 'dropless'}, {'moe.group_size': 2}),
    # Steps are whole, too: 0.5 * 6 and 0.51 * 6.
    ({'optim.schedule': 'wsd', 'optim.decay_fraction': 0.5}, {'optim.decay_fraction': 0.51}),
    ({}, {'train.load_decay': 0.5}),
    ({}, {'model.remat': True}),
  ],
)
def test_two_arms_that_are_one_model(common, changes):
  base = tiny.config({'mesh.data': 1, 'mesh.expert': 1})
  arms = point('one', common) + point('other', {**common, **changes})
  said = refused(base=base, arms=arms)
  assert said.startswith("study.arms='other': is the same as arm 'one', one ")
  if not changes.keys() <= {*FREE_FIELDS}:
    assert all(field in said for field in changes) and 'one model, whatever ' in said


def test_labels_are_unique():
  text = refused(arms=product({'moe.load_balancing_weight': (0, 0.01)}, labels=('a', 'a')))
  assert text == "study.arms='a': labels must be unique"
  assert 'unique' in refused(arms=point('a', {}) + point('b', {'moe.capacity_factor': 3.0}, 'a'))


@pytest.mark.parametrize('more', [{'evaluations': ()}, {'evaluations': ('dropless', 'dropless')}])
def test_evaluations_are_different_and_at_least_one(more):
  assert refused(**more).startswith('study.evaluations=')


def mean_load(trial):
  return trial.evaluations['dropless']['loss']


def test_own_metrics_are_functions_in_python():
  study = make_study(metrics={'load': mean_load}, metric=Metric('user/load', 'nats'))
  assert len(trials.trials_of(study)) == 4
  assert refused(metrics={'a/b': mean_load}).startswith("study.metrics='a/b'")
  assert "'load': must be a function written in Python" in refused(metrics={'load': abs})
  assert 'user/load' in refused(metrics={'load': mean_load}, metric=Metric('user/loda'))


def test_a_study_file_that_is_no_python(tmp_path):
  path = tmp_path / 'study.txt'
  path.write_text('get_study = None')
  with pytest.raises(UserError, match='must be a Python file'):
    trials.load_study(str(path))


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    ('import os\nx = undefined_name\n', ('line 2: NameError', 'undefined_name')),
    ('x = 1\ndef get_study(:\n', ('line 2: SyntaxError',)),
    ('\n\nimport nowhere_at_all\n', ('line 3: ModuleNotFoundError', 'nowhere_at_all')),
    ('def get_study():\n  return len(1, 2)\n', ('line 2: TypeError: len() takes exactly one',)),
    # Raised by our own code, called from there.
    (
      'from moe_jax.study import Study\n\n\ndef get_study():\n  return Study("a")\n',
      ('line 5: TypeError', "'question'"),
    ),
    ('def get_study(a):\n  return a\n', ('get_study() must take no argument', "'a'")),
    ('', ('defines no get_study()', 'def get_study(): return Study(')),
    ('get_study = None\n', ('defines no get_study()',)),
    ('def get_study():\n  return 1\n', ('must return a Study, not int',)),
  ],
)
def test_what_a_study_file_raises_is_named_with_its_line(tmp_path, content, words):
  path = tmp_path / 'study.py'
  path.write_text(content)
  with pytest.raises(UserError) as caught:
    trials.load_study(str(path))
  assert str(caught.value).startswith(f'--study={str(path)!r}: ')
  for word in words:
    assert word in str(caught.value)


def test_the_example_of_a_study_is_one(tmp_path):
  path = tmp_path / 'study.py'
  path.write_text('')
  with pytest.raises(UserError) as caught:
    trials.load_study(str(path))
  example = str(caught.value).partition('example: ')[2].partition(', with')[0]
  path.write_text(
    'from moe_jax.config import get_config\nfrom moe_jax.study import Study, point\n\n\n'
    f'{example}\n'
  )
  trials.load_study(str(path))


@pytest.mark.parametrize(
  ('field', 'near'),
  [
    ('moe.num_expert', 'did you mean moe.num_experts'),
    ('moe.num_steps', 'did you mean train.num_steps?'),
    ('moe.zzz', 'must be one of num_experts'),
  ],
)
def test_unknown_fields_are_named_with_their_value_and_neighbours(field, near):
  base = tiny.config()
  section, _, name = field.partition('.')
  with base.unlocked():
    base[section][name] = 4
  said = refused(base=base)
  assert said.startswith(f'{field}=4: of study.base: unknown field; ') and near in said
  said = refused(arms=point('b', {field: 4}))
  assert said.startswith(f"{field}=4: of arm 'b': unknown field; ") and near in said
  assert near in refused(x=field)


def test_all_arms_may_be_points_and_grids():
  study = make_study(arms=chain(point('dense', {'moe.num_experts': 0}), make_study().arms))
  # The dense arm has another number of FLOPs.
  assert "'compute' to its may_differ" in refused(arms=study.arms)


def test_an_arm_that_there_is_not_is_named_with_what_there_is():
  assert refused(baseline='load_balancing_weight=0.1').endswith(
    f'is no arm that is run; did you mean {LIGHT} or {NONE}?'
  )
  found = refused(comparisons=(Comparison('2of8', NONE),))
  assert found == f"study.comparisons='2of8': is no arm that is run; arms are {NONE}, {LIGHT}"
