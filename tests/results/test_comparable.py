"""Trials that may be in one table, and those refused, by hand-made records."""

import pytest

from moe_jax.errors import UserError
from moe_jax.results import comparable, summary
from moe_jax.results.records import FAILED
from moe_jax.study import MAY_DIFFER, Comparison, Point
from tests.results import made


@pytest.mark.parametrize(
  ('records', 'words'),
  [
    ([made.make_record('dense', 0), made.make_record('dense', 0)], ('trial', 'dense (seed 0)')),
    (
      [made.make_record('dense', 0, status=FAILED), made.make_record('dense', 0)],
      ('trial', 'dense (seed 0)'),
    ),
    ([made.make_record('other', 0)], ('arm', 'other', 'made')),
    ([made.make_record('dropped', 0)], ('arm', 'dropped', 'too big')),
    ([made.make_record('dense', 3)], ('seed=3', 'dense', '(0, 1, 2)')),
    ([made.make_record('dense', 0, changes={'moe.num_experts': 4})], ('changes', 'dense (seed 0)')),
  ],
)
def test_records_that_are_not_of_the_study_are_refused(records, words):
  study = made.make_study(('dense', Point('dropped', {}, 'too big')))
  with pytest.raises(UserError) as error:
    summary.summarize(study, records)
  assert all(word in str(error.value) for word in words), error.value


def test_changes_are_compared_as_json_has_them():
  study = made.make_study([Point('dense', {'moe.groups': (1, 2)})])
  record = made.make_record('dense', 0, changes={'moe.groups': [1, 2]})
  assert summary.summarize(study, [record]).arms[0].values == {0: 2.0}


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'baseline': 'other'}, ('study.baseline', 'other', 'dense, moe')),
    ({'comparisons': (Comparison('moe', 'other'),)}, ('study.comparisons', 'other', 'dense, moe')),
    ({'may_differ': ('weather',)}, ('study.may_differ', 'weather', 'horizon')),
    ({'arms': ('dense', 'dense')}, ('arm', 'dense', '2 times')),
  ],
)
def test_studies_that_name_what_they_do_not_have_are_refused(fields, words):
  with pytest.raises(UserError) as error:
    summary.summarize(made.make_study(**fields), [])
  assert all(word in str(error.value) for word in words), error.value


OTHER_TEXT = {'name': 'tier2', 'fingerprint': 'e' * 64, 'tokenizer': 't' * 64}
OTHER_BOTH = {'name': 'tier2', 'fingerprint': 'e' * 64, 'tokenizer': 'u' * 64}


@pytest.mark.parametrize(
  ('changes', 'may_differ', 'words'),
  [
    ({'num_steps': 200, 'step': 200}, 'horizon', ('train.num_steps', '100', '200')),
    # The same FLOPs over more tokens.
    ({'tokens': 1_600_000, 'flops_per_token': 1_200_000}, 'horizon', ('tokens', '1600000')),
    ({'data': OTHER_TEXT}, 'data', ('data fingerprint', 'f' * 64, 'e' * 64)),
    ({'data': made.OTHER_TOKENIZER}, 'tokenizer', ('tokenizer', 't' * 64, 'u' * 64)),
    ({'flops_per_token': 2_430_000}, 'compute', ('FLOPs', '1920000000000', '1944000000000')),
  ],
)
def test_what_cannot_be_compared_is_refused_unless_it_is_the_question(changes, may_differ, words):
  records = [made.make_record('dense', 0), made.make_record('moe', 1, **changes)]
  for excuses in ((), tuple(name for name in MAY_DIFFER if name != may_differ)):
    with pytest.raises(UserError) as error:
      summary.summarize(made.make_study(may_differ=excuses), records)
    wanted = (*words, 'dense (seed 0)', 'moe (seed 1)', repr(may_differ))
    # Of a text by another name, under tokenizers that may differ, the names are compared.
    if may_differ == 'data' and excuses:
      wanted = ('data.name', 'tier1', 'tier2', repr(may_differ))
    assert all(word in str(error.value) for word in wanted), error.value
  comparable.check_comparable(made.make_study(may_differ=(may_differ,)), records)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'step': 99}, ('step', 'moe (seed 1)', '99', '100')),
    ({'data': {**made.make_record().data, 'split': 'valid'}}, ('split', 'valid', 'test')),
  ],
)
def test_what_no_study_can_ask_is_always_refused(changes, words):
  records = [made.make_record('dense', 0), made.make_record('moe', 1, **changes)]
  with pytest.raises(UserError) as error:
    comparable.check_comparable(made.make_study(may_differ=MAY_DIFFER), records)
  assert all(word in str(error.value) for word in words), error.value


def test_seeds_of_one_arm_are_compared_too():
  records = [made.make_record('moe', 0), made.make_record('moe', 1, data=OTHER_BOTH)]
  with pytest.raises(UserError, match=r'moe \(seed 0\).*moe \(seed 1\)'):
    comparable.check_comparable(made.make_study(), records)


def test_other_tokenizers_excuse_no_other_text():
  study = made.make_study(may_differ=('tokenizer',))
  with pytest.raises(UserError, match=r'data\.name'):
    comparable.check_comparable(
      study, [made.make_record('dense', 0), made.make_record('moe', 1, data=OTHER_BOTH)]
    )
  other_text = {**made.make_record().data, 'fingerprint': 'e' * 64}
  with pytest.raises(UserError, match='data fingerprint'):
    comparable.check_comparable(
      study, [made.make_record('dense', 0), made.make_record('moe', 1, data=other_text)]
    )


def test_a_percent_of_compute_and_tokens_is_no_difference():
  # 1% of FLOPs, by tokens that padding changed and by widths that are whole numbers.
  records = [
    made.make_record('dense', 0),
    made.make_record('dense', 1, tokens=804_000),
    made.make_record('moe', 0, flops_per_token=2_411_000),
  ]
  comparable.check_comparable(made.make_study(), records)
  # Each is within 1% of the first, not of each other.
  records = [
    made.make_record('dense', 0),
    made.make_record('dense', 1, flops_per_token=2_380_000),
    made.make_record('moe', 0, flops_per_token=2_420_000),
  ]
  with pytest.raises(UserError, match=r'dense \(seed 1\).*moe \(seed 0\)'):
    comparable.check_comparable(made.make_study(), records)


def test_what_did_not_finish_is_not_compared():
  other = {'step': 3, 'num_steps': 500, 'tokens': 7, 'data': OTHER_BOTH, 'flops_per_token': 1}
  records = [made.make_record('dense', 0), made.make_record('moe', 0, status=FAILED, **other)]
  comparable.check_comparable(made.make_study(), records)
  comparable.check_comparable(made.make_study(), [])
