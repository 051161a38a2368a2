"""The summary of hand-made studies: every number by hand, and nothing left out."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.results import summary
from moe_jax.results.records import DIVERGED, FAILED, FINISHED, MISSING, UNFINISHED
from moe_jax.study import Comparison, Metric, Point
from tests.results import made

VALUES = {'dense': [3.0, 5.0, 7.0], 'moe': [2.0, 3.0, 4.0]}


def test_values_intervals_and_differences():
  study = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  result = summary.summarize(study, list(reversed(made.make_records(VALUES))))
  dense, moe = result.arms
  assert (dense.name, moe.name) == ('dense', 'moe')
  assert moe.values == {0: 2.0, 1: 3.0, 2: 4.0} and list(moe.values) == [0, 1, 2]
  # Deviation 1: half width 4.303 / sqrt(3).
  np.testing.assert_allclose(moe.interval, [3, 0.516, 5.484, 3], atol=1e-3)
  assert moe.bootstrap == (3, 2, 4, 3)
  assert moe.statuses == {FINISHED: 3} and moe.absent == ()
  assert dense.difference is None
  # Differences -1, -2, -3: p = 1 - sqrt(12 / 14), as in test_statistics.py.
  assert moe.difference is not None and moe.difference.interval.mean == -2
  (comparison,) = result.comparisons
  assert comparison.difference == moe.difference
  np.testing.assert_allclose(comparison.adjusted_p_value, 1 - math.sqrt(12 / 14))
  assert result.study is study and result.warnings == ()


def test_without_a_baseline_there_are_no_differences():
  result = summary.summarize(made.make_study(), made.make_records(VALUES))
  assert [arm.difference for arm in result.arms] == [None, None] and result.comparisons == ()


def test_what_is_not_finished_is_counted_and_never_averaged():
  value = {made.METRIC: -1000.0, 'capacity/loss': -1000.0}
  records = [
    made.make_record('moe', 0, 2.0, metrics={'capacity/loss': 4.0}),
    made.make_record('moe', 3, status=DIVERGED, reason='nan', step=40),
    made.make_record('moe', 1, status=FAILED, reason='no space', step=10),
    # One whose metrics were read before it went on.
    made.make_record('moe', 4, status=UNFINISHED, reason='stopped', step=50),
    made.make_record('moe', 5, metrics={made.METRIC: math.nan}),
    made.make_record('moe', 6, metrics={}, value=None),
    *made.make_records({'dense': [2.0] * 8}),
  ]
  records = [
    record if record.status == FINISHED else replace(record, metrics=value) for record in records
  ]
  result = summary.summarize(made.make_study(seeds=tuple(range(8))), records)
  moe = result.arms[1]
  assert moe.values == {0: 2.0} and moe.interval.mean == 2
  assert math.isnan(moe.interval.low) and math.isnan(moe.bootstrap.low)
  assert moe.metrics['capacity/loss'].mean == 4
  assert moe.statuses == {FINISHED: 3, DIVERGED: 1, FAILED: 1, UNFINISHED: 1, MISSING: 2}
  assert moe.absent == (
    summary.Absent(1, FAILED, 'no space', 10, 100),
    summary.Absent(2, MISSING, 'no record'),
    summary.Absent(3, DIVERGED, 'nan', 40, 100),
    summary.Absent(4, UNFINISHED, 'stopped', 50, 100),
    summary.Absent(5, FINISHED, f'{made.METRIC}=nan', 100, 100),
    summary.Absent(6, FINISHED, f'has no {made.METRIC}', 100, 100),
    summary.Absent(7, MISSING, 'no record'),
  )
  assert 'moe: 1 seed, fewer than 3' in result.warnings
  assert 'moe: 1 diverged; the mean is of those that did not' in result.warnings


def test_an_arm_without_any_finished_trial():
  broken = [
    made.make_record('moe', seed, status=DIVERGED, reason='nan', parameters={}, flops_per_token=0)
    for seed in range(3)
  ]
  study = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  result = summary.summarize(study, made.make_records({'dense': [1.0, 2.0, 3.0]}) + broken)
  moe = result.arms[1]
  assert moe.interval.num == 0 and math.isnan(moe.interval.mean)
  assert moe.parameters == {} and moe.metrics == {}
  assert moe.flops_per_token is moe.tokens is moe.tokens_per_expert is None
  assert result.comparisons[0].verdict == summary.UNTESTED
  assert result.warnings == (
    'moe: 0 seeds, fewer than 3',
    'moe minus dense: unpaired seeds left out: 0, 1, 2',
  )


def test_no_records_at_all():
  result = summary.summarize(made.make_study(), [])
  assert [len(arm.absent) for arm in result.arms] == [3, 3]
  assert result.provenance == summary.Provenance((), False, (), (), (), {}, {})


def test_a_dropped_arm_stays_with_its_reason():
  none = Point('none', {'moe.num_experts': 1}, 'K is above E')
  study = made.make_study(('dense', none), baseline='dense')
  result = summary.summarize(study, made.make_records({'dense': [1.0, 2.0, 3.0]}))
  dropped = result.arms[1]
  assert (dropped.name, dropped.dropped) == ('none', 'K is above E')
  assert dropped.absent == () and dropped.statuses == {} and dropped.difference is None
  assert result.warnings == ()


def test_secondary_metrics_are_means_over_seeds():
  per_seed = [
    {'capacity/loss': 1.0, 'capacity/router/drop': [0.25, 0.75], 'capacity/router/load': [[1.0]]},
    {'capacity/loss': 3.0, 'capacity/router/drop': [0.0, 0.5], 'capacity/dead': 2},
  ]
  records = [
    made.make_record('dense', seed, 2.0, metrics=metrics) for seed, metrics in enumerate(per_seed)
  ]
  metrics = summary.summarize(made.make_study(['dense']), records).arms[0].metrics
  means = {name: (interval.mean, interval.num) for name, interval in metrics.items()}
  assert means == {
    'capacity/dead': (2, 1),
    'capacity/loss': (2, 2),
    # Means over layers 0.5 and 0.25, maxima 0.75 and 0.5.
    'capacity/router/drop/mean': (0.375, 2),
    'capacity/router/drop/max': (0.625, 2),
    made.METRIC: (2, 2),
  }
  assert list(metrics) == sorted(metrics)


@pytest.mark.parametrize(
  ('moe', 'share'),
  [
    ({'num_experts': 0}, 1.0),
    ({'num_experts': 8, 'num_selected_experts': 2}, 0.25),
    ({'num_experts': 8, 'num_selected_experts': 2, 'router': 'dense'}, 1.0),
    ({'num_experts': 64, 'num_selected_experts': 1, 'router': 'hash'}, 1 / 64),
  ],
)
def test_training_tokens_of_an_expert(moe, share):
  config = made.make_config(**moe)
  records = [
    made.make_record('dense', 0, config=config, tokens=800_000),
    made.make_record('dense', 1, config=config, tokens=800_100),
    made.make_record('dense', 2, config=config, tokens=400, status=DIVERGED, step=1),
  ]
  arm = summary.summarize(made.make_study(['dense']), records).arms[0]
  assert arm.tokens == 800_050 and arm.tokens_per_expert == 800_050 * share
  assert arm.parameters == {'total': 1_200_000, 'active': 400_000}
  assert arm.flops_per_token == 2_400_000


def test_verdicts():
  # Differences to dense: -1 with deviation 0.01 (p about 3e-5); the same upwards; 0.5 with
  # deviation 1; all 1, no p-value.
  values = {
    'dense': [3.0, 4.0, 5.0],
    'low': [2.01, 3.0, 3.99],
    'high': [4.01, 5.0, 5.99],
    'noisy': [2.5, 4.5, 6.5],
    'shifted': [4.0, 5.0, 6.0],
  }
  comparisons = tuple(Comparison(arm, 'dense') for arm in ('low', 'high', 'noisy', 'shifted'))
  study = made.make_study(tuple(values), comparisons=comparisons)
  result = summary.summarize(study, made.make_records(values))
  verdicts = [comparison.verdict for comparison in result.comparisons]
  assert verdicts == [summary.BETTER, summary.WORSE, summary.UNDECIDED, summary.UNTESTED]
  # Holm's over 4, the untested one included.
  low, high, noisy, shifted = result.comparisons
  np.testing.assert_allclose(low.adjusted_p_value, 4 * low.difference.p_value)
  np.testing.assert_allclose(noisy.adjusted_p_value, 2 * noisy.difference.p_value)
  assert math.isnan(shifted.adjusted_p_value)
  higher = made.make_study(
    tuple(values), comparisons=comparisons, metric=Metric(made.METRIC, 'points', False)
  )
  verdicts = [c.verdict for c in summary.summarize(higher, made.make_records(values)).comparisons]
  assert verdicts == [summary.WORSE, summary.BETTER, summary.UNDECIDED, summary.UNTESTED]


def test_a_verdict_takes_the_adjusted_p_value():
  # Differences -1 with deviation 0.3: t = 5.77, p = 0.029; of 2 comparisons adjusted to 0.057.
  values = {'dense': [3.0, 4.0, 5.0], 'moe': [1.7, 3.0, 4.3], 'other': [2.0, 4.0, 6.0]}
  one = made.make_study(tuple(values), comparisons=(Comparison('moe', 'dense'),))
  assert summary.summarize(one, made.make_records(values)).comparisons[0].verdict == summary.BETTER
  two = made.make_study(
    tuple(values), comparisons=(Comparison('moe', 'dense'), Comparison('other', 'dense'))
  )
  assert (
    summary.summarize(two, made.make_records(values)).comparisons[0].verdict == summary.UNDECIDED
  )


def test_verdicts_of_equivalence():
  # To dense: 0.001 -+ 0.0012 (deviation 0.0005): not told apart; 0.01 with deviation 0.0001: told
  # apart; 0.5: beyond the margin; 0.05 with deviation 0.1: the interval reaches beyond it.
  values = {
    'dense': [3.0, 4.0, 5.0],
    'same': [3.0005, 4.0015, 5.0],
    'close': [3.0099, 4.01, 5.0101],
    'far': [3.49, 4.5, 5.51],
    'noisy': [2.95, 4.05, 5.15],
  }
  comparisons = tuple(Comparison(arm, 'dense') for arm in list(values)[1:])
  study = made.make_study(tuple(values), comparisons=comparisons, equivalence_margin=0.1)
  result = summary.summarize(study, made.make_records(values))
  assert [comparison.verdict for comparison in result.comparisons] == [
    summary.EQUIVALENT,
    summary.WORSE_BUT_EQUIVALENT,
    summary.WORSE,
    summary.UNDECIDED,
  ]
  # Holm's over 4: the smallest p-value is that of `close`.
  close = result.comparisons[1]
  np.testing.assert_allclose(
    close.adjusted_equivalence_p_value, 4 * close.difference.equivalence_p_value
  )
  without = summary.summarize(replace(study, equivalence_margin=None), made.make_records(values))
  assert [comparison.verdict for comparison in without.comparisons] == [
    summary.UNDECIDED,
    summary.WORSE,
    summary.WORSE,
    summary.UNDECIDED,
  ]


@pytest.mark.parametrize('margin', [0, -0.1, math.nan, math.inf, True])
def test_a_margin_is_a_number_above_0(margin):
  with pytest.raises(UserError, match='study.equivalence_margin='):
    summary.summarize(made.make_study(equivalence_margin=margin), [])


@pytest.mark.parametrize(
  ('changes', 'warning'),
  [
    (
      {'git_dirty': True},
      'a checkout had uncommitted changes: its commit does not say what was run',
    ),
    ({'git_commit': 'abc'}, f'trials are of different commits: {made.COMMIT}, abc'),
    ({'git_commit': None}, f'trials are of different commits: {made.COMMIT}, unknown'),
    (
      {'devices': {'platform': 'gpu', 'kind': 'H200', 'count': 1}},
      'trials ran on different devices: 1 x H200 (gpu), 8 x cpu (cpu)',
    ),
    (
      {'config': made.make_config(router='expert_choice')},
      'moe: not causal, a token can depend on later ones (moe.router=expert_choice)',
    ),
    (
      {'config': made.make_config(priority='choice')},
      'moe: not causal, a token can depend on later ones (moe.priority=choice)',
    ),
  ],
)
def test_warnings_of_provenance(changes, warning):
  records = made.make_records(VALUES)
  records[-1] = replace(records[-1], **changes)
  assert summary.summarize(made.make_study(), records).warnings == (warning,)
  # Of what is not averaged they say nothing, except that an arm is not causal.
  records[-1] = replace(records[-1], status=FAILED)
  assert (warning in summary.summarize(made.make_study(), records).warnings) == (
    'config' in changes
  )


def test_warnings_of_unknown_commit_and_data():
  records = [replace(record, git_commit=None, data={}) for record in made.make_records(VALUES)]
  assert summary.summarize(made.make_study(), records).warnings == (
    'the commit is unknown',
    'a trial does not say which data it was trained on',
  )


def test_warnings_of_seeds():
  values = {'dense': [1.0, 2.0, 4.0], 'moe': [1.0, 1.0]}
  for fields in ({'baseline': 'dense'}, {'comparisons': (Comparison('moe', 'dense'),)}):
    result = summary.summarize(made.make_study(**fields), made.make_records(values))
    assert result.warnings == (
      'moe: 2 seeds, fewer than 3',
      'moe: all seeds have the same value',
      'moe minus dense: unpaired seeds left out: 2',
    )
  both = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  assert summary.summarize(both, made.make_records(values)).warnings == result.warnings


def test_a_warning_of_metrics_per_token_under_two_tokenizers():
  records = made.make_records(VALUES)
  records[-1] = replace(records[-1], data=made.OTHER_TOKENIZER, metrics={'dropless/loss': 1.0})
  for name, num in (('dropless/loss', 1), (made.METRIC, 0)):
    study = made.make_study(may_differ=('tokenizer',), metric=Metric(name, 'nats'))
    warnings = summary.summarize(study, records).warnings
    assert len([w for w in warnings if 'tokenizers differ' in w]) == num


def test_provenance():
  records = made.make_records(VALUES)
  records[0] = replace(records[0], config=made.make_config(num_experts=4))
  of = summary.summarize(made.make_study(), records).provenance
  assert of.commits == (made.COMMIT,) and not of.dirty and of.devices == ('8 x cpu (cpu)',)
  assert of.data == (made.make_record().data,)
  assert of.config['model.num_layers'] == 2 and 'moe.num_experts' not in of.config
  assert of.not_causal == {}


def test_a_config_of_another_version_is_no_obstacle():
  moe = {'num_experts': 4, 'num_selected_experts': 1, 'priority': 'token'}
  for config, share in (
    ({'moe': moe | {'router': 'of_the_future'}}, 0.25),
    ({'moe': moe}, 0.25),
    ({'moe': {}}, 1),
    ({}, 1),
  ):
    result = summary.summarize(made.make_study(['dense']), [made.make_record(config=config)])
    assert result.arms[0].tokens_per_expert == share * 800_000
