"""The trials of a study: every arm with every seed, each a config, an id and a directory."""

import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from moe_jax import config as config_lib
from moe_jax import installed, unread
from moe_jax.arguments import check_file, near_fields
from moe_jax.data import ByteTokenizer
from moe_jax.errors import UserError, raised_by
from moe_jax.field_names import field_value, split_field
from moe_jax.results.comparable import check_planned
from moe_jax.run import ancestry, manifest
from moe_jax.schema import FREE_FIELDS, LATER_FIELDS
from moe_jax.study import FinishedTrial, Point, Study
from moe_jax.sweep.checks import check_study, unfrozen
from moe_jax.sweep.metric_paths import check_layers
from moe_jax.sweep.one_model import differing, same_model
from moe_jax.train import accounting


class Trial(NamedTuple):
  """One training run of a study.

  Attributes:
    id: hash of the resolved config, without fields that change no result (`FREE_FIELDS`).
    arm: its name.
    seed: `train.seed`.
    changes: of the arm to the base config.
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

  def finished(self, workdir: str | os.PathLike, evaluations: dict[str, Any]) -> FinishedTrial:
    """Returns the trial as the functions of `Study.metrics` are given it."""
    folder = self.folder(workdir)
    return FinishedTrial(self.arm, self.seed, self.config.to_dict(), evaluations, folder)


def load_study(path: str) -> Study:
  """Returns the study of a file.

  Raises:
    UserError: if there is no such file, or it does not define one.
  """
  check_file('--study', path)
  spec = importlib.util.spec_from_file_location('moe_jax_study', path)
  if spec is None or spec.loader is None:
    raise UserError('--study', path, 'must be a Python file, as experiments/NAME/study.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules['moe_jax_study'] = module
  try:
    spec.loader.exec_module(module)
    study = _get_study(module, path)()
  except UserError:
    raise
  except (Exception, SystemExit) as error:
    if installed.missing(error):
      raise
    # It is the user's code: whatever it raises is theirs to fix.
    text = ' '.join(str(error).split())
    why = raised_by(error, path) or f'{type(error).__name__}: {text}'
    raise UserError('--study', path, why) from error
  if not isinstance(study, Study):
    raise UserError('--study', path, f'get_study() must return a Study, not {type(study).__name__}')
  return study


def _get_study(module: Any, path: str) -> Callable[[], Any]:
  """Returns the function of a study file, which must be there and take no argument."""
  function = getattr(module, 'get_study', None)
  if not callable(function):
    raise UserError(
      '--study',
      path,
      "defines no get_study(); it must be, for example: def get_study(): return Study('mine', "
      "'Does it help?', get_config(), point('a', {}), seeds=(0, 1, 2)), with Study and point of "
      'moe_jax.study and get_config of moe_jax.config or a file of configs/',
    )
  try:
    inspect.signature(function).bind()
  except TypeError as error:
    raise UserError('--study', path, f'get_study() must take no argument: {error}') from error
  return function


def vocab_size_of(config: ml_collections.ConfigDict) -> int:
  """Returns the vocabulary of a config before its text is read."""
  return config.data.vocab_size or ByteTokenizer().vocab_size


def training_flops(config: ml_collections.ConfigDict) -> int:
  """Returns the floating-point operations of a whole training run."""
  tokens = config.train.num_steps * config.data.batch_size * config.data.sequence_length
  return tokens * accounting.training_flops_per_token(config, vocab_size_of(config))


def trials_of(study: Study, free: Mapping[str, Any] | None = None) -> list[Trial]:
  """Returns all trials, seeds running fastest; every config is validated.

  Args:
    study: see `checks.check_study`.
    free: values of `FREE_FIELDS` for this machine, as the mesh.

  Raises:
    UserError: names the arm, the field and its value.
  """
  check_study(study)
  trials: list[Trial] = []
  arms_by_model: dict[str, Trial] = {}
  for arm in study.arms:
    if arm.dropped:
      continue
    for seed in study.seeds:
      config = _config(study, arm, seed, free or {})
      trial = Trial(trial_id(config), arm.name, seed, arm.changes, config)
      model = json.dumps(same_model(config, FREE_FIELDS), sort_keys=True)
      if model in arms_by_model:
        other = arms_by_model[model]
        fields = [field for field in differing(config, other.config) if field not in FREE_FIELDS]
        say = 'says' if len(fields) == 1 else 'say'
        same = f'model, whatever {" and ".join(fields)} {say}' if fields else 'config'
        raise UserError('study.arms', arm.name, f'is the same as arm {other.arm!r}, one {same}')
      arms_by_model[model] = trial
      trials.append(trial)
    moe = config.moe
    moe_layers = config.model.num_layers // moe.every if moe.num_experts else 0
    check_layers(study.metric.name, arm.name, moe_layers)
  flops = {trial.arm: training_flops(trial.config) for trial in trials}
  check_planned(study, {trial.arm: trial.config for trial in trials}, flops)
  return trials


def trial_id(config: ml_collections.ConfigDict) -> str:
  """Returns 12 hexadecimal digits of the hash of a config, `FREE_FIELDS` left out.

  `LATER_FIELDS` at their default are left out, too: ids from before they came still hold.
  """
  fields = {
    f'{section}.{name}': value
    for section, values in config.to_dict().items()
    for name, value in values.items()
    if f'{section}.{name}' not in FREE_FIELDS
    and not (
      f'{section}.{name}' in LATER_FIELDS and value == config_lib.SCHEMA[section][name].default
    )
  }
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def _config(
  study: Study, arm: Point, seed: int, free: Mapping[str, Any]
) -> ml_collections.ConfigDict:
  config = unfrozen(study.base)
  for field, value in {**arm.changes, **free, 'train.seed': seed}.items():
    section, name = split_field(field)
    known = config_lib.SCHEMA.get(section, {})
    if name not in known:
      raise UserError(field, value, f'of arm {arm.name!r}: unknown field{near_fields(field)}')
    try:
      # An int serves as a float, and as nothing else.
      if isinstance(known[name].default, float) and type(value) is int:
        value = float(value)
      config[section][name] = value
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
      kind = type(known[name].default).__name__
      raise UserError(field, value, f'of arm {arm.name!r}: must be of type {kind}') from error
  given = config.train.init_from
  if given and ancestry.split(given)[1] is None:
    raise UserError(
      'train.init_from',
      given,
      f'of arm {arm.name!r}: must name a step in a study, as DIR@STEP: the newest may change',
    )
  try:
    config_lib.validate(config)
  except UserError as error:
    raise UserError('study.arms', arm.name, str(error)) from error
  return config


def check_new(study: Study, trials: Sequence[Trial], workdir: str | os.PathLike | None) -> None:
  """Checks the trials that have not begun for changes to no effect, and schedules.

  Args:
    study: of the trials.
    trials: some of the study.
    workdir: of the sweep; None if there is none yet.

  Raises:
    UserError: names the arm, and the field that nothing reads there.
  """
  for trial in trials:
    if workdir is not None and manifest.holds_run(trial.folder(workdir)):
      continue
    base = {field: field_value(study.base, field) for field in trial.changes}
    try:
      unread.check_unread(trial.config, base)
      unread.check_decay(trial.config)
    except UserError as error:
      raise UserError('study.arms', trial.arm, str(error)) from error
