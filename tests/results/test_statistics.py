"""Intervals, paired differences and Holm's correction: by hand, and by simulation.

Tolerances of simulations are 4 standard errors of a binomial share, with fixed seeds.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from moe_jax.results import statistics

# Quantiles of Student's t at 0.975, from a printed table.
T_1, T_2 = 12.7062, 4.30265


def test_t_interval_by_hand():
  # Mean 4. Deviations -2, 0, 2: variance 8 / 2 = 4, standard error 2 / sqrt(3) = 1.1547, half width
  # 4.30265 * 1.1547 = 4.9683.
  interval = statistics.mean_interval([2.0, 4.0, 6.0])
  assert interval.num == 3 and interval.mean == 4
  np.testing.assert_allclose([interval.low, interval.high], [4 - 4.9683, 4 + 4.9683], atol=1e-3)
  np.testing.assert_allclose(interval.half_width, T_2 * 2 / math.sqrt(3), rtol=1e-4)
  # At level 0.9 the quantile is 2.920.
  np.testing.assert_allclose(
    statistics.mean_interval([2.0, 4.0, 6.0], level=0.9).half_width,
    2.920 * 2 / math.sqrt(3),
    rtol=1e-4,
  )
  # Two values: mean 1, variance 2, standard error 1.
  np.testing.assert_allclose(
    statistics.mean_interval([0.0, 2.0])[:3], [1, 1 - T_1, 1 + T_1], rtol=1e-4
  )


@pytest.mark.parametrize('interval', [statistics.mean_interval, statistics.bootstrap_interval])
def test_fewer_than_two_values_have_no_limits(interval):
  one = interval([2.5])
  assert one.mean == 2.5 and one.num == 1
  assert math.isnan(one.low) and math.isnan(one.high) and math.isnan(one.half_width)
  none = interval([])
  assert none.num == 0 and all(math.isnan(number) for number in none[:3])


@pytest.mark.parametrize('interval', [statistics.mean_interval, statistics.bootstrap_interval])
def test_equal_values_give_an_interval_of_width_0(interval):
  assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5, 3)


def test_bootstrap_limits_of_few_values_are_their_extremes():
  # 1 of 27 samples of 3 is the smallest thrice, 3.7% and more than 2.5%; of 4 only 1 in 256.
  assert statistics.bootstrap_interval([1.0, 5.0, 3.0]) == (3, 1, 5, 3)
  assert statistics.bootstrap_interval([1.0, 2.0]) == (1.5, 1, 2, 2)
  assert statistics.bootstrap_interval([1.0, 2.0, 3.0, 4.0]).low > 1


def test_bootstrap_against_all_samples():
  values = [0.3, 1.7, 2.2, 4.0, 9.0]
  means = [np.mean(sample) for sample in itertools.product(values, repeat=5)]
  interval = statistics.bootstrap_interval(values, level=0.9, num_resamples=40_000)
  np.testing.assert_allclose(interval[:3], [3.44, *np.quantile(means, [0.05, 0.95])], atol=0.06)


def test_bootstrap_of_many_values_agrees_with_scipy():
  values = np.random.default_rng(0).gamma(2, size=200)
  theirs = scipy.stats.bootstrap((values,), np.mean, method='percentile', rng=1).confidence_interval
  ours = statistics.bootstrap_interval(values.tolist())
  np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], atol=0.02)


def test_bootstrap_depends_on_its_seed_alone():
  values = [0.3, 1.7, 2.2, 4.0, 9.0]
  draw = lambda seed: statistics.bootstrap_interval(values, seed=seed, num_resamples=50)  # noqa: E731
  assert draw(1) == draw(1) != draw(2)


def test_paired_difference_by_hand():
  # Seeds 1, 2, 3 are in both; differences -1, -2, -3: mean -2, deviation 1, standard error
  # 1 / sqrt(3), t = -2 sqrt(3). With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2)
  # = 1 - sqrt(12 / 14).
  arm = {3: 4.0, 1: 2.0, 2: 3.0, 7: 100.0}
  baseline = {1: 3.0, 2: 5.0, 3: 7.0, 0: -100.0}
  difference = statistics.paired_difference(arm, baseline)
  np.testing.assert_allclose(difference.p_value, 1 - math.sqrt(12 / 14))
  half = T_2 / math.sqrt(3)
  np.testing.assert_allclose(difference.interval, [-2, -2 - half, -2 + half, 3], rtol=1e-4)
  assert difference.bootstrap == (-2, -3, -1, 3)
  assert difference.unpaired == (0, 7)
  other = statistics.paired_difference(baseline, arm)
  assert other.interval.mean == 2 and other.p_value == difference.p_value


def test_paired_difference_against_scipy():
  arm, baseline = np.random.default_rng(3).normal(size=(2, 6))
  theirs = scipy.stats.ttest_rel(arm, baseline)
  ours = statistics.paired_difference(_by_seed(arm), _by_seed(baseline))
  np.testing.assert_allclose(ours.p_value, theirs.pvalue)
  interval = theirs.confidence_interval(0.95)
  np.testing.assert_allclose(ours.interval[1:3], [interval.low, interval.high])


def test_paired_difference_has_one_level_for_both_intervals():
  baseline = dict.fromkeys(range(4), 0.0)
  arm = {0: 1.0, 1: 2.0, 2: 4.0, 3: 8.0}
  difference = statistics.paired_difference(arm, baseline, level=0.5, num_resamples=500)
  values = [1.0, 2.0, 4.0, 8.0]
  assert difference.interval == statistics.mean_interval(values, 0.5)
  assert difference.bootstrap == statistics.bootstrap_interval(values, 0.5, num_resamples=500)


def test_quickstart_against_its_dense_twin():
  # experiments/LOG.md, worked out there: mean 0.0216, 95% interval -0.003 to 0.046.
  moe, dense = [2.2820, 2.2784, 2.2588], [2.2923, 2.3052, 2.2866]
  difference = statistics.paired_difference(_by_seed(dense), _by_seed(moe))
  np.testing.assert_allclose(difference.interval[:3], [0.0216, -0.003, 0.046], atol=5e-4)
  assert 0.05 < difference.p_value < 0.1


def test_differences_that_do_not_vary():
  same = {0: 2.25, 1: 2.5}
  assert statistics.paired_difference(same, same).p_value == 1
  # 0.3 - 0.1 and 1.3 - 1.1 differ by rounding alone.
  shifted = statistics.paired_difference({0: 0.3, 1: 1.3}, {0: 0.1, 1: 1.1})
  assert math.isnan(shifted.p_value)
  np.testing.assert_allclose(shifted.interval.mean, 0.2)
  # Small is not equal.
  tiny = statistics.paired_difference({0: 1e-9, 1: 3e-9, 2: 2e-9}, {0: 0.0, 1: 0.0, 2: 0.0})
  np.testing.assert_allclose(tiny.p_value, 1 - math.sqrt(12 / 14))


@pytest.mark.parametrize(('arm', 'num'), [({5: 1.0}, 0), ({0: 1.0}, 1), ({}, 0)])
def test_fewer_than_two_pairs_have_no_p_value(arm, num):
  difference = statistics.paired_difference(arm, {0: 2.0, 1: 2.0})
  assert math.isnan(difference.p_value) and math.isnan(difference.interval.low)
  assert difference.interval.num == difference.bootstrap.num == num


def test_holm_by_hand():
  # m = 4, sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 is 0.04, 0.06, 0.06, 0.5.
  np.testing.assert_allclose(statistics.holm([0.03, 0.01, 0.5, 0.02]), [0.06, 0.04, 0.5, 0.06])
  # 3 * 0.02 = 0.06 is more than 2 * 0.025 = 0.05, which is raised to it; 3 * 0.6 is cut to 1.
  np.testing.assert_allclose(statistics.holm([0.02, 0.025, 0.9]), [0.06, 0.06, 0.9])
  np.testing.assert_allclose(statistics.holm([0.6, 0.7, 0.8]), [1, 1, 1])
  assert statistics.holm([]) == [] and statistics.holm([0.03]) == [0.03]


def test_holm_counts_what_could_not_be_tested():
  # As if the NaN were a 1: 3 * 0.01 and 2 * 0.02.
  adjusted = statistics.holm([math.nan, 0.02, 0.01])
  assert math.isnan(adjusted[0])
  np.testing.assert_allclose(adjusted[1:], [0.04, 0.03])
  np.testing.assert_allclose(adjusted[1:], statistics.holm([1.0, 0.02, 0.01])[1:])


def test_holm_keeps_order_and_never_lowers():
  rng = np.random.default_rng(0)
  for _ in range(50):
    p = rng.beta(0.3, 1, size=rng.integers(1, 8))
    adjusted = np.array(statistics.holm(p.tolist()))
    assert np.all(adjusted >= p) and np.all(adjusted <= 1)
    assert np.all(np.diff(adjusted[np.argsort(p)]) >= 0)


@pytest.mark.parametrize('num', [3, 5])
def test_t_interval_covers_as_often_as_it_says(num):
  samples = np.random.default_rng(num).normal(2.0, 0.3, (4000, num))
  intervals = [statistics.mean_interval(row) for row in samples.tolist()]
  _check_share([low <= 2 <= high for _, low, high, _ in intervals], 0.95)


@pytest.mark.parametrize(('num', 'coverage'), [(2, 0.5), (3, 0.75), (4, 0.80), (5, 0.836)])
def test_bootstrap_covers_less_often_than_it_says(num, coverage):
  # As its docstring has it; the first two exactly 1 - 2 / 2^n.
  samples = np.random.default_rng(num).normal(2.0, 0.3, (2000, num))
  intervals = [statistics.bootstrap_interval(row, num_resamples=1000) for row in samples.tolist()]
  covered = [low <= 2 <= high for _, low, high, _ in intervals]
  _check_share(covered, coverage)
  assert np.mean(covered) < 0.9


def test_a_planted_effect_is_found():
  # What seeds share (deviation 0.5) cancels in pairs; left are deviations of 0.01 in each arm. The
  # effect of 0.1 is 7 standard deviations of a difference.
  rng = np.random.default_rng(0)
  found, covered = [], []
  for _ in range(300):
    shared = rng.normal(2.0, 0.5, 3)
    arm, baseline = shared - 0.1 + rng.normal(0, 0.01, 3), shared + rng.normal(0, 0.01, 3)
    difference = statistics.paired_difference(_by_seed(arm), _by_seed(baseline), num_resamples=10)
    found.append(difference.p_value < 0.05 and difference.interval.mean < 0)
    covered.append(difference.interval.low <= -0.1 <= difference.interval.high)
  assert np.mean(found) > 0.9
  _check_share(covered, 0.95)


def test_planted_nulls_are_significant_in_5_percent_of_families():
  # 4 independent true nulls: without correction 1 - 0.95^4 = 18.5% of families have a false
  # positive, with Holm's 1 - (1 - 0.05 / 4)^4 = 4.9%.
  rng = np.random.default_rng(1)
  raw, adjusted = [], []
  for _ in range(1500):
    p_values = [
      statistics.paired_difference(_by_seed(arm), _by_seed(baseline), num_resamples=2).p_value
      for arm, baseline in rng.normal(2.0, 0.1, (4, 2, 3))
    ]
    raw.append(min(p_values) < 0.05)
    adjusted.append(min(statistics.holm(p_values)) < 0.05)
  _check_share(adjusted, 0.049)
  _check_share(raw, 0.185)


def test_a_planted_effect_among_nulls_keeps_the_nulls_at_5_percent():
  # With one effect that is always found, Holm's asks of 3 nulls 0.05 / 3: 4.9% again.
  rng = np.random.default_rng(2)
  false, found = [], []
  for _ in range(1500):
    differences = rng.normal(0, 0.1, (4, 5)) + np.array([[5.0], [0], [0], [0]])
    p_values = [
      statistics.paired_difference(_by_seed(row), _by_seed(0 * row), num_resamples=2).p_value
      for row in differences
    ]
    first, *nulls = statistics.holm(p_values)
    found.append(first < 0.05)
    false.append(min(nulls) < 0.05)
  assert np.mean(found) > 0.99
  _check_share(false, 0.049)


def _by_seed(values) -> dict[int, float]:
  return {seed: float(value) for seed, value in enumerate(values)}


def _check_share(happened, expected):
  """Checks a share against the 4 standard errors within which a binomial one falls."""
  error = math.sqrt(expected * (1 - expected) / len(happened))
  assert abs(np.mean(happened) - expected) < 4 * error, (np.mean(happened), expected, error)


def test_equivalence_by_hand():
  # Differences 0.1, 0.2, 0.3, 0.0, 0.15: mean 0.15, deviations -0.05, 0.05, 0.15, -0.15, 0 with
  # squares 0.0025 + 0.0025 + 0.0225 + 0.0225 = 0.05: variance 0.05 / 4, standard error
  # sqrt(0.0125 / 5) = 0.05. The quantile of t at 0.95 with 4 degrees of freedom is 2.13185, so the
  # 90% interval is 0.15 -+ 0.10659.
  arm, baseline = [1.1, 1.2, 1.3, 1.0, 1.15], dict.fromkeys(range(5), 1.0)
  within = statistics.paired_difference(_by_seed(arm), baseline, margin=0.26)
  np.testing.assert_allclose(within.within, [0.15, 0.15 - 0.10659, 0.15 + 0.10659, 5], atol=1e-5)
  # Against 0.26 t = -0.11 / 0.05 = -2.2, against -0.26 t = 8.2: the larger p-value is the former's.
  np.testing.assert_allclose(within.equivalence_p_value, scipy.stats.t.sf(2.2, 4))
  assert within.equivalence_p_value < 0.05
  # The interval ends at 0.25659: a margin below it is not shown.
  beyond = statistics.paired_difference(_by_seed(arm), baseline, margin=0.25)
  np.testing.assert_allclose(beyond.equivalence_p_value, scipy.stats.t.sf(2.0, 4))
  assert beyond.equivalence_p_value > 0.05
  # The same downwards, and nothing without a margin.
  mirrored = statistics.paired_difference(baseline, _by_seed(arm), margin=0.26)
  np.testing.assert_allclose(mirrored.equivalence_p_value, within.equivalence_p_value)
  assert math.isnan(statistics.paired_difference(_by_seed(arm), baseline).equivalence_p_value)


@pytest.mark.parametrize('margin', [0.05, 0.3, 1.0, 2.0])
def test_equivalence_against_two_tests_of_scipy(margin):
  arm, baseline = np.random.default_rng(4).normal(size=(2, 7))
  above = scipy.stats.ttest_1samp(arm - baseline, -margin, alternative='greater').pvalue
  below = scipy.stats.ttest_1samp(arm - baseline, margin, alternative='less').pvalue
  ours = statistics.paired_difference(_by_seed(arm), _by_seed(baseline), margin=margin)
  np.testing.assert_allclose(ours.equivalence_p_value, max(above, below))
  inside = -margin < ours.within.low and ours.within.high < margin
  assert (ours.equivalence_p_value < 0.05) == inside


def test_no_equivalence_is_shown_by_one_pair_or_by_differences_that_do_not_vary():
  for arm in ([1.0], [1.5, 1.5, 1.5]):
    baseline = dict.fromkeys(range(len(arm)), 1.0)
    difference = statistics.paired_difference(_by_seed(arm), baseline, margin=9.0)
    assert math.isnan(difference.equivalence_p_value)
