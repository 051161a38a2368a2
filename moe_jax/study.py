"""A study: a question, the arms that answer it, seeds, and the comparisons planned beforehand.

A study is a Python file with a function `get_study() -> Study`. Its arms are made by a small
algebra: `point`, `product`, `zipped`, `chain` and `where`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from moe_jax.errors import UserError


class Point(NamedTuple):
  """One arm.

  Attributes:
    name: unique in the study.
    changes: config fields, as 'moe.num_experts', with their values.
    dropped: why the arm is not run; empty if it is.
  """

  name: str
  changes: dict[str, Any]
  dropped: str = ''


Grid = tuple[Point, ...]
Axes = Mapping[str, Sequence[Any]]


def point(name: str, changes: Mapping[str, Any]) -> Grid:
  """Returns a single arm."""
  return (Point(name, dict(changes)),)


def product(*factors: Grid | Axes) -> Grid:
  """Returns every combination, the last factor running fastest.

  Args:
    *factors: grids, or {field: values} where each field is a factor of its own. Later factors
      override fields of earlier ones.
  """
  grids = []
  for factor in factors:
    if isinstance(factor, Mapping):
      grids += [zipped({field: values}) for field, values in factor.items()]
    else:
      grids.append(factor)
  return tuple(_merged(points) for points in itertools.product(*grids))


def zipped(axes: Axes) -> Grid:
  """Returns the first values of all fields together, then the second ones.

  Raises:
    UserError: if the fields have not equally many values.
  """
  lengths = {field: len(values) for field, values in axes.items()}
  if len(set(lengths.values())) != 1:
    raise UserError('study.zipped', lengths, 'fields must have equally many values')
  rows = zip(*axes.values(), strict=True)
  return tuple(
    Point(_name(dict(zip(axes, row, strict=True))), dict(zip(axes, row, strict=True)))
    for row in rows
  )


def chain(*grids: Grid) -> Grid:
  """Returns the arms of one grid after those of another."""
  return tuple(itertools.chain(*grids))


def where(grid: Grid, keep: Callable[[dict[str, Any]], bool], reason: str) -> Grid:
  """Drops the arms whose changes do not satisfy `keep`; they stay in the study with the reason."""
  return tuple(p if p.dropped or keep(p.changes) else p._replace(dropped=reason) for p in grid)


def _merged(points: Sequence[Point]) -> Point:
  changes: dict[str, Any] = {}
  for p in points:
    changes |= p.changes
  dropped = next((p.dropped for p in points if p.dropped), '')
  return Point(', '.join(p.name for p in points if p.name), changes, dropped)


def _name(changes: Mapping[str, Any]) -> str:
  return ', '.join(f'{field.rpartition(".")[2]}={value}' for field, value in changes.items())


class Comparison(NamedTuple):
  """A planned comparison: the metric of `arm` minus that of `baseline`, paired by seed."""

  arm: str
  baseline: str


class Metric(NamedTuple):
  """What decides.

  Attributes:
    name: 'EVALUATION/METRIC', as in `Record.metrics`.
    unit: for tables.
    lower_is_better: whether it is.
  """

  name: str = 'dropless/bits_per_byte'
  unit: str = 'bits per byte'
  lower_is_better: bool = True


# How far tokens and FLOPs of compared trials may be apart. Padding makes tokens depend on the order
# of the data, and widths are whole numbers: arms made for equal compute meet it to a fraction.
TOLERANCE = 0.01
# What runs may differ in and still be compared, if the study says that this is the question.
MAY_DIFFER = ('compute', 'horizon', 'data', 'tokenizer')


@dataclasses.dataclass(frozen=True)
class Study:
  """A question and how it is answered.

  Attributes:
    name: of the study; a folder name.
    question: one sentence.
    base: the config that arms change.
    arms: from the algebra above.
    seeds: each arm runs with each; `train.seed`.
    metric: that decides.
    baseline: the arm that tables compare with; '' for none.
    comparisons: planned before the runs; Holm's correction is over these.
    evaluations: of each finished trial, names of `moe_jax.sweep.evaluations.EVALUATIONS`.
    split: evaluated.
    may_differ: of `MAY_DIFFER`.
    x: the config field on the horizontal axis of the figure of the metric; '' for none.
    lines: the config field that lines of that figure differ in; '' for one line.
    scaling: whether arms differ in experts alone, so that a law over them is fitted.
  """

  name: str
  question: str
  base: ml_collections.ConfigDict
  arms: Grid
  seeds: tuple[int, ...]
  metric: Metric = Metric()
  baseline: str = ''
  comparisons: tuple[Comparison, ...] = ()
  evaluations: tuple[str, ...] = ('capacity', 'dropless')
  split: str = 'test'
  may_differ: tuple[str, ...] = ()
  x: str = ''
  lines: str = ''
  scaling: bool = False
