"""A run that starts from the parameters of another: `train.init_from`.

From the source come its parameters, its routers' state (`train.init_router_state`) and, if
selected, its optimizer's (`train.init_optimizer`). Steps, schedule, order of the data and random
numbers start afresh. The tokenizer is the source's, too. Once the new run has a checkpoint of its
own, the source is neither needed nor read.
"""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from moe_jax.data import Tokenizer, load_tokenizer
from moe_jax.errors import DamagedError, UserError
from moe_jax.models.build import build_task
from moe_jax.models.task import Task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import checkpoint, manifest, optimizer_layout, same_run
from moe_jax.run.restore import restore_run
from moe_jax.run.setup import TOKENIZER
from moe_jax.train.program import optimizer_of
from moe_jax.train.state import TrainState, abstract_state, state_shardings

FIELD = 'train.init_from'


class Source(NamedTuple):
  """The run that another starts from.

  Attributes:
    given: the value of `train.init_from`.
    workdir: of the source, as given.
    step: of its checkpoint; None for the newest good one.
    manifest: the content of its manifest.
    config: that it was trained with.
    tokenizer: the same.
  """

  given: str
  workdir: str
  step: int | None
  manifest: dict[str, Any]
  config: ml_collections.ConfigDict
  tokenizer: Tokenizer


def split(given: str) -> tuple[str, int | None]:
  """Returns directory and step of DIR@STEP; without a step, None."""
  directory, _, step = given.rpartition('@')
  named = bool(directory) and step.isdecimal()
  return os.path.expanduser(directory if named else given), int(step) if named else None


def inherited(
  config: ml_collections.ConfigDict,
  workdir: str,
  old: dict[str, Any] | None,
  pinned: dict[str, Any] | None = None,
) -> tuple[Source | None, Tokenizer | None]:
  """Returns the source of a run, None once it is no longer needed, and the tokenizer it inherits.

  Args:
    config: of the new run.
    workdir: of the new run.
    old: its manifest, if it has begun.
    pinned: entry of the ancestry of another run that starts from the same.

  Raises:
    UserError: if the source is not there, or can't be what this config starts from.
    DamagedError: if its manifest or tokenizer is damaged, or the run's own tokenizer.
  """
  if not config.train.init_from:
    return None, None
  finished = old is not None and old['status'] == 'finished'
  if checkpoint.saved_steps(workdir) or finished:
    return None, _own_tokenizer(config, workdir, old)
  source = _open(config, workdir, pin_of(old) or pinned)
  _check_fits(source, config)
  return source, source.tokenizer


def _own_tokenizer(
  config: ml_collections.ConfigDict, workdir: str, old: dict[str, Any] | None
) -> Tokenizer | None:
  """Returns the tokenizer that a run has inherited; from the source if its own copy is damaged."""
  if config.data.tokenizer == 'bytes':
    return None
  try:
    return load_tokenizer(str(pathlib.Path(workdir) / TOKENIZER))
  except DamagedError:
    try:
      there = load_tokenizer(str(pathlib.Path(split(config.train.init_from)[0]) / TOKENIZER))
    except DamagedError:
      there = None
    if there is None or there.fingerprint != (old or {}).get('data', {}).get('tokenizer'):
      raise
    return there


def pin_of(old: dict[str, Any] | None) -> dict[str, Any] | None:
  """Returns the source that the manifest of a run names: the last entry of its ancestry."""
  return (old or {}).get('ancestry', [None])[-1]


def _open(config: ml_collections.ConfigDict, workdir: str, pinned: dict[str, Any] | None) -> Source:
  given = config.train.init_from
  directory, step = split(given)
  if os.path.realpath(directory) == os.path.realpath(workdir):
    raise UserError(FIELD, given, 'is the run itself; it goes on without it')
  try:
    metadata = manifest.read(directory)
    source_config = manifest.config_of(metadata, directory)
  except UserError as error:
    reason = error.allowed if error.field == 'workdir' else str(error)
    raise UserError(FIELD, given, reason) from error
  steps = checkpoint.saved_steps(directory)
  if not steps:
    raise UserError(FIELD, given, f'{directory} has no checkpoint')
  if step is None and pinned:
    step = pinned.get('step')
  if step is not None and step not in steps:
    raise UserError(FIELD, given, f'no checkpoint of step {step} there, but of {steps}')
  tokenizer = load_tokenizer(str(pathlib.Path(directory) / TOKENIZER))
  return Source(given, directory, step, metadata, source_config, tokenizer)


def _check_fits(source: Source, config: ml_collections.ConfigDict) -> None:
  """Checks tokenizer and shapes, only from the configs."""
  for name in ('tokenizer', 'vocab_size'):
    if config.data[name] != source.config.data[name]:
      raise UserError(
        f'data.{name}',
        config.data[name],
        f'must be {source.config.data[name]}, which {FIELD}={source.given} has: a token must mean '
        'the same',
      )
  vocab_size = source.tokenizer.vocab_size
  there, here = (_shapes(c, vocab_size) for c in (source.config, config))
  hints = {
    'params': '',
    'router_state': '; train.init_router_state=false starts with a new one',
    'opt_state': '; train.init_optimizer=false starts with a new one',
  }
  for part in _taken(config):
    for path in sorted(here[part].keys() | there[part].keys()):
      shapes = [shapes[part].get(path) for shapes in (there, here)]
      if shapes[0] != shapes[1]:
        one, other = ('not there' if s is None else str(list(s)) for s in shapes)
        name = '/'.join((part, *path))
        raise UserError(
          FIELD, source.given, f'{name} is {one} in it and {other} in this run{hints[part]}'
        )


def _taken(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the fields of the training state that are taken from the source."""
  train = config.train
  state = {'router_state': train.init_router_state, 'opt_state': train.init_optimizer}
  return ['params', *(name for name, taken in state.items() if taken)]


def _shapes(config: ml_collections.ConfigDict, vocab_size: int) -> dict[str, Any]:
  """Returns {part of the state: {path: shape}}, which depend on no mesh and no exchange."""
  config = config.copy_and_resolve_references()
  config.moe.exchange = 'padded'
  task = build_task(config, make_mesh(1, 1), vocab_size, 'eval')
  state = abstract_state(task, optimizer_of(config, task))
  return {name: dict(optimizer_layout.shapes_of(part)) for name, part in state._asdict().items()}


def start(
  source: Source,
  config: ml_collections.ConfigDict,
  task: Task,
  optimizer: optax.GradientTransformation,
  state: TrainState,
) -> tuple[TrainState, dict[str, Any]]:
  """Returns the state of a run that starts from another, and the entry of its ancestry.

  Args:
    source: from `inherited`.
    config: of the new run.
    task: of the new run.
    optimizer: of the new run.
    state: its own, before the first step; donated.

  Raises:
    UserError: if the optimizer's arrays are those of an earlier version.
    DamagedError: if the checkpoint is damaged.
  """
  mesh = ','.join(f'{name}={size}' for name, size in task.mesh.shape.items())
  restored = restore_run(source.workdir, source.step, mesh, FIELD)
  found = {
    'params': restored.params,
    'router_state': restored.router_state,
    'opt_state': restored.opt_state,
  }
  taken = {name: found[name] for name in _taken(config)}
  sums = checkpoint.digest(taken)
  entry = {
    'workdir': source.workdir,
    'step': restored.step,
    'git_commit': source.manifest.get('git_commit'),
    'config_digest': same_run.config_digest(source.manifest['config']),
    'data_fingerprint': source.manifest['data']['fingerprint'],
    'taken': sorted(taken),
    'digest': hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
  }
  if 'opt_state' in taken:
    if optimizer_layout.shapes_of(taken['opt_state']) != optimizer_layout.shapes_of(
      state.opt_state
    ):
      raise UserError(
        'train.init_optimizer',
        True,
        f'the optimizer in {source.workdir} is of an earlier version; start with a new one',
      )
    leaves = jax.tree.leaves(_with_schedule_at_0(taken['opt_state']))
    taken['opt_state'] = jax.tree.unflatten(jax.tree.structure(state.opt_state), leaves)
  shardings = state_shardings(task, optimizer)._asdict()
  placed = {name: jax.device_put(part, shardings[name]) for name, part in taken.items()}
  return state._replace(**placed), entry


def _with_schedule_at_0(opt_state: Any) -> Any:
  """Returns the state of an optimizer whose schedule restarts; its moments stay."""
  is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
  return jax.tree.map(
    lambda node: jax.tree.map(jnp.zeros_like, node) if is_schedule(node) else node,
    opt_state,
    is_leaf=is_schedule,
  )


def check_pinned(
  given: str, entry: dict[str, Any], pinned: dict[str, Any] | None, whose: str
) -> None:
  """Checks that a source has not changed since it was read before.

  Raises:
    UserError: if other numbers would be taken from it now.
  """
  if pinned and pinned.get('digest') not in (None, entry['digest']):
    raise UserError(
      FIELD,
      given,
      f'holds other numbers than when {whose} started from it (step {pinned.get("step")} then, '
      f'{entry["step"]} now); name its step as DIR@STEP and use another --workdir',
    )


def known(config: ml_collections.ConfigDict, old: dict[str, Any] | None) -> list[dict[str, Any]]:
  """Returns the ancestry of a run that continues: that of its manifest, or of its config."""
  if old and 'ancestry' in old:
    return old['ancestry']
  directory, step = split(config.train.init_from)
  return [{'workdir': directory, 'step': step}]


def of(source: Source, entry: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the ancestry of a run, from the root on: that of its source, and the source."""
  return [*source.manifest.get('ancestry', []), entry]
