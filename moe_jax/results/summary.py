"""From the records of a study to its statistics: what tables show, and what they must not hide."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from moe_jax import routing
from moe_jax.results.comparable import check_arms, check_comparable, check_records
from moe_jax.results.provenance import Provenance, provenance_of
from moe_jax.results.records import DIVERGED, FINISHED, MISSING, Record
from moe_jax.results.statistics import (
  Difference,
  Interval,
  bootstrap_interval,
  holm,
  mean_interval,
  paired_difference,
)
from moe_jax.study import Metric, Point, Study, own_labels

# Of adjusted p-values: below, a comparison has a winner.
SIGNIFICANCE = 0.05
# Seeds below which a summary warns: the quantile of t falls from 12.7 with 2 to 4.3 with 3.
MIN_SEEDS = 3

# Verdict of a planned comparison on its arm. Better or worse: the difference is significant.
# Equivalent: it is significantly below the margin of the study; both may hold, of a difference that
# is there and does not matter. Undecided: neither, the interval is all that can be said. Untested:
# fewer than 2 pairs, or differences that do not vary.
BETTER = 'better'
WORSE = 'worse'
EQUIVALENT = 'equivalent'
BETTER_BUT_EQUIVALENT = f'{BETTER}, {EQUIVALENT}'
WORSE_BUT_EQUIVALENT = f'{WORSE}, {EQUIVALENT}'
UNDECIDED = 'undecided'
UNTESTED = 'untested'


@dataclasses.dataclass(frozen=True)
class Absent:
  """A trial without a value of the deciding metric: shown, never averaged.

  Attributes:
    seed: of the trial.
    status: of its record; `missing` if there is none.
    reason: why it has no value.
    step: optimizer steps done.
    num_steps: of its config; 0 if unknown.
  """

  seed: int
  status: str
  reason: str
  step: int = 0
  num_steps: int = 0


@dataclasses.dataclass(frozen=True)
class ArmSummary:
  """An arm over its seeds.

  Attributes:
    name: of the arm.
    changes: config fields with their values.
    dropped: why the study does not run it; empty if it does.
    values: the deciding metric by seed, of finished trials.
    interval: of their mean, by Student's t.
    bootstrap: the same by the bootstrap; it decides nothing.
    statuses: number of trials by status.
    absent: trials that `values` lacks, by seed.
    metrics: of finished trials, any metric by its name; of a list over layers the mean and the
      maximum over layers, as 'NAME/mean' and 'NAME/max'. Loads, lists of lists, are not in it.
    parameters: `total` and `active`; {} if no trial began.
    flops_per_token: of training; None if no trial began.
    tokens: trained on, mean over finished trials; None without one.
    tokens_per_expert: of these, what an expert of a MoE layer gets under balance: tokens * K / E;
      all of them if the model is dense, or the router sends every token to every expert.
    difference: to the baseline of the study; None if it has none, of itself and of dropped arms.
  """

  name: str
  changes: dict[str, Any]
  dropped: str
  values: dict[int, float]
  interval: Interval
  bootstrap: Interval
  statuses: dict[str, int]
  absent: tuple[Absent, ...]
  metrics: dict[str, Interval]
  parameters: dict[str, int]
  flops_per_token: int | None
  tokens: float | None
  tokens_per_expert: float | None
  difference: Difference | None = None


@dataclasses.dataclass(frozen=True)
class ComparisonSummary:
  """A planned comparison.

  Attributes:
    arm: compared.
    baseline: subtracted.
    difference: in the unit of the metric.
    adjusted_p_value: Holm's, over all planned comparisons.
    verdict: one of `BETTER` to `UNTESTED`; the arm is better or worse if that is below
      `SIGNIFICANCE`, equivalent if `adjusted_equivalence_p_value` is.
    adjusted_equivalence_p_value: Holm's over all planned comparisons of the tests of equivalence;
      NaN without a margin.
  """

  arm: str
  baseline: str
  difference: Difference
  adjusted_p_value: float
  verdict: str
  adjusted_equivalence_p_value: float = math.nan


@dataclasses.dataclass(frozen=True)
class Summary:
  """A study with its statistics.

  Attributes:
    study: summarized.
    arms: in its order, dropped ones too.
    comparisons: planned, in its order.
    provenance: of finished trials.
    warnings: what a reader should know, a sentence each.
  """

  study: Study
  arms: tuple[ArmSummary, ...]
  comparisons: tuple[ComparisonSummary, ...]
  provenance: Provenance
  warnings: tuple[str, ...]


def summarize(study: Study, records: Sequence[Record]) -> Summary:
  """Returns the statistics of a study.

  A seed of the study without a record counts as missing. Only finished trials have values.

  Args:
    study: the question.
    records: of its trials, in any order.

  Raises:
    UserError: for a trial twice, one that is not of the study, a comparison with an arm that is
      not, or as from `check_comparable`.
  """
  check_records(study, records)
  check_arms(study)
  check_comparable(study, records)
  by_arm: dict[str, list[Record]] = {arm.name: [] for arm in study.arms}
  for record in sorted(records, key=lambda record: record.seed):
    by_arm[record.arm].append(record)
  arms = [_summarize_arm(study, arm, by_arm[arm.name]) for arm in study.arms]
  values = {arm.name: arm.values for arm in arms}
  if study.baseline:
    arms = [
      arm
      if arm.dropped or arm.name == study.baseline
      else dataclasses.replace(
        arm, difference=paired_difference(arm.values, values[study.baseline])
      )
      for arm in arms
    ]
  comparisons = _compare(study, values)
  provenance = provenance_of(records, by_arm)
  warnings = (
    *_warnings(study, arms, comparisons, provenance),
    *_without_own_metrics(study, records),
  )
  return Summary(study, tuple(arms), comparisons, provenance, warnings)


def _summarize_arm(study: Study, arm: Point, records: Sequence[Record]) -> ArmSummary:
  finished = [record for record in records if record.status == FINISHED]
  values, absent = {}, []
  for record in records:
    value = record.metrics.get(study.metric.name) if record.status == FINISHED else None
    if _is_number(value) and math.isfinite(value):
      values[record.seed] = float(value)
    else:
      reason = record.reason
      if record.status == FINISHED:
        name = study.metric.name
        reason = f'has no {name}' if value is None else f'{name}={value}'
        reason = record.metric_errors.get(name, reason)
      absent.append(Absent(record.seed, record.status, reason, record.step, record.num_steps))
  if not arm.dropped:
    known = {record.seed for record in records}
    absent += [Absent(s, MISSING, 'no record') for s in study.seeds if s not in known]
  statuses = collections.Counter(record.status for record in records)
  statuses[MISSING] += len(absent) + len(values) - len(records)
  began = [record for record in records if record.parameters]
  tokens = float(np.mean([record.tokens for record in finished])) if finished else None
  return ArmSummary(
    name=arm.name,
    changes=arm.changes,
    dropped=arm.dropped,
    values=values,
    interval=mean_interval(list(values.values())),
    bootstrap=bootstrap_interval(list(values.values())),
    statuses={status: count for status, count in statuses.items() if count},
    absent=tuple(sorted(absent, key=lambda trial: trial.seed)),
    metrics=_metrics(finished),
    parameters=dict(began[0].parameters) if began else {},
    flops_per_token=began[0].flops_per_token if began else None,
    tokens=tokens,
    tokens_per_expert=None if tokens is None else tokens * _expert_share(finished[0].config),
  )


def _metrics(finished: Sequence[Record]) -> dict[str, Interval]:
  values: dict[str, list[float]] = {}
  for record in finished:
    # The deciding metric may be the mean of a list that is there, too: counted once.
    numbers: dict[str, float] = {}
    for name, value in record.metrics.items():
      if _is_number(value):
        numbers[name] = float(value)
      elif isinstance(value, list) and value and all(_is_number(layer) for layer in value):
        numbers[f'{name}/mean'] = float(np.mean(value))
        numbers[f'{name}/max'] = float(np.max(value))
    for name, number in numbers.items():
      values.setdefault(name, []).append(number)
  return {name: mean_interval(values[name]) for name in sorted(values)}


def _is_number(value: Any) -> TypeGuard[int | float]:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _expert_share(config: dict[str, Any]) -> float:
  """Returns the share of the tokens that one of E balanced experts gets: K / E, 1 without MoE."""
  moe = config.get('moe', {})
  if not moe.get('num_experts'):
    return 1.0
  router = routing.ROUTERS.get(moe.get('router', ''))
  if router is not None and router.keeps_all:
    return 1.0
  return moe['num_selected_experts'] / moe['num_experts']


def _compare(study: Study, values: dict[str, dict[int, float]]) -> tuple[ComparisonSummary, ...]:
  differences = [
    paired_difference(values[c.arm], values[c.baseline], margin=study.equivalence_margin)
    for c in study.comparisons
  ]
  adjusted = holm([difference.p_value for difference in differences])
  equivalence = holm([difference.equivalence_p_value for difference in differences])
  return tuple(
    ComparisonSummary(
      comparison.arm,
      comparison.baseline,
      difference,
      p,
      _verdict(study.metric, difference, p, q),
      q,
    )
    for comparison, difference, p, q in zip(
      study.comparisons, differences, adjusted, equivalence, strict=True
    )
  )


def _verdict(
  metric: Metric, difference: Difference, adjusted_p: float, adjusted_equivalence_p: float
) -> str:
  if math.isnan(adjusted_p):
    return UNTESTED
  equivalent = adjusted_equivalence_p < SIGNIFICANCE
  if adjusted_p >= SIGNIFICANCE:
    return EQUIVALENT if equivalent else UNDECIDED
  if (difference.interval.mean < 0) == metric.lower_is_better:
    return BETTER_BUT_EQUIVALENT if equivalent else BETTER
  return WORSE_BUT_EQUIVALENT if equivalent else WORSE


def _warnings(
  study: Study,
  arms: Sequence[ArmSummary],
  comparisons: Sequence[ComparisonSummary],
  provenance: Provenance,
) -> tuple[str, ...]:
  warnings = []
  if provenance.dirty:
    warnings.append('a checkout had uncommitted changes: its commit does not say what was run')
  if len(provenance.commits) > 1:
    warnings.append(f'trials are of different commits: {", ".join(provenance.commits)}')
  elif provenance.commits == ('unknown',):
    warnings.append('the commit is unknown')
  if len(provenance.devices) > 1:
    warnings.append(f'trials ran on different devices: {", ".join(provenance.devices)}')
  if any(data['fingerprint'] is None for data in provenance.data):
    warnings.append('a trial does not say which data it was trained on')
  tokenizers = {data['tokenizer'] for data in provenance.data}
  if len(tokenizers) > 1 and not study.metric.name.endswith('bits_per_byte'):
    warnings.append(f'{study.metric.name} may be per token, and tokenizers differ')
  labels = own_labels(study)
  for name, field in provenance.not_causal.items():
    warnings.append(
      f'{labels.get(name, name)}: not causal, a token can depend on later ones ({field})'
    )
  for arm in arms:
    if not arm.dropped:
      warnings += _arm_warnings(arm, labels[arm.name])
  pairs = [(c.arm, c.baseline, c.difference) for c in comparisons]
  pairs += [
    (arm.name, study.baseline, arm.difference)
    for arm in arms
    if arm.difference and (arm.name, study.baseline) not in study.comparisons
  ]
  for name, baseline, difference in pairs:
    if difference.unpaired:
      seeds = ', '.join(str(seed) for seed in difference.unpaired)
      warnings.append(f'{labels[name]} minus {labels[baseline]}: unpaired seeds left out: {seeds}')
  return tuple(warnings)


def _without_own_metrics(study: Study, records: Sequence[Record]) -> list[str]:
  """Returns a warning for each metric that finished trials lack, with the first reason.

  The metric that decides is left out: trials without it are listed one by one.
  """
  finished = [record for record in records if record.status == FINISHED]
  reasons: dict[str, list[str]] = {}
  for record in finished:
    for name, reason in record.metric_errors.items():
      if name != study.metric.name:
        reasons.setdefault(name, []).append(reason)
  return [
    f'{name}: no value for {len(of)} of {len(finished)} finished trials: {of[0]}'
    for name, of in reasons.items()
  ]


def _arm_warnings(arm: ArmSummary, label: str) -> list[str]:
  warnings = []
  num = len(arm.values)
  if num < MIN_SEEDS:
    warnings.append(f'{label}: {num} seed{"" if num == 1 else "s"}, fewer than {MIN_SEEDS}')
  if num > 1 and len(set(arm.values.values())) == 1:
    warnings.append(f'{label}: all seeds have the same value')
  diverged = arm.statuses.get(DIVERGED, 0)
  if num and diverged:
    warnings.append(f'{label}: {diverged} diverged; the mean is of those that did not')
  return warnings
