"""The manifest of a run: what it is, what it was made from, and how far it came."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import optim
from moe_jax.errors import DamagedError, UserError
from moe_jax.field_names import split_field
from moe_jax.files import is_incomplete, write_atomically
from moe_jax.schema import FREE_FIELDS, LATER_FIELDS, LATER_FIELDS_IN_IDS
from moe_jax.train import accounting, manifest_kinds
from moe_jax.train.manifest_kinds import LOCK

MANIFEST = 'manifest.json'
# The status that stands for a manifest that could not be read.
DAMAGED = 'damaged'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')


class Pace(NamedTuple):
  """How often a run logs from some step on; one that goes on may change it.

  Attributes:
    from_step: the last step before.
    log_every: steps between two lines of training.
    eval_every: steps between two evaluations; 0 for none.
  """

  from_step: int
  log_every: int
  eval_every: int


def new_manifest(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  vocab_size: int,
  data: dict[str, Any],
) -> dict[str, Any]:
  """Returns the manifest of a run that starts now.

  Args:
    config: validated.
    mesh: of this run.
    vocab_size: of the tokenizer.
    data: name, fingerprint and provenance of the data set.
  """
  commit, dirty = _git_state()
  return {
    'status': 'running',
    'step': 0,
    'config': config.to_dict(),
    'moe_jax': _version('moe_jax'),
    'git_commit': commit,
    'git_dirty': dirty,
    'python': platform.python_version(),
    'packages': {name: _version(name) for name in _PACKAGES},
    'devices': {
      'platform': jax.default_backend(),
      'kind': jax.devices()[0].device_kind,
      'count': jax.device_count(),
      'processes': jax.process_count(),
      # Of JAX_DEFAULT_MATMUL_PRECISION; without it accelerators may round what products multiply.
      'matmul_precision': jax.config.jax_default_matmul_precision or 'default',  # type: ignore
    },
    'mesh': dict(mesh.shape),
    'seed': config.train.seed,
    'vocab_size': vocab_size,
    'parameters': accounting.parameter_counts(config, vocab_size),
    'training_flops_per_token': accounting.training_flops_per_token(config, vocab_size),
    'causal': config_lib.is_causal(config),
    'routing': _routing_facts(config),
    'data': data,
  }


def _routing_facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns what the capacity comes to in training."""
  moe = config.moe
  if not moe.num_experts:
    return {}
  tokens = config.data.sequence_length * moe.group_size
  capacity = config_lib.training_capacity(config)
  return {
    'tokens_in_group': tokens,
    'tokens_per_expert': accounting.tokens_per_expert(config),
    'expert_capacity': capacity,
    'effective_capacity_factor': capacity / accounting.tokens_per_expert(config),
    'drop_share_of_random_routing': accounting.random_drop_share(config, capacity),
  }


def _version(package: str) -> str | None:
  """Returns the version of a package; None if it is not installed, as this one in a checkout."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_state() -> tuple[str | None, bool | None]:
  """Returns commit and dirty flag of the checkout this package lies in; None outside of one."""
  folder = pathlib.Path(__file__).resolve().parents[2]

  def git(*words: str) -> str | None:
    try:
      done = subprocess.run(
        ['git', '-C', str(folder), *words], capture_output=True, text=True, timeout=30, check=False
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  if git('ls-files', '--error-unmatch', 'moe_jax/__init__.py') is None:
    return None, None
  status = git('status', '--porcelain')
  return git('rev-parse', 'HEAD'), None if status is None else bool(status)


def paces(manifest: dict[str, Any]) -> list[Pace]:
  """Returns how often a run logged, in the order of its steps; [] where its manifest can't tell."""
  if 'logging' in manifest:
    return [Pace(*numbers) for numbers in manifest['logging']]
  if manifest['status'] == DAMAGED or manifest.get('resumed_from'):
    return []
  train = manifest['config']['train']
  return [Pace(0, train['log_every'], train['eval_every'])]


def paces_from(
  old: dict[str, Any] | None, config: ml_collections.ConfigDict, step: int
) -> list[Pace]:
  """Returns `paces` of a run that goes on from a step; `old` is None if it begins."""
  before = [pace for pace in paces(old) if pace.from_step < step] if old else []
  return [*before, Pace(step, config.train.log_every, config.train.eval_every)]


def exists(workdir: str | os.PathLike) -> bool:
  """Whether a directory holds a run; False also for a path that can't be looked at."""
  try:
    return (pathlib.Path(workdir) / MANIFEST).exists()
  except OSError:
    return False


def read(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the manifest of a run.

  Raises:
    UserError: if there is no run in the directory.
    DamagedError: if its manifest is not readable as one.
  """
  path = pathlib.Path(workdir) / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding='utf-8'))
    problem = manifest_kinds.problem_of(manifest)
  except (FileNotFoundError, NotADirectoryError) as error:
    raise UserError('workdir', str(workdir), 'holds no run: no manifest.json there') from error
  # Not UTF-8, not JSON, more digits than Python reads; brackets nested without end.
  except (ValueError, RecursionError) as error:
    problem = str(error)
  if problem:
    raise DamagedError(
      f"{path} is damaged: {problem}; the run's train command rebuilds it from a checkpoint"
    )
  return manifest


def stand_in(step: int, config: dict[str, Any]) -> dict[str, Any]:
  """Returns what takes the place of a damaged manifest: what a checkpoint knows."""
  return {'status': DAMAGED, 'step': step, 'config': config, 'data': {'fingerprint': None}}


def set_aside(workdir: str | os.PathLike) -> pathlib.Path:
  """Moves a damaged manifest out of the way and returns where it is."""
  target = pathlib.Path(workdir) / 'damaged_manifest.json'
  number = 1
  while target.exists():
    target = target.with_name(f'damaged_manifest_{number}.json')
    number += 1
  return (pathlib.Path(workdir) / MANIFEST).rename(target)


def write(workdir: str | os.PathLike, manifest: dict[str, Any]) -> None:
  """Writes the manifest whole or not at all."""
  text = json.dumps(manifest, indent=2, sort_keys=True)
  write_atomically(pathlib.Path(workdir) / MANIFEST, text)


def config_of(manifest: dict[str, Any], workdir: str | os.PathLike) -> ml_collections.ConfigDict:
  """Returns the config a run was started with.

  Args:
    manifest: of the run.
    workdir: of the run, for messages.

  Raises:
    UserError: if this version does not know one of its fields.
    DamagedError: if a field is of another type.
  """
  config = config_lib.get_config()
  for room, fields in manifest['config'].items():
    for name, value in fields.items():
      if room not in config or name not in config[room]:
        raise UserError(
          f'{room}.{name}', value, f'of the run in {workdir} is unknown to this version'
        )
      try:
        config[room][name] = value
      except TypeError as error:
        raise DamagedError(
          f'{pathlib.Path(workdir) / MANIFEST} is damaged: {room}.{name}={value!r} is not of type '
          f'{type(config[room][name]).__name__}'
        ) from error
  return config


def check_same_config(
  workdir: str, manifest: dict[str, Any], config: ml_collections.ConfigDict, step: int = 0
) -> None:
  """Checks that a run goes on with the config it was started with.

  Args:
    workdir: of the run.
    manifest: of the run.
    config: that it is to go on with.
    step: of its newest checkpoint.

  Raises:
    UserError: names the first field that differs; `FREE_FIELDS` may, and train.num_steps may grow
      where the schedule allows it.
  """
  for room, fields in config.to_dict().items():
    for name, value in fields.items():
      field = f'{room}.{name}'
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
  """Returns whether a config has more steps than the run that it goes on with."""
  return bool(_value(old['config'], 'train.num_steps') != config.train.num_steps)


def lengthened(
  old: dict[str, Any] | None, config: ml_collections.ConfigDict, step: int
) -> dict[str, Any]:
  """Returns what the manifest of a run says of its lengthenings; {} if there were none.

  Args:
    old: its manifest before; None if it begins.
    config: that it goes on with.
    step: that it goes on from.
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
    config = read(workdir)['config']
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
  """Checks that a run goes on with the data it was started with.

  A stand-in knows no fingerprint; then restoring the position in the data finds a difference.

  Raises:
    UserError: if text, splits or tokenizer are others.
  """
  if manifest['data']['fingerprint'] not in (None, fingerprint):
    raise UserError(
      'data.name',
      config.data.name,
      f'its text or tokenizer is not what the run in {workdir} was trained on',
    )


# Left by a run that was stopped before its manifest was written; the last by earlier versions.
_BEGINNINGS = (LOCK, 'checkpoints', 'tokenizer', 'manifest.tmp')


def _hold(lock: IO[str]) -> None:
  """Locks a file; tries twice, as `moe_jax.runs` holds it for a moment to see whether it is free.

  Raises:
    OSError: if another process holds it.
  """
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    time.sleep(0.1)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def claimed(workdir: str) -> Iterator[None]:
  """Makes the directory and holds it, so that two runs never write into one.

  A directory that this made, and into which nothing was written, is removed again.

  Raises:
    UserError: if it can't be written, holds something that is not a run, or is held.
  """
  path = pathlib.Path(workdir)
  try:
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    had_lock = (path / LOCK).exists()
    lock = open(path / LOCK, 'w')  # noqa: SIM115
  except OSError as error:
    raise UserError('workdir', workdir, f'cannot be written: {error.strerror}') from error
  with lock:
    try:
      _hold(lock)
    except OSError as error:
      raise UserError('workdir', workdir, 'another process is writing this run') from error
    try:
      names = [entry.name for entry in path.iterdir()]
      foreign = [n for n in names if n not in _BEGINNINGS and not is_incomplete(n)]
      if foreign and not holds_run(workdir):
        raise UserError('workdir', workdir, f'holds {foreign[0]!r} but no run; use an empty one')
      yield
    finally:
      if not (path / MANIFEST).exists() and not had_lock:
        (path / LOCK).unlink(missing_ok=True)
        if new and not any(path.iterdir()):
          path.rmdir()


def holds_run(workdir: str | os.PathLike) -> bool:
  """Whether a directory holds a manifest or a checkpoint, from which one can be rebuilt."""
  checkpoints = os.path.join(workdir, 'checkpoints')
  # False, too, for a path that no directory can have.
  return exists(workdir) or (
    os.path.isdir(checkpoints) and any(name.isdecimal() for name in os.listdir(checkpoints))
  )


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
  """Returns the first field in which two saved configs differ, `FREE_FIELDS` apart."""
  for room in sorted(one.keys() | other.keys()):
    for name in sorted(one.get(room, {}).keys() | other.get(room, {}).keys()):
      field = f'{room}.{name}'
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
