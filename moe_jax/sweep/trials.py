"""The trials of a study: every arm with every seed, each a config, an id and a directory."""

import copy
import hashlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from moe_jax import config as config_lib
from moe_jax.errors import UserError
from moe_jax.study import MAY_DIFFER, Point, Study
from moe_jax.sweep.evaluations import EVALUATIONS
from moe_jax.train.manifest import FREE_FIELDS


class Trial(NamedTuple):
  """One training run of a study.

  Attributes:
    id: hash of the resolved config, but for what changes no result (`FREE_FIELDS`).
    arm: its name.
    seed: `train.seed`.
    changes: what the arm changes of the base config.
    config: resolved and validated.
  """

  id: str
  arm: str
  seed: int
  changes: dict[str, Any]
  config: ml_collections.ConfigDict

  def folder(self, workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the directory of its run."""
    return pathlib.Path(workdir) / 'trials' / self.id


def load_study(path: str) -> Study:
  """Returns the study of a file.

  Raises:
    UserError: if there is no such file, or it does not define one.
  """
  if not os.path.isfile(path):
    raise UserError('--study', path, 'does not exist')
  spec = importlib.util.spec_from_file_location('moe_jax_study', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules['moe_jax_study'] = module
  try:
    spec.loader.exec_module(module)
    study = module.get_study()
  except UserError:
    raise
  except Exception as error:
    # It is the user's code: whatever it raises is theirs to mend.
    text = ' '.join(str(error).split())
    raise UserError('--study', path, f'{type(error).__name__}: {text}') from error
  if not isinstance(study, Study):
    raise UserError('--study', path, f'get_study() must return a Study, not {type(study).__name__}')
  return study


def check_study(study: Study) -> None:
  """Checks what a study says of itself, its configs apart.

  Raises:
    UserError: names the first field that is wrong.
  """
  names = [arm.name for arm in study.arms]
  run = {arm.name for arm in study.arms if not arm.dropped}
  if not run:
    raise UserError('study.arms', names, 'none is left to run')
  for name in names:
    if not name or names.count(name) > 1:
      raise UserError('study.arms', name, 'names must be unique and not empty')
  if not study.seeds or len(set(study.seeds)) != len(study.seeds):
    raise UserError('study.seeds', study.seeds, 'must be different numbers, at least one')
  for evaluation in study.evaluations:
    if evaluation not in EVALUATIONS:
      raise UserError('study.evaluations', evaluation, f'must be of {", ".join(EVALUATIONS)}')
  if study.metric.name.partition('/')[0] not in study.evaluations:
    raise UserError(
      'study.metric', study.metric.name, f'must begin with one of {", ".join(study.evaluations)}'
    )
  for what in study.may_differ:
    if what not in MAY_DIFFER:
      raise UserError('study.may_differ', what, f'must be of {", ".join(MAY_DIFFER)}')
  compared = [study.baseline] if study.baseline else []
  for comparison in study.comparisons:
    compared += comparison
  for name in compared:
    if name not in run:
      raise UserError('study.comparisons', name, 'is no arm that is run')


def trials_of(study: Study, free: Mapping[str, Any] | None = None) -> list[Trial]:
  """Returns all trials, seeds running fastest; every config is validated.

  Args:
    study: see `check_study`.
    free: values of `FREE_FIELDS` for this machine, as the mesh.

  Raises:
    UserError: names the arm, the field and its value.
  """
  check_study(study)
  trials: list[Trial] = []
  arms_by_id: dict[str, str] = {}
  for arm in study.arms:
    if arm.dropped:
      continue
    for seed in study.seeds:
      config = _config(study, arm, seed, free or {})
      trial = Trial(trial_id(config), arm.name, seed, arm.changes, config)
      if trial.id in arms_by_id:
        other = arms_by_id[trial.id]
        raise UserError('study.arms', arm.name, f'is the same config as arm {other!r}')
      arms_by_id[trial.id] = arm.name
      trials.append(trial)
  return trials


def trial_id(config: ml_collections.ConfigDict) -> str:
  """Returns 12 hexadecimal digits of the hash of a config, `FREE_FIELDS` left out."""
  fields = {
    f'{room}.{name}': value
    for room, section in config.to_dict().items()
    for name, value in section.items()
    if f'{room}.{name}' not in FREE_FIELDS
  }
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _config(
  study: Study, arm: Point, seed: int, free: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  config = copy.deepcopy(study.base)
  for field, value in {**arm.changes, **free, 'train.seed': seed}.items():
    room, _, name = field.partition('.')
    known = config_lib.SCHEMA.get(room, {})
    if name not in known:
      raise UserError(field, value, f'of arm {arm.name!r}: unknown field')
    # An int serves as a float, and as nothing else.
    if isinstance(known[name].default, float) and type(value) is int:
      value = float(value)
    try:
      config[room][name] = value
    except TypeError as error:
      kind = type(known[name].default).__name__
      raise UserError(field, value, f'of arm {arm.name!r}: must be of type {kind}') from error
  try:
    config_lib.validate(config)
  except UserError as error:
    raise UserError('study.arms', arm.name, str(error)) from error
  return config
