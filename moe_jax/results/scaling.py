"""Scaling law of the loss in the number of experts, in the form of Clark et al. 2022.

At one model size N the law log L = a log N + b log E^ + c log N log E^ + d is a line over log E^,
log L = d' + b' log E^, with E^ the number of experts with saturation,

  1 / E^ = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max.

Source: Clark et al. 2022, arXiv:2202.01169; the formulas are from notes, the text was not
available. Differs: one N, so a and c cannot be found; E_start = 1, so that a dense model has E^ =
1; E is the expansion, how many times the parameters of a dense layer the experts hold (E / K for
experts of width F / K), which is the number of experts for K = 1, the source's case; fitted to
the metric of the study instead of nats per token, which moves only d'.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize

from moe_jax.results.records import FINISHED, Record
from moe_jax.results.statistics import Interval, mean_interval
from moe_jax.study import Study

# Of expansions, the dense model's 1 included: a line through 2 points fits whatever is there, and a
# curve through 3.
MIN_FOR_SLOPE = 3
MIN_FOR_SATURATION = 4
_LARGEST = 1e6


class ExpertScaling(NamedTuple):
  """The law over arms with the same number of selected experts, and the dense arm.

  Attributes:
    num_selected_experts: of these arms.
    expansions: ascending.
    slope: b' of log10 metric over log10 E without saturation, one value for each seed.
    curvature: coefficient of (log10 E)^2 in a parabola, likewise; above 0 returns diminish.
    saturated: (b', E_max) of the law with saturation, of means over seeds; None where the data do
      not carry it: too few expansions, or an interval of the curvature that reaches below 0.
    why_not: reason for a missing part; empty if none is missing.
  """

  num_selected_experts: int
  expansions: tuple[float, ...]
  slope: Interval
  curvature: Interval
  saturated: tuple[float, float] | None
  why_not: str


def saturating(expansion: np.ndarray, most: float) -> np.ndarray:
  """Returns E^ of expansions E for E_max `most` above 1 and E_start 1."""
  start = 1 / (1 - 1 / most)
  return 1 / (1 / (expansion - 1 + start) + 1 / most)


def fit(study: Study, records: Sequence[Record]) -> list[ExpertScaling]:
  """Returns the law for each number of selected experts; seeds enter that have every expansion.

  Args:
    study: whose metric is fitted.
    records: of its trials; arms must differ only in experts.
  """
  dense: dict[int, float] = {}
  by_selected: dict[int, dict[float, dict[int, float]]] = {}
  for record in records:
    value = record.metrics.get(study.metric.name)
    if record.status != FINISHED or not isinstance(value, float) or not value > 0:
      continue
    moe = record.config['moe']
    if not moe['num_experts']:
      dense[record.seed] = value
      continue
    chosen = moe['num_selected_experts']
    expansion = moe['num_experts'] / chosen
    by_selected.setdefault(chosen, {}).setdefault(expansion, {})[record.seed] = value
  return [
    _fit_line(chosen, by_selected[chosen] | ({1.0: dense} if dense else {}))
    for chosen in sorted(by_selected)
  ]


def _fit_line(chosen: int, values: dict[float, dict[int, float]]) -> ExpertScaling:
  expansions = tuple(sorted(values))
  seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values.values())))
  nothing = mean_interval([])
  if len(expansions) < MIN_FOR_SLOPE or not seeds:
    why = f'{len(expansions)} expansions and {len(seeds)} seeds that have all of them'
    return ExpertScaling(chosen, expansions, nothing, nothing, None, f'not fitted: {why}')
  x = np.log10(np.array(expansions))
  y = np.log10([[values[e][seed] for e in expansions] for seed in seeds])
  slope = mean_interval([float(np.polyfit(x, row, 1)[0]) for row in y])
  if len(expansions) < MIN_FOR_SATURATION:
    why = f'{len(expansions)} expansions say nothing of saturation'
    return ExpertScaling(chosen, expansions, slope, nothing, None, why)
  curvature = mean_interval([float(np.polyfit(x, row, 2)[0]) for row in y])
  if not curvature.low > 0:
    why = 'the data do not carry saturation: the interval of the curvature is not above 0'
    return ExpertScaling(chosen, expansions, slope, curvature, None, why)
  return ExpertScaling(
    chosen, expansions, slope, curvature, fit_saturation(np.array(expansions), y.mean(0)), ''
  )


def fit_saturation(expansions: np.ndarray, log_values: np.ndarray) -> tuple[float, float]:
  """Returns (b', E_max) of least squares; E_max is at most 1e6, which is no saturation.

  Args:
    expansions: E of each point.
    log_values: log10 of its metric.
  """

  def line(log_most: float) -> tuple[float, float]:
    x = np.log10(saturating(expansions, 10.0**log_most))
    design = np.stack([x, np.ones_like(x)], axis=1)
    found, *_ = np.linalg.lstsq(design, log_values)
    return float(found[0]), float(np.sum((design @ found - log_values) ** 2))

  # One dimension with possibly several minima: the best of a grid, refined between its neighbours.
  grid = np.linspace(math.log10(1.01), math.log10(_LARGEST), 400)
  best = int(np.argmin([line(point)[1] for point in grid]))
  bounds = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
  found = scipy.optimize.minimize_scalar(lambda p: line(p)[1], bounds=bounds, method='bounded')
  return line(float(found.x))[0], float(10**found.x)


def markdown(study: Study, laws: Sequence[ExpertScaling]) -> str:
  """Returns a table of the laws, with what could not be fitted and why."""
  lines = [
    f'log10 {study.metric.name} against log10 E, E the expansion (experts / selected); dense is 1.',
    '',
    '| selected | expansions | slope | curvature | slope with saturation | E_max | note |',
    '|---:|---|---:|---:|---:|---:|---|',
  ]
  for law in laws:
    saturated = ('-', '-')
    if law.saturated:
      saturated = f'{law.saturated[0]:.4f}', f'{law.saturated[1]:.3g}'
    cells = (
      law.num_selected_experts,
      ', '.join(f'{e:g}' for e in law.expansions),
      _interval(law.slope),
      _interval(law.curvature),
      *saturated,
      law.why_not,
    )
    lines.append(f'| {" | ".join(map(str, cells))} |')
  return '\n'.join(lines) + '\n'


def _interval(interval: Interval) -> str:
  if not interval.num:
    return '-'
  if interval.num == 1:
    return f'{interval.mean:.4f}'
  return f'{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]'
