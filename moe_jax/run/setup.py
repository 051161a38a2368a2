"""Setup of a run before its first step, with what an earlier call left of it."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax.data import (
  Dataset,
  Examined,
  Tokenizer,
  examine,
  load_tokenizer,
  open_dataset,
  open_if_prepared,
)
from moe_jax.dispatch import why_not
from moe_jax.errors import DamagedError, UserError
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import manifest, same_run
from moe_jax.run.checkpoint import saved_config
from moe_jax.run.size import check_size

TOKENIZER = 'tokenizer'


def mesh_of(config: ml_collections.ConfigDict) -> Mesh:
  """Returns the mesh of a config; an axis is never made smaller to fit.

  Raises:
    UserError: if there are not enough devices, or they do not support the exchange of the config.
  """
  try:
    mesh = make_mesh(config.mesh.data, config.mesh.expert)
  except ValueError as error:
    raise UserError(
      *_largest_axis(config),
      f'{error}; for simulated CPU devices set '
      'XLA_FLAGS=--xla_force_host_platform_device_count=N, or choose a smaller mesh',
    ) from error
  if jax.process_count() > 1 and mesh.size != jax.device_count():
    raise UserError(
      *_largest_axis(config),
      f'mesh.data * mesh.expert must be {jax.device_count()}: {jax.process_count()} processes use '
      'all of their devices',
    )
  reason = why_not(config.moe.exchange, mesh.devices.flat[0].platform)
  if reason and config.moe.num_experts:
    raise UserError('moe.exchange', config.moe.exchange, reason)
  return mesh


def _largest_axis(config: ml_collections.ConfigDict) -> tuple[str, int]:
  """Returns the field that most of the devices are due to, and its value."""
  data, expert = config.mesh.data, config.mesh.expert
  return ('mesh.data', data) if data >= expert else ('mesh.expert', expert)


def dataset_of(config: ml_collections.ConfigDict, tokenizer: Tokenizer | None = None) -> Dataset:
  """Returns the data set of a config, prepared if it was not.

  Args:
    config: validated.
    tokenizer: of the run; read by one that inherits it (`train.init_from`), others make their own.
  """
  given = tokenizer if config.train.init_from else None
  return open_dataset(config.data.name, **_how(config), given_tokenizer=given)


def prepared_dataset_of(config: ml_collections.ConfigDict) -> Dataset | None:
  """Returns the data set of a config if it is prepared already; writes nothing.

  None, too, where the tokenizer is another run's.
  """
  if config.train.init_from and config.data.tokenizer != 'bytes':
    return None
  return open_if_prepared(config.data.name, **_how(config))


def examined_text_of(config: ml_collections.ConfigDict) -> Examined:
  """Returns the known properties of the text of a config before it is prepared."""
  how = _how(config)
  del how['tokenizer'], how['vocab_size']
  return examine(config.data.name, **how)


def _how(config: ml_collections.ConfigDict) -> dict[str, Any]:
  data = config.data
  return {
    'data_dir': data.data_dir,
    'tokenizer': data.tokenizer,
    'vocab_size': data.vocab_size,
    'valid_fraction': data.valid_fraction,
    'test_fraction': data.test_fraction,
  }


def read_old(workdir: str, say: Callable[[str], None]) -> dict[str, Any] | None:
  """Returns the manifest of the run in a directory; None if there is no run.

  One that is damaged, missing or another run's is replaced by metadata of the newest checkpoint.
  """
  if not manifest.holds_run(workdir):
    return None
  found = saved_config(workdir)
  problem = 'manifest.json is missing'
  if manifest.exists(workdir):
    try:
      old = manifest.read(workdir)
      differs = found and same_run.disagreement(old, found[1])
      if not differs:
        return old
      problem = f'manifest.json and the checkpoints disagree on {differs}'
    except DamagedError as error:
      if found is None:
        raise
      problem = str(error)
  if found is None:
    return None
  step, config = found
  say(f'warning: {problem}; going on with the config in checkpoint {step}')
  return manifest.stand_in(step, config)


def check_splits(config: ml_collections.ConfigDict, dataset: Dataset) -> None:
  """Checks the splits before the first step, as they would fail later."""
  check_size(config, dataset.tokenizer.vocab_size)
  check_validation(config, dataset)


def check_validation(config: ml_collections.ConfigDict, dataset: Dataset | Examined) -> None:
  """Checks that there is a text for the evaluations during training.

  Raises:
    UserError: if there are to be some and no document is held out for them.
  """
  if config.train.eval_every and not dataset.num_documents('valid'):
    raise UserError(
      'train.eval_every',
      config.train.eval_every,
      f'must be 0: {config.data.name} has no document for validation, which takes a '
      'data.valid_fraction above 0 and a domain of at least 3 documents',
    )


def keep_tokenizer(workdir: str, tokenizer: Tokenizer) -> None:
  """Puts the tokenizer next to the run, unless it is there and whole."""
  folder = pathlib.Path(workdir) / TOKENIZER
  try:
    if load_tokenizer(str(folder)).fingerprint == tokenizer.fingerprint:
      return
  except (DamagedError, UserError):
    pass
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder))


def first_manifest(
  config: ml_collections.ConfigDict, mesh: Mesh, dataset: Dataset
) -> dict[str, Any]:
  """Returns the manifest of a run that begins."""
  data = {
    'name': config.data.name,
    'fingerprint': dataset.fingerprint,
    'tokenizer': dataset.tokenizer.fingerprint,
    'domains': list(dataset.domains),
    'provenance': dataset.provenance,
  }
  return manifest.new_manifest(config, mesh, dataset.tokenizer.vocab_size, data)
