"""Checks of a study before anything is trained: the type of every field, then the values."""

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from moe_jax.arguments import near_fields
from moe_jax.data import SPLITS, Dataset, Examined, documents
from moe_jax.errors import UserError, did_you_mean
from moe_jax.field_names import split_field
from moe_jax.schema import SCHEMA
from moe_jax.study import MAY_DIFFER, Comparison, Metric, Point, Study, labels_of
from moe_jax.sweep import metric_paths, user_metrics
from moe_jax.sweep.evaluations import EVALUATIONS

# Arms that an error lists.
_MOST_NAMED = 8


class _Type(NamedTuple):
  """The values a field may have, and their description in an error."""

  holds: Callable[[Any], bool]
  allowed: str


def _tuple_of(kind: type) -> _Type:
  return _Type(
    lambda value: isinstance(value, tuple | list) and all(type(one) is kind for one in value),
    f'must be a tuple of {kind.__name__}',
  )


def _is_text_keyed(value: Any) -> bool:
  return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_TEXT = _Type(lambda value: _is_text(value), 'must be text in UTF-8')
_LINE = _Type(
  lambda value: _is_text(value) and (not value or value.isprintable()),
  'must be text in one line, in UTF-8',
)
_BOOL = _Type(lambda value: isinstance(value, bool), 'must be True or False')
_FIELD = _Type(
  lambda value: isinstance(value, str) and (not value or _is_field(value)),
  "is no field of a config; must be as 'moe.num_experts', or ''",
)

# Every field of the objects that a study file makes.
TYPES: dict[type, dict[str, _Type]] = {
  Study: {
    'name': _Type(lambda value: _is_folder_name(value), 'must be the name of a folder'),
    'question': _TEXT,
    'base': _Type(
      lambda value: isinstance(value, ml_collections.ConfigDict), 'must be a ConfigDict'
    ),
    'arms': _tuple_of(Point),
    'seeds': _tuple_of(int),
    'metric': _Type(lambda value: isinstance(value, Metric), 'must be a Metric'),
    'baseline': _TEXT,
    'comparisons': _tuple_of(Comparison),
    'evaluations': _tuple_of(str),
    'split': _Type(
      lambda value: isinstance(value, str) and value in SPLITS,
      f'must be one of {", ".join(SPLITS)}',
    ),
    'may_differ': _tuple_of(str),
    'x': _FIELD,
    'lines': _FIELD,
    'scaling': _BOOL,
    'metrics': _Type(
      lambda value: _is_text_keyed(value) and all(map(callable, value.values())),
      'must be {name: function of a finished trial}',
    ),
    'equivalence_margin': _Type(
      lambda value: (
        value is None
        or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf)
      ),
      'must be a number above 0, or None',
    ),
  },
  Point: {
    'name': _Type(
      lambda value: _is_text(value) and bool(value) and value.isprintable(),
      'must be text in one line, in UTF-8, and not empty',
    ),
    'changes': _Type(_is_text_keyed, 'must be {field of the config: value}'),
    'dropped': _TEXT,
    'label': _LINE,
  },
  Comparison: {'arm': _TEXT, 'baseline': _TEXT},
  Metric: {'name': _TEXT, 'unit': _TEXT, 'lower_is_better': _BOOL},
}


def _is_text(value: Any) -> bool:
  """True for text, except with halves of surrogate pairs, which nothing can print."""
  return isinstance(value, str) and documents.is_text(value)


def _is_folder_name(value: Any) -> bool:
  return (
    isinstance(value, str)
    and value == os.path.basename(value)
    and value not in ('', '.', '..')
    and value.isprintable()
    and len(value.encode()) <= 200
  )


def _is_field(name: str) -> bool:
  section, field = split_field(name)
  return field in SCHEMA.get(section, {})


def check_study(study: Study) -> None:
  """Checks a study, except for its configs.

  Raises:
    UserError: names the first field that is wrong.
  """
  check_types('study', study)
  _check_base(study.base)
  _check_arms(study)
  if not study.seeds or len(set(study.seeds)) != len(study.seeds):
    raise UserError('study.seeds', study.seeds, 'must be different numbers, at least one')
  for evaluation in study.evaluations:
    if evaluation not in EVALUATIONS:
      raise UserError('study.evaluations', evaluation, f'must be of {", ".join(EVALUATIONS)}')
  if not study.evaluations or len(set(study.evaluations)) != len(study.evaluations):
    raise UserError('study.evaluations', study.evaluations, 'must be different, at least one')
  for name in study.metrics:
    if not name.replace('_', 'a').isalnum():
      raise UserError('study.metrics', name, 'a name must be of letters, digits and _')
  user_metrics.sources_of(study)
  metric_paths.check_name(study.metric.name, tuple(study.evaluations), study.metrics)
  for name in study.may_differ:
    if name not in MAY_DIFFER:
      raise UserError('study.may_differ', name, f'must be of {", ".join(MAY_DIFFER)}')
  _check_comparisons(study)


def check_types(name: str, value: Any) -> None:
  """Checks the type of every field of a study and of the objects in it, as Python does not.

  Raises:
    UserError: as 'study.arms[0].changes=[1]: must be ...'.
  """
  for field, kind in TYPES[type(value)].items():
    found = getattr(value, field)
    if not kind.holds(found):
      near = near_fields(found) if kind is _FIELD and isinstance(found, str) else ''
      raise UserError(f'{name}.{field}', found, f'{kind.allowed}{near}')
    if type(found) in TYPES:
      check_types(f'{name}.{field}', found)
    elif isinstance(found, tuple | list):
      for index, one in enumerate(found):
        if type(one) in TYPES:
          check_types(f'{name}.{field}[{index}]', one)


def _check_base(base: ml_collections.ConfigDict) -> None:
  """Checks that every field is there; values are checked with the arms' changes."""
  for section in base:
    if section not in SCHEMA:
      why = f'of study.base: unknown section{near_fields(section)}'
      raise UserError(section, _shown(base[section]), why)
  for section, fields in SCHEMA.items():
    if not isinstance(base.get(section), ml_collections.ConfigDict):
      raise UserError(
        'study.base', f'...{section}', 'is missing; begin with moe_jax.config.get_config()'
      )
    for name in [*fields, *base[section]]:
      field = f'{section}.{name}'
      if name not in base[section]:
        raise UserError('study.base', field, 'is missing')
      if name not in fields:
        why = f'of study.base: unknown field{near_fields(field)}'
        raise UserError(field, _shown(base[section][name]), why)
  seed, default = base.train.seed, SCHEMA['train']['seed'].default
  if seed != default:
    raise UserError(
      'train.seed',
      seed,
      f'of study.base: must be {default}; seeds are those of study.seeds, which would override it',
    )


def _shown(value: Any) -> Any:
  return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def _check_arms(study: Study) -> None:
  names = [arm.name for arm in study.arms]
  if all(arm.dropped for arm in study.arms):
    raise UserError('study.arms', names, 'none is left to run')
  labels = [arm.label for arm in study.arms if arm.label]
  for what, values in (
    ('names', names),
    ('labels', labels),
    ('labels', list(labels_of(study).values())),
  ):
    for value in values:
      if values.count(value) > 1:
        raise UserError('study.arms', value, f'{what} must be unique')
  for arm in study.arms:
    if 'train.seed' in arm.changes:
      raise UserError(
        'train.seed',
        arm.changes['train.seed'],
        f'of arm {arm.name!r}: seeds are those of study.seeds, the same for every arm',
      )


def _check_comparisons(study: Study) -> None:
  run = [arm.name for arm in study.arms if not arm.dropped]
  if study.baseline and study.baseline not in run:
    raise UserError('study.baseline', study.baseline, _no_arm(study.baseline, run))
  seen: set[frozenset[str]] = set()
  for comparison in study.comparisons:
    for name in comparison:
      if name not in run:
        raise UserError('study.comparisons', name, _no_arm(name, run))
    if comparison.arm == comparison.baseline:
      raise UserError('study.comparisons', comparison.arm, 'is compared with itself')
    if frozenset(comparison) in seen:
      # It would count twice in the correction for the number of comparisons.
      raise UserError(
        'study.comparisons', tuple(comparison), 'stands there twice, in whichever direction'
      )
    seen.add(frozenset(comparison))


def _no_arm(name: str, run: Sequence[str]) -> str:
  near = did_you_mean(name, run) or f'; arms are {", ".join(run[:_MOST_NAMED])}'
  more = ', ...' if near.startswith('; arms') and len(run) > _MOST_NAMED else ''
  return f'is no arm that is run{near}{more}'


def check_dataset(study: Study, dataset: Dataset | Examined) -> None:
  """Checks that data has the documents that a study evaluates.

  Raises:
    UserError: for an empty split, or a domain of the deciding metric that has no document in it.
  """
  if not dataset.num_documents(study.split):
    raise UserError('study.split', study.split, f'{dataset.name} has no document in it')
  domain = metric_paths.domain_and_path(study.metric.name.partition('/')[2])[0]
  there = [name for name in dataset.domains if dataset.num_documents(study.split, name)]
  if domain and not study.metric.name.startswith(f'{metric_paths.USER}/') and domain not in there:
    raise UserError(
      'study.metric',
      study.metric.name,
      f'the {study.split} split of {dataset.name} has no such domain; it has {", ".join(there)}',
    )


def unfrozen(base: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a copy that may be changed, whatever the base was."""
  return ml_collections.ConfigDict(copy.deepcopy(base.to_dict()))
