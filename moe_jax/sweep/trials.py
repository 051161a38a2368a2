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
from moe_jax.data import SPLITS, ByteTokenizer
from moe_jax.errors import UserError
from moe_jax.study import MAY_DIFFER, TOLERANCE, Comparison, Metric, Point, Study
from moe_jax.sweep.evaluations import EVALUATIONS, METRICS
from moe_jax.train import accounting
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
    why = 'is no file' if os.path.exists(path) else 'does not exist'
    raise UserError('--study', path, why)
  spec = importlib.util.spec_from_file_location('moe_jax_study', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules['moe_jax_study'] = module
  try:
    spec.loader.exec_module(module)
    study = module.get_study()
  except UserError:
    raise
  except (Exception, SystemExit) as error:
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
  _check_types(study)
  names = [arm.name for arm in study.arms]
  run = {arm.name for arm in study.arms if not arm.dropped}
  if not run:
    raise UserError('study.arms', names, 'none is left to run')
  for name in names:
    if not name or names.count(name) > 1:
      raise UserError('study.arms', name, 'names must be unique and not empty')
  if not study.seeds or len(set(study.seeds)) != len(study.seeds):
    raise UserError('study.seeds', study.seeds, 'must be different numbers, at least one')
  _check_evaluations(study)
  for what in study.may_differ:
    if what not in MAY_DIFFER:
      raise UserError('study.may_differ', what, f'must be of {", ".join(MAY_DIFFER)}')
  if study.baseline and study.baseline not in run:
    raise UserError('study.baseline', study.baseline, 'is no arm that is run')
  for comparison in study.comparisons:
    for name in comparison:
      if name not in run:
        raise UserError('study.comparisons', name, 'is no arm that is run')
    if comparison.arm == comparison.baseline:
      raise UserError('study.comparisons', comparison.arm, 'is compared with itself')
    if study.comparisons.count(comparison) > 1:
      # It would count twice in the correction for the number of comparisons.
      raise UserError('study.comparisons', tuple(comparison), 'stands there twice')


def _check_types(study: Study) -> None:
  """Checks what Python does not: the types of the fields, and names that are taken for others."""
  many = {
    'arms': Point,
    'seeds': int,
    'comparisons': Comparison,
    'evaluations': str,
    'may_differ': str,
  }
  for field, kind in many.items():
    value = getattr(study, field)
    if not isinstance(value, tuple | list) or not all(type(one) is kind for one in value):
      raise UserError(f'study.{field}', value, f'must be a tuple of {kind.__name__}')
  for field, kind in {'metric': Metric, 'base': ml_collections.ConfigDict}.items():
    if not isinstance(getattr(study, field), kind):
      raise UserError(f'study.{field}', getattr(study, field), f'must be a {kind.__name__}')
  if (
    not isinstance(study.name, str) or not study.name or study.name != os.path.basename(study.name)
  ):
    raise UserError('study.name', study.name, 'must be the name of a folder')
  for field in ('x', 'lines'):
    room, _, name = (value := getattr(study, field)).partition('.')
    if value and name not in config_lib.SCHEMA.get(room, {}):
      raise UserError(f'study.{field}', value, 'is no field of a config')


def _check_evaluations(study: Study) -> None:
  for evaluation in study.evaluations:
    if evaluation not in EVALUATIONS:
      raise UserError('study.evaluations', evaluation, f'must be of {", ".join(EVALUATIONS)}')
  if study.split not in SPLITS:
    raise UserError('study.split', study.split, f'must be one of {", ".join(SPLITS)}')
  evaluation, _, name = study.metric.name.partition('/')
  if evaluation not in study.evaluations or name not in METRICS:
    raise UserError(
      'study.metric',
      study.metric.name,
      f'must be EVALUATION/METRIC with an evaluation of the study ({", ".join(study.evaluations)}) '
      f'and one of {", ".join(METRICS)}',
    )


def _check_comparable(study: Study, trials: list[Trial]) -> None:
  """Checks before anything is trained what `results.summary` will check of the results."""
  fields = {
    'horizon': ('train.num_steps', 'data.batch_size', 'data.sequence_length'),
    'data': ('data.name',),
    'tokenizer': ('data.tokenizer', 'data.vocab_size'),
  }
  for excuse, of_excuse in fields.items():
    for field in of_excuse if excuse not in study.may_differ else ():
      room, _, name = field.partition('.')
      values = {trial.config[room][name]: trial.arm for trial in trials}
      if len(values) > 1:
        raise UserError(
          field,
          {arm: value for value, arm in values.items()},
          f'compared arms must agree; if the study asks this, add {excuse!r} to its may_differ',
        )
  if 'compute' not in study.may_differ:
    flops = {trial.arm: training_flops(trial.config) for trial in trials}
    least, most = min(flops, key=flops.__getitem__), max(flops, key=flops.__getitem__)
    if flops[most] > (1 + TOLERANCE) * flops[least]:
      raise UserError(
        'training FLOPs',
        {least: flops[least], most: flops[most]},
        f"compared arms must agree to {TOLERANCE:.0%}; if the study asks this, add 'compute' to "
        'its may_differ',
      )


def vocab_size_of(config: ml_collections.ConfigDict) -> int:
  """Returns the vocabulary of a config before its text was looked at."""
  return config.data.vocab_size or ByteTokenizer().vocab_size


def training_flops(config: ml_collections.ConfigDict) -> int:
  """Returns the floating-point operations of a whole training run."""
  tokens = config.train.num_steps * config.data.batch_size * config.data.sequence_length
  return tokens * accounting.training_flops_per_token(config, vocab_size_of(config))


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
  _check_comparable(study, trials)
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
