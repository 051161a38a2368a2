"""A summary as CSV: every arm and every metric, with all digits."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from moe_jax.results.statistics import Difference, Interval
from moe_jax.results.summary import ArmSummary, Summary
from moe_jax.results.tables import absent_text

_NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def csv_text(summary: Summary) -> str:
  """Returns a row for each arm, dropped ones too, with all digits; empty where nothing is known."""
  names = sorted({name for arm in summary.arms for name in arm.metrics})
  rows = [_csv_row(summary, arm, names) for arm in summary.arms]
  file = io.StringIO()
  writer = csv.DictWriter(file, list(rows[0]) if rows else ['arm'], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return file.getvalue()


def _csv_row(summary: Summary, arm: ArmSummary, names: Sequence[str]) -> dict[str, Any]:
  difference = arm.difference or Difference(_NOTHING, _NOTHING, math.nan, ())
  row: dict[str, Any] = {'arm': arm.name, 'dropped': arm.dropped}
  row |= {'averaged': len(arm.values), 'trials': len(arm.values) + len(arm.absent)}
  row |= {
    'mean': arm.interval.mean,
    'low': arm.interval.low,
    'high': arm.interval.high,
    'bootstrap_low': arm.bootstrap.low,
    'bootstrap_high': arm.bootstrap.high,
    'difference': difference.interval.mean,
    'difference_low': difference.interval.low,
    'difference_high': difference.interval.high,
    'difference_bootstrap_low': difference.bootstrap.low,
    'difference_bootstrap_high': difference.bootstrap.high,
    'difference_p': difference.p_value,
    'difference_pairs': difference.interval.num if arm.difference else None,
    'parameters_total': arm.parameters.get('total'),
    'parameters_active': arm.parameters.get('active'),
    'flops_per_token': arm.flops_per_token,
    'tokens': arm.tokens,
    'tokens_per_expert': arm.tokens_per_expert,
  }
  row |= {f'seed {seed}': arm.values.get(seed) for seed in summary.study.seeds}
  row |= {name: arm.metrics[name].mean if name in arm.metrics else None for name in names}
  row['without_value'] = '; '.join(absent_text(trial) for trial in arm.absent)
  return {
    name: '' if isinstance(value, float) and math.isnan(value) else value
    for name, value in row.items()
  }
