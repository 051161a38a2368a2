"""Checks that a run may continue: same config and data as at its start, or only more steps."""

import hashlib
import json
from typing import Any

import ml_collections

from moe_jax import config as config_lib
from moe_jax import optim
from moe_jax.errors import DamagedError, UserError
from moe_jax.field_names import split_field
from moe_jax.run import manifest as manifest_lib
from moe_jax.schema import FREE_FIELDS, LATER_FIELDS, LATER_FIELDS_IN_IDS


def check_same_config(
  workdir: str, manifest: dict[str, Any], config: ml_collections.ConfigDict, step: int = 0
) -> None:
  """Checks that a run continues with the config it was started with.

  Args:
    workdir: of the run.
    manifest: of the run.
    config: that it is to continue with.
    step: of its newest checkpoint.

  Raises:
    UserError: names the first field that differs; `FREE_FIELDS` may, and train.num_steps may grow
      where the schedule allows it.
  """
  for section, fields in config.to_dict().items():
    for name, value in fields.items():
      field = f'{section}.{name}'
      old = _value(manifest['config'], field)
      if field in FREE_FIELDS or old == value:
        continue
      if field == 'train.num_steps' and isinstance(old, int) and old < value:
        _check_lengthening(workdir, manifest, config, step)
        continue
      raise UserError(field, value, f'the run in {workdir} has {old!r}; use another --workdir')


def _check_lengthening(
  workdir: str, manifest: dict[str, Any], config: ml_collections.ConfigDict, step: int
) -> None:
  """Checks that the steps done are those of the longer run, whose first ones they are."""
  schedule, reason = config.optim.schedule, ''
  num_steps = manifest['config']['train']['num_steps']
  if not step and manifest['status'] == 'finished':
    reason = 'its checkpoints are gone'
  elif schedule in ('cosine', 'linear'):
    reason = f'optim.schedule={schedule} was made for that many'
  elif schedule == 'wsd' and step > optim.decay_start(config.optim, num_steps):
    start = optim.decay_start(config.optim, num_steps)
    reason = f'its wsd schedule decays from step {start} on and its newest checkpoint is of {step}'
  if reason:
    raise UserError(
      'train.num_steps',
      config.train.num_steps,
      f"the run in {workdir} has {num_steps} and can't be lengthened: {reason}; to train on from "
      f'it, start a new run with train.init_from={workdir}',
    )


def lengthens(old: dict[str, Any], config: ml_collections.ConfigDict) -> bool:
  """Returns True if a config has more steps than the run that it continues."""
  return bool(_value(old['config'], 'train.num_steps') != config.train.num_steps)


def lengthened(
  old: dict[str, Any] | None, config: ml_collections.ConfigDict, step: int
) -> dict[str, Any]:
  """Returns the entry of the manifest on lengthenings of a run; {} if there were none.

  Args:
    old: its manifest before; None if it begins.
    config: that it continues with.
    step: that it continues from.
  """
  before = (old or {}).get('lengthened', [])
  if old and lengthens(old, config):
    num_steps = _value(old['config'], 'train.num_steps')
    before = [*before, {'at': step, 'from': num_steps, 'to': config.train.num_steps}]
  return {'lengthened': before} if before else {}


def config_digest(config: dict[str, Any]) -> str:
  """Returns the SHA-256 of a config, the same whatever the order of its fields."""
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _value(config: dict[str, Any], field: str) -> Any:
  """Returns a field of a saved config; its default where it came later, else None."""
  section, name = split_field(field)
  later = field in (*LATER_FIELDS, *LATER_FIELDS_IN_IDS)
  default = config_lib.SCHEMA[section][name].default if later else None
  return config.get(section, {}).get(name, default)


def with_way_on(error: UserError, workdir: str) -> UserError:
  """Returns the error of a field, with what to do if the run in a directory has that very value.

  Bounds are sometimes narrowed; a run from before can be read, but a config with its value can't be
  trained any more.
  """
  try:
    config = manifest_lib.read(workdir)['config']
  except (UserError, DamagedError):
    return error
  section, name = split_field(error.field)
  known = name in config_lib.SCHEMA.get(section, {})
  if not known or config.get(section, {}).get(name) != error.value:
    return error
  return UserError(
    error.field,
    error.value,
    f'{error.allowed}; the run in {workdir} has it from an earlier version, so it can be evaluated '
    f'and sampled but not go on: start a new run with another {error.field} and '
    f'--config.train.init_from={workdir}',
  )


def check_same_data(
  workdir: str, manifest: dict[str, Any], config: ml_collections.ConfigDict, fingerprint: str
) -> None:
  """Checks that a run continues with the data it was started with.

  A replaced manifest has no fingerprint; then restoring the position in the data finds a
  difference.

  Raises:
    UserError: if text, splits or tokenizer are others.
  """
  if manifest['data']['fingerprint'] not in (None, fingerprint):
    raise UserError(
      'data.name',
      config.data.name,
      f'its text or tokenizer is not what the run in {workdir} was trained on',
    )


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
  """Returns the first field in which two saved configs differ, `FREE_FIELDS` apart."""
  for section in sorted(one.keys() | other.keys()):
    for name in sorted(one.get(section, {}).keys() | other.get(section, {}).keys()):
      field = f'{section}.{name}'
      if field not in FREE_FIELDS and _value(one, field) != _value(other, field):
        return field
  return None


def disagreement(manifest: dict[str, Any], saved: dict[str, Any]) -> str | None:
  """Returns the first field in which a manifest and the config of a checkpoint differ.

  A checkpoint from before a lengthening has fewer steps.
  """
  train = saved.get('train', {})
  if train.get('num_steps') in [entry.get('from') for entry in manifest.get('lengthened', [])]:
    saved = saved | {'train': train | {'num_steps': _value(manifest['config'], 'train.num_steps')}}
  return first_difference(manifest['config'], saved)
