"""The parts of the lines that suites print: ratios, load, compilation, validity."""

from typing import Any, NamedTuple


class Ratio(NamedTuple):
  """Time of the reference / time of an arm: above 1, the arm is faster. Median and quartiles."""

  median: float
  low: float
  high: float

  def __str__(self) -> str:
    return f'{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]'


def load(row: dict[str, Any]) -> str:
  """Returns how the assignments of a row are spread over the experts."""
  return (
    f'{row["tokens_per_expert"]:.0f} per expert, fullest {row["max_load"]:.2f} x, '
    f'{row["drop_share"]:.1%} dropped, {share(row["padding"])} padding'
  )


def program(arm: dict[str, Any]) -> str:
  """Returns the compile time of an arm, and the memory it needs."""
  return (
    f'compiled in {arm["compile_seconds"]:.1f} s, {megabytes(arm["temporary_bytes"])} temporary'
  )


def invalid(row: dict[str, Any]) -> str:
  """Returns the mark of a row whose A/A control is off, else nothing."""
  return '  INVALID: noisy machine' if row['void'] else ''


def share(value: float | None) -> str:
  """Returns a share as percents; a dash for None."""
  return '-' if value is None else f'{value:.1%}'


def megabytes(size: int) -> str:
  """Returns a number of bytes as megabytes."""
  return f'{size / 1e6:,.0f} MB'
