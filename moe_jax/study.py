"""A study: a question, the arms that answer it, seeds, and the comparisons planned beforehand.

A study is a Python file with a function `get_study() -> Study`. Its arms are made by a small
algebra: `point`, `product`, `zipped`, `chain` and `where`.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from moe_jax.errors import UserError
from moe_jax.field_names import split_field


class Point(NamedTuple):
  """One arm.

  Attributes:
    name: unique in the study.
    changes: config fields, as 'moe.num_experts', with their values.
    dropped: why the arm is not run; empty if it is.
    label: short name for tables and figures; '' for what `labels_of` derives from the name.
  """

  name: str
  changes: dict[str, Any]
  dropped: str = ''
  label: str = ''


Grid = tuple[Point, ...]
Axes = Mapping[str, Sequence[Any]]
# One for each arm of a grid, or how the label of an arm follows from its changes.
Labels = Sequence[str] | Callable[[dict[str, Any]], str]

# How a label writes the field of a derived part `FIELD=VALUE` of a name: by one letter where papers
# have one, '' for a value that speaks for itself. Fields that are not here keep their name.
SHORT = {
  'moe.num_experts': 'E',
  'moe.num_selected_experts': 'K',
  'moe.capacity_factor': 'CF',
  'moe.load_balancing_weight': 'LBL',
  'moe.router_z_weight': 'z',
  'moe.mlp_dim': 'F',
  'moe.num_shared_experts': 'shared',
  'model.num_layers': 'L',
  'model.embed_dim': 'D',
  'optim.learning_rate': 'LR',
  'train.num_steps': 'steps',
  'moe.router': '',
  'moe.priority': '',
  'moe.balance_scope': '',
  'optim.name': '',
}


def point(name: str, changes: Mapping[str, Any], label: str = '') -> Grid:
  """Returns a single arm."""
  return (Point(name, dict(changes), label=label),)


def product(*factors: Grid | Axes, labels: Labels = ()) -> Grid:
  """Returns every combination, the last factor running fastest.

  Args:
    *factors: grids, or {field: values} where each field is a factor of its own. Later factors
      override fields of earlier ones.
    labels: of the arms, in order; derived from their names by default, see `labels_of`.

  Raises:
    UserError: if there are not as many labels as arms.
  """
  grids = []
  for factor in factors:
    if isinstance(factor, Mapping):
      grids += [zipped({field: values}) for field, values in factor.items()]
    else:
      grids.append(factor)
  return _labelled(
    'study.product', tuple(_merged(points) for points in itertools.product(*grids)), labels
  )


def zipped(axes: Axes, labels: Labels = ()) -> Grid:
  """Returns the first values of all fields together, then the second ones.

  Args:
    axes: {field: values}.
    labels: as in `product`.

  Raises:
    UserError: if the fields have not equally many values, or there are not as many labels.
  """
  lengths = {field: len(values) for field, values in axes.items()}
  if len(set(lengths.values())) != 1:
    raise UserError('study.zipped', lengths, 'fields must have equally many values')
  rows = [dict(zip(axes, row, strict=True)) for row in zip(*axes.values(), strict=True)]
  return _labelled('study.zipped', tuple(Point(_name(row), row) for row in rows), labels)


def chain(*grids: Grid) -> Grid:
  """Returns the arms of one grid after those of another."""
  return tuple(itertools.chain(*grids))


def where(grid: Grid, keep: Callable[[dict[str, Any]], bool], reason: str) -> Grid:
  """Drops the arms whose changes do not satisfy `keep`; they stay in the study with the reason."""
  return tuple(p if p.dropped or keep(p.changes) else p._replace(dropped=reason) for p in grid)


def _labelled(function: str, grid: Grid, labels: Labels) -> Grid:
  if callable(labels):
    return tuple(p._replace(label=labels(p.changes)) for p in grid)
  if not labels:
    return grid
  if len(labels) != len(grid):
    raise UserError(f'{function} labels', tuple(labels), f'must be {len(grid)}, one for each arm')
  return tuple(p._replace(label=label) for p, label in zip(grid, labels, strict=True))


def _merged(points: Sequence[Point]) -> Point:
  changes: dict[str, Any] = {}
  for p in points:
    changes |= p.changes
  dropped = next((p.dropped for p in points if p.dropped), '')
  label = ''
  if any(p.label for p in points):
    parts = (p.label or ', '.join(_short_parts(p).values()) for p in points)
    label = ', '.join(part for part in parts if part)
  return Point(', '.join(p.name for p in points if p.name), changes, dropped, label)


def _name(changes: Mapping[str, Any]) -> str:
  return ', '.join(_part(field, value) for field, value in changes.items())


def _part(field: str, value: Any) -> str:
  return f'{_short_name(field)}={value}'


def _short_name(field: str) -> str:
  # An unknown field is named in full in the error that follows.
  return split_field(field)[1] or field


def _short_parts(arm: Point) -> dict[str, str]:
  """Returns the parts of an arm's name with their short forms; those not derived are kept."""
  short = {}
  for field, value in arm.changes.items():
    letter = SHORT.get(field, _short_name(field))
    short[_part(field, value)] = f'{letter}={value}' if letter else str(value)
  return {part: short.get(part, part) for part in arm.name.split(', ')}


class Comparison(NamedTuple):
  """A planned comparison: the metric of `arm` minus that of `baseline`, paired by seed."""

  arm: str
  baseline: str


class Metric(NamedTuple):
  """The deciding metric.

  Attributes:
    name: path of a number in the evaluations of a trial, as `moe_jax.sweep.metric_paths` explains:
      'dropless/bits_per_byte', 'dropless/router/max_violation/mean',
      'dropless/domains/DOMAIN/loss', or 'user/NAME' of `Study.metrics`.
    unit: for tables.
    lower_is_better: decides which of two arms wins.
  """

  name: str = 'dropless/bits_per_byte'
  unit: str = 'bits per byte'
  lower_is_better: bool = True


class FinishedTrial(NamedTuple):
  """A trained and evaluated trial, the argument of a function in `Study.metrics`.

  Attributes:
    arm: its name.
    seed: its `train.seed`.
    config: resolved, by section and field.
    evaluations: {evaluation: {metric: number or list, 'domains': {domain: the same}}}.
    folder: directory of the run, as `moe_jax.load_run` takes it.
  """

  arm: str
  seed: int
  config: dict[str, Any]
  evaluations: dict[str, Any]
  folder: pathlib.Path


# How far tokens and FLOPs of compared trials may be apart. Padding makes tokens depend on the order
# of the data, and widths are whole numbers: arms made for equal compute meet it to a fraction.
TOLERANCE = 0.01
# Differences with which runs can still be compared, if the study says that they are the question.
MAY_DIFFER = ('compute', 'horizon', 'data', 'tokenizer')


@dataclasses.dataclass(frozen=True)
class Study:
  """A question and how to answer it.

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
    scaling: True if arms differ only in experts, so that a law over them is fitted.
    metrics: own numbers of a finished trial, {NAME: function}; they stand in tables as 'user/NAME'
      and may decide. They are computed again for every report, so that a changed function never
      mixes with values of an earlier one.
    equivalence_margin: two arms whose metrics differ by less are as good as each other; fixed
      before the runs, in the unit of the metric. Planned comparisons are then tested for
      equivalence, too. None for no such test.
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
  metrics: Mapping[str, Callable[[FinishedTrial], float]] = dataclasses.field(default_factory=dict)
  equivalence_margin: float | int | None = None


def labels_of(study: Study) -> dict[str, str]:
  """Returns {name of an arm: its label}, unique and in the order of the study.

  An arm's own label, else its name with the parts that `product` and `zipped` derived made short
  (`SHORT`), and without those that all arms of the study share. An arm whose derived label is
  another's too keeps its name.
  """
  parts = {arm.name: _short_parts(arm) for arm in study.arms}
  shared = set.intersection(*(set(of) for of in parts.values())) if len(parts) > 1 else set()
  derived = {
    arm.name: arm.label
    or ', '.join(short for part, short in parts[arm.name].items() if part not in shared)
    or arm.name
    for arm in study.arms
  }
  taken = list(derived.values())
  return {
    arm.name: arm.label or (derived[arm.name] if taken.count(derived[arm.name]) == 1 else arm.name)
    for arm in study.arms
  }


def own_labels(study: Study) -> dict[str, str]:
  """Returns {name of an arm: the label that the study gives it, else that name}."""
  return {arm.name: arm.label or arm.name for arm in study.arms}
