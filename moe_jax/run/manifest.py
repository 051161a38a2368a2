"""The manifest of a run: what it is, what it was made from, and how far it is."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax.errors import DamagedError, UserError
from moe_jax.files import write_atomically
from moe_jax.run import manifest_kinds
from moe_jax.train import accounting

MANIFEST = 'manifest.json'
# The status that stands for a manifest that could not be read.
DAMAGED = 'damaged'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')


class Pace(NamedTuple):
  """Logging intervals of a run from some step on; a continued run may change them.

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
      # Of JAX_DEFAULT_MATMUL_PRECISION; without it accelerators may round the operands of matmuls.
      'matmul_precision': jax.config.jax_default_matmul_precision or 'default',  # type: ignore
    },
    'mesh': dict(mesh.shape),
    'seed': config.train.seed,
    'vocab_size': vocab_size,
    'parameters': accounting.parameter_counts(config, vocab_size),
    'training_flops_per_token': accounting.training_flops_per_token(config, vocab_size),
    'causal': config_lib.is_causal(config),
    'routing': _routing_metadata(config),
    'data': data,
  }


def _routing_metadata(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the capacity in training."""
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
  """Returns `paces` of a run that continues from a step; `old` is None if it begins."""
  before = [pace for pace in paces(old) if pace.from_step < step] if old else []
  return [*before, Pace(step, config.train.log_every, config.train.eval_every)]


def exists(workdir: str | os.PathLike) -> bool:
  """True if a directory holds a run; False also for a path that cannot be read."""
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
    raise UserError(
      'workdir', str(workdir), f'holds no run{_where_runs_are(path.parent)}'
    ) from error
  # Not UTF-8, not JSON, more digits than Python reads; brackets nested without end.
  except (ValueError, RecursionError) as error:
    problem = str(error)
  if problem:
    raise DamagedError(
      f"{path} is damaged: {problem}; the run's train command rebuilds it from a checkpoint"
    )
  return manifest


def stand_in(step: int, config: dict[str, Any]) -> dict[str, Any]:
  """Returns a replacement for a damaged manifest, from a checkpoint."""
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
  for section, fields in manifest['config'].items():
    for name, value in fields.items():
      if section not in config or name not in config[section]:
        raise UserError(
          f'{section}.{name}', value, f'of the run in {workdir} is unknown to this version'
        )
      try:
        config[section][name] = value
      except TypeError as error:
        raise DamagedError(
          f'{pathlib.Path(workdir) / MANIFEST} is damaged: {section}.{name}={value!r} is not of '
          f'type {type(config[section][name]).__name__}'
        ) from error
  return config


def _where_runs_are(folder: pathlib.Path) -> str:
  """Returns what an error says of a folder without a run: that of a sweep holds some below."""
  trials = folder / 'trials'
  found = (
    next((p for p in sorted(trials.iterdir()) if exists(p)), None) if trials.is_dir() else None
  )
  if found is None:
    return ': no manifest.json there'
  return f' itself, but trials of a sweep; name one, as {found}'


def holds_run(workdir: str | os.PathLike) -> bool:
  """True if a directory holds a manifest, or a checkpoint from which one can be rebuilt."""
  checkpoints = os.path.join(workdir, 'checkpoints')
  # False, too, for a path that no directory can have.
  return exists(workdir) or (
    os.path.isdir(checkpoints) and any(name.isdecimal() for name in os.listdir(checkpoints))
  )
