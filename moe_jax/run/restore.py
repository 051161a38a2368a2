"""From the directory of a run to its model and parameters, on any mesh."""

import contextlib
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax.data import Tokenizer, load_tokenizer
from moe_jax.dispatch import why_not
from moe_jax.errors import DamagedError, UserError
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import manifest, same_run
from moe_jax.run.checkpoint import Checkpoints, saved_config
from moe_jax.run.setup import TOKENIZER
from moe_jax.train.program import optimizer_of
from moe_jax.train.state import TrainState, abstract_state


class RestoredRun(NamedTuple):
  """A run as it was saved.

  Attributes:
    config: that it was started with; `moe.exchange` as available here.
    manifest: the content of its manifest.
    step: of the checkpoint.
    params: on `mesh`.
    router_state: the same; {} where the routers have none.
    mesh: axes ('data', 'expert').
    tokenizer: that it was trained with.
    opt_state: of its optimizer, on `mesh`.
  """

  config: ml_collections.ConfigDict
  manifest: dict[str, Any]
  step: int
  params: Any
  router_state: Any
  mesh: Mesh
  tokenizer: Tokenizer
  opt_state: Any


def restore_run(
  workdir: str,
  step: int | None = None,
  mesh: str | None = None,
  flag: str = '--step',
  *,
  mesh_flag: str = '--mesh',
) -> RestoredRun:
  """Returns the parameters of a run.

  Args:
    workdir: of the run.
    step: of a checkpoint; the newest good one by default.
    mesh: 'data=D,expert=E'; by default the mesh of the run if there are as many devices, else a
      single device, with a printed note. Results do not depend on it.
    flag: that `step` was given by.
    mesh_flag: that `mesh` was given by.

  Raises:
    UserError: if there is no such run or step, or the mesh does not fit.
    DamagedError: if no checkpoint is good.
  """
  metadata = manifest.read(workdir)
  config = manifest.config_of(metadata, workdir)
  tokenizer = _tokenizer_of(workdir, metadata)
  device_mesh = _choose_mesh(config, mesh, mesh_flag)
  _choose_exchange(config, device_mesh)
  task = build_task(config, device_mesh, metadata['vocab_size'], 'eval')
  optimizer = optimizer_of(config, task)
  step, state = _state(workdir, metadata, abstract_state(task, optimizer), step=step, flag=flag)
  arrays = state.params, state.router_state, device_mesh, tokenizer, state.opt_state
  return RestoredRun(config, metadata, step, *arrays)


def _tokenizer_of(workdir: str, metadata: dict[str, Any]) -> Tokenizer:
  """Returns the tokenizer that a run was trained with."""
  try:
    tokenizer = load_tokenizer(str(pathlib.Path(workdir) / TOKENIZER))
  except DamagedError as error:
    raise DamagedError(f'{error}; the train command of the run puts it back') from error
  if tokenizer.vocab_size != metadata['vocab_size']:
    raise UserError(
      'tokenizer.vocab_size',
      tokenizer.vocab_size,
      f'the model in {workdir} has a vocabulary of {metadata["vocab_size"]}',
    )
  if tokenizer.fingerprint != metadata['data'].get('tokenizer', tokenizer.fingerprint):
    raise DamagedError(
      f'{workdir}/{TOKENIZER} is not the tokenizer that the model was trained with; the train '
      'command of the run puts it back'
    )
  return tokenizer


def _state(
  workdir: str, metadata: dict[str, Any], abstract: TrainState, *, step: int | None, flag: str
) -> tuple[int, TrainState]:
  """Returns the step of a checkpoint, by default the newest good one, and its state."""
  with contextlib.closing(Checkpoints(workdir, read_only=True)) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise UserError('workdir', workdir, 'has no checkpoint yet')
    if step is not None and step not in steps:
      raise UserError(flag, step, f'must be one of {sorted(steps)}')
    found = saved_config(workdir)
    differs = found and same_run.disagreement(metadata, found[1])
    if differs:
      raise DamagedError(
        f'manifest.json and the checkpoints in {workdir} disagree on {differs}; the train command '
        'of the run rebuilds the manifest from a checkpoint'
      )
    if step is not None:
      return step, checkpoints.restore_step(step, abstract)
    restored = checkpoints.restore(abstract, any_optimizer=True)
    if restored is None:
      raise DamagedError(f'no checkpoint in {workdir}')
    for damaged in checkpoints.damaged:
      newest = f'using {restored[0]}'
      print(f'warning: checkpoint {damaged} in {workdir} is damaged; {newest}', file=sys.stderr)
    return restored[0], restored[1]


def _choose_mesh(config: ml_collections.ConfigDict, mesh: str | None, flag: str) -> Mesh:
  wanted = (config.mesh.data, config.mesh.expert)
  if mesh is not None:
    wanted = _parse_mesh(mesh, flag)
  elif wanted[0] * wanted[1] > jax.device_count():
    print(
      f'note: {jax.device_count()} device(s) for a mesh of {wanted[0]}x{wanted[1]}; using one, the '
      'result is the same',
      file=sys.stderr,
    )
    wanted = (1, 1)
  if config.moe.num_experts % wanted[1]:
    raise UserError(flag, mesh, f'expert must divide {config.moe.num_experts} experts')
  try:
    return make_mesh(*wanted)
  except ValueError as error:
    raise UserError(flag, mesh, str(error)) from error


def _choose_exchange(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Lets a run of GPUs or TPUs be opened elsewhere, with a printed note."""
  if why_not(config.moe.exchange, mesh.devices.flat[0].platform):
    print(
      f'note: moe.exchange={config.moe.exchange} of the run is not to be had on these devices; '
      'using padded, the result is the same',
      file=sys.stderr,
    )
    config.moe.exchange = 'padded'


def _parse_mesh(mesh: str, flag: str) -> tuple[int, int]:
  parts = dict(part.partition('=')[::2] for part in mesh.split(','))
  if set(parts) != {'data', 'expert'} or not all(n.isdecimal() and int(n) for n in parts.values()):
    raise UserError(flag, mesh, 'must read data=D,expert=E')
  return int(parts['data']), int(parts['expert'])
