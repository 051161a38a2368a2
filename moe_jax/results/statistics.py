"""Means over seeds with intervals, paired differences, and Holm's correction.

A value is one trained model. Student's t takes values (or differences of pairs) as draws from a
normal distribution; with 3 seeds that cannot be checked, and no other interval does better there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

LEVEL = 0.95
# Of the interval that lies within the margin exactly if both one-sided tests at 5% reject.
EQUIVALENCE_LEVEL = 0.9
NUM_RESAMPLES = 10_000


class Interval(NamedTuple):
  """A mean and where the mean of ever more seeds would lie.

  Attributes:
    mean: NaN without values.
    low: lower limit; NaN with fewer than 2 values.
    high: upper limit; likewise.
    num: of values.
  """

  mean: float
  low: float
  high: float
  num: int

  @property
  def half_width(self) -> float:
    """Half the distance between the limits."""
    return (self.high - self.low) / 2


class Difference(NamedTuple):
  """An arm minus its baseline, over the seeds that both have.

  Attributes:
    interval: of the mean difference, by Student's t.
    bootstrap: of the same, by `bootstrap_interval`; it decides nothing.
    p_value: of the two-sided paired t-test; NaN where there is none.
    unpaired: seeds that only one of the two has; they count for nothing here.
    within: the interval of the mean difference at `EQUIVALENCE_LEVEL`.
    equivalence_p_value: of two one-sided tests against a margin; NaN where there is none.
  """

  interval: Interval
  bootstrap: Interval
  p_value: float
  unpaired: tuple[int, ...]
  within: Interval = Interval(math.nan, math.nan, math.nan, 0)
  equivalence_p_value: float = math.nan


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
  """Returns the mean and its interval by Student's t, with n - 1 degrees of freedom.

  Exact for normal values. Equal values give an interval of width 0: that is what the formula says,
  and more likely a seed without effect than certainty.

  Args:
    values: one for each seed.
    level: probability that the interval covers the mean.
  """
  num = len(values)
  if num < 2:
    return _without_limits(values)
  mean, half = float(np.mean(values)), float(half_width(values, level))
  return Interval(mean, mean - half, mean + half, num)


def half_width(values: ArrayLike, level: float = LEVEL) -> np.ndarray:
  """Returns half the width of `mean_interval` over the first axis; NaN of a single value."""
  values = np.asarray(values, np.float64)
  num = len(values)
  if num < 2:
    return np.full(values.shape[1:], np.nan)
  quantile = float(scipy.stats.t.ppf((1 + level) / 2, num - 1))
  return np.asarray(quantile * np.std(values, 0, ddof=1) / math.sqrt(num))


def bootstrap_interval(
  values: Sequence[float],
  level: float = LEVEL,
  seed: int = 0,
  num_resamples: int = NUM_RESAMPLES,
) -> Interval:
  """Returns the mean and its interval by the percentile bootstrap.

  The limits are quantiles of the means of samples drawn from the values with replacement. Of few
  values it is too narrow: one sample of 3 in 27 is the smallest value three times, more than 2.5%,
  so at level 0.95 the limits of 2 or 3 values are the smallest and the largest, which cover the
  mean of a symmetric distribution with probability 1 - 2 / 2^n: 50% and 75%. Of normal values it
  covers 80% for n = 4, 84% for 5, 90% for 10 (`tests/results/test_statistics.py`). BCa estimates
  two corrections from the same few values, and studentized samples of 3 are often constant.

  Args:
    values: one for each seed.
    level: nominal.
    seed: of the resamples.
    num_resamples: drawn.
  """
  num = len(values)
  if num < 2:
    return _without_limits(values)
  rng = np.random.default_rng(seed)
  drawn = rng.choice(np.asarray(values, np.float64), (num_resamples, num))
  low, high = np.quantile(np.mean(drawn, axis=1), [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(np.mean(values)), float(low), float(high), num)


def paired_difference(
  arm: Mapping[int, float],
  baseline: Mapping[int, float],
  level: float = LEVEL,
  num_resamples: int = NUM_RESAMPLES,
  *,
  margin: float | None = None,
) -> Difference:
  """Returns the mean of arm minus baseline over the seeds of both.

  Where all differences are equal there is no t: the p-value is 1 if they are 0, else NaN, because
  a difference that no seed moves says that the seeds are not draws, not that it is certain.
  Equality is up to the rounding of the subtractions.

  Args:
    arm: value by seed.
    baseline: value by seed.
    level: of both intervals.
    num_resamples: of the bootstrap.
    margin: differences below it in size count as equivalent; None for no such test.
  """
  seeds = sorted(arm.keys() & baseline.keys())
  differences = [arm[seed] - baseline[seed] for seed in seeds]
  largest = max((max(abs(arm[s]), abs(baseline[s])) for s in seeds), default=0.0)
  rounding = 4 * float(np.finfo(np.float64).eps) * largest
  return Difference(
    mean_interval(differences, level),
    bootstrap_interval(differences, level, num_resamples=num_resamples),
    _p_value(differences, rounding),
    tuple(sorted(arm.keys() ^ baseline.keys())),
    mean_interval(differences, EQUIVALENCE_LEVEL),
    math.nan if margin is None else _equivalence_p_value(differences, margin, rounding),
  )


def holm(p_values: Sequence[float]) -> list[float]:
  """Returns p-values adjusted so that the chance of any false positive is that of one test.

  The k-th smallest of m is multiplied by m - k + 1, is at least the one before it and at most 1. A
  NaN stays NaN and counts in m: a comparison that was planned and could not be made makes the
  others no easier.

  Source: Holm 1979, A simple sequentially rejective multiple test procedure.
  """
  adjusted = [math.nan] * len(p_values)
  defined = [index for index, p in enumerate(p_values) if not math.isnan(p)]
  smallest = 0.0
  for rank, index in enumerate(sorted(defined, key=lambda index: p_values[index])):
    smallest = max(smallest, min(1.0, (len(p_values) - rank) * p_values[index]))
    adjusted[index] = smallest
  return adjusted


def _p_value(differences: Sequence[float], rounding: float) -> float:
  num = len(differences)
  if num < 2:
    return math.nan
  mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
  if deviation <= rounding:
    return 1.0 if abs(mean) <= rounding else math.nan
  return float(2 * scipy.stats.t.sf(abs(mean) / (deviation / math.sqrt(num)), num - 1))


def _equivalence_p_value(differences: Sequence[float], margin: float, rounding: float) -> float:
  """Returns the larger p-value of two one-sided t-tests, that the mean is -margin, and margin.

  Below 0.05 exactly if the interval at `EQUIVALENCE_LEVEL` lies within (-margin, margin). NaN where
  the differences do not vary, as they are then no draws.

  Source: Schuirmann 1987, A comparison of the two one-sided tests procedure and the power approach
  for assessing the equivalence of average bioavailability.
  """
  num = len(differences)
  if num < 2:
    return math.nan
  mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
  if deviation <= rounding:
    return math.nan
  return float(scipy.stats.t.cdf((abs(mean) - margin) / (deviation / math.sqrt(num)), num - 1))


def _without_limits(values: Sequence[float]) -> Interval:
  mean = float(values[0]) if len(values) else math.nan
  return Interval(mean, math.nan, math.nan, len(values))
