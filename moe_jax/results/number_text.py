"""Numbers of reports as plain text: intervals, limits, counts, p-values."""

import math

from moe_jax.results.statistics import Interval

_SCALES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
# Half widths below are due to rounding.
_MOST_DECIMALS = 12
NOTHING = '-'


def interval(of: Interval | None, sign: str = '') -> str:
  """Returns the mean and half the width of the interval; only the mean of a single value."""
  if of is None or math.isnan(of.mean):
    return NOTHING
  mean, half = of.mean, of.half_width
  if math.isnan(half) or half == 0:
    return f'{mean:{sign}.4g}' + (' ± 0' if half == 0 else '')
  decimals = _decimals(half)
  return f'{mean:{sign}z.{decimals}f} ± {half:.{decimals}f}'


def limits(of: Interval) -> str:
  """Returns the limits of an interval with their signs, to two digits of its half width."""
  half = of.half_width
  if math.isnan(half):
    return NOTHING
  decimals = _decimals(half) if half else 4
  return f'[{of.low:+z.{decimals}f}, {of.high:+z.{decimals}f}]'


def _decimals(half: float) -> int:
  return min(max(1 - math.floor(math.log10(half)), 0), _MOST_DECIMALS)


def count(number: int | float) -> str:
  """Returns three digits and a suffix: 1.23M."""
  for scale, suffix in _SCALES:
    # What rounds up to it as well.
    if number >= 0.9995 * scale:
      return f'{number / scale:.3g}{suffix}'
  return f'{number:.3g}'


def p_value(p: float) -> str:
  """Returns three decimals, or '<0.001'."""
  if math.isnan(p):
    return NOTHING
  return '<0.001' if p < 0.001 else f'{p:.3f}'
