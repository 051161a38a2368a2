"""Checkpoints with Orbax: asynchronous, atomic, and checked against their own digest.

A checkpoint holds the whole state (parameters, optimizer, step, and the seed that with the step
makes every random number), the position in the data, the resolved config, and digests: of every
array an integer sum of its bits, which does not depend on the mesh, and the SHA-256 of the
position. Orbax makes a checkpoint visible only when it is complete; the digests detect what is
damaged or swapped afterwards.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from moe_jax.errors import DamagedError, UserError, refusal_in
from moe_jax.run import optimizer_layout
from moe_jax.train.state import TrainState

FOLDER = 'checkpoints'
_POSITION = 'data_sha256'


class Checkpoints:
  """The checkpoints of one run.

  Attributes:
    damaged: steps that could not be restored, newest first, after `restore`.
  """

  def __init__(self, workdir: str, keep: int = 2, read_only: bool = False):
    self._folder = (pathlib.Path(workdir) / FOLDER).absolute()
    self._read_only = read_only
    self.damaged: list[int] = []
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=not read_only,
    )
    self._options = options
    self._manager = self._open() if self._folder.exists() or not read_only else None

  def _open(self) -> ocp.CheckpointManager:
    handlers = {
      'state': ocp.StandardCheckpointHandler(),
      'data': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
      'digest': ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(self._folder, item_handlers=handlers, options=self._options)

  def steps(self) -> list[int]:
    """Returns the steps that have a complete checkpoint, newest first."""
    return sorted(self._manager.all_steps(), reverse=True) if self._manager else []

  def save(
    self, step: int, state: TrainState, data_position: dict[str, Any], config: dict[str, Any]
  ) -> None:
    """Starts to save; returns when the arrays are copied and training may go on."""
    assert self._manager is not None and not self._read_only
    if step in self._manager.all_steps():
      return
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          data=ocp.args.JsonSave(data_position),
          config=ocp.args.JsonSave(config),
          digest=ocp.args.JsonSave(digest(state) | {_POSITION: _position_digest(data_position)}),
        ),
      )

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns a full disk and its like into a UserError, however Orbax reports them."""
    try:
      yield
    except Exception as error:
      refusal = refusal_in(error)
      if refusal is None:
        raise
      raise UserError(
        'workdir',
        str(self._folder.parent),
        f'a checkpoint could not be written ({refusal.strerror}); earlier ones are kept',
      ) from error

  def restore(
    self, abstract: TrainState, any_optimizer: bool = False
  ) -> tuple[int, TrainState, dict[str, Any]] | None:
    """Returns (step, state, data position) of the newest good checkpoint; None if there is none.

    Args:
      abstract: shapes, dtypes and shardings; the mesh may differ from the one that saved.
      any_optimizer: whether the optimizer's arrays may be those of an earlier version, with which
        nothing can be trained.

    Raises:
      DamagedError: if there are checkpoints and none is good.
      UserError: if the optimizer's arrays are those of an earlier version.
    """
    reasons = []
    for step in self.steps():
      if not any_optimizer and self._as_saved(step, abstract) is not None:
        raise UserError(
          'workdir',
          str(self._folder.parent),
          f'checkpoint {step} is of an earlier rule of its optimizer (optim.name), which did not '
          'update each matrix alone; it can be evaluated and sampled, not trained on: use another '
          '--workdir',
        )
      try:
        state, position = self._restore(step, abstract)
      # For files that are missing, cut or changed Orbax raises many types, Exception included.
      except Exception as error:
        reasons.append(f'step {step}: {_reason(error)}')
        self.damaged.append(step)
        continue
      return step, state, position
    if reasons:
      raise DamagedError(
        f'no good checkpoint in {self._folder}; tried, newest first: {"; ".join(reasons)}; nothing '
        'was changed: put the folder of one of these steps back from a copy, or train again in '
        f'another --workdir, or in this one after moving {self._folder.parent} away'
      )
    return None

  def _as_saved(self, step: int, abstract: TrainState) -> TrainState | None:
    """Returns the state with another version's optimizer, if the checkpoint holds one."""
    assert self._manager is not None
    try:
      saved = optimizer_layout.shapes_of(self._manager.item_metadata(step)['state'])
      return optimizer_layout.as_saved(abstract, saved) if saved else None
    except Exception:  # Restoring it reports the error.
      return None

  def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
    assert self._manager is not None
    abstract = self._as_saved(step, abstract) or abstract
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        data=ocp.args.JsonRestore(),
        digest=ocp.args.JsonRestore(),
      ),
    )
    state = TrainState(*restored['state'])
    if digest(state)['bit_sums'] != restored['digest']['bit_sums']:
      raise DamagedError('its arrays are not those that were saved')
    # Earlier versions kept no digest of the position.
    position = _position_digest(restored['data'])
    if restored['digest'].get(_POSITION, position) != position:
      raise DamagedError('its position in the data is not that which was saved')
    # Of a pack, one for each member.
    own = np.unique(np.asarray(state.step)).tolist()
    if own != [step]:
      raise DamagedError(f'its arrays are those of step {", ".join(map(str, own))}')
    return state, restored['data']

  def restore_step(self, step: int, abstract: TrainState) -> TrainState:
    """Returns the state of one step.

    Raises:
      DamagedError: if it is not there whole.
    """
    try:
      return self._restore(step, abstract)[0]
    except Exception as error:
      raise DamagedError(f'checkpoint {step} in {self._folder}: {_reason(error)}') from error

  def set_damaged_aside(self) -> list[str]:
    """Moves damaged checkpoints out of the way, so that their steps can be saved again."""
    moved = []
    for step in self.damaged:
      source = self._folder / str(step)
      target = self._folder.parent / f'damaged_checkpoint_{step}'
      number = 1
      while target.exists():
        target = self._folder.parent / f'damaged_checkpoint_{step}_{number}'
        number += 1
      if jax.process_index() == 0 and source.exists():
        os.rename(source, target)
        moved.append(str(target))
    if self.damaged and self._manager is not None:
      self._manager.close()
      self._manager = self._open()
    return moved

  def wait(self) -> None:
    """Waits until all saves are on disk, and raises their errors."""
    if self._manager:
      with self._writing():
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

  def close(self) -> None:
    """Waits and closes."""
    if self._manager:
      with self._writing():
        self._manager.close()


def saved_steps(workdir: str) -> list[int]:
  """Returns the steps of which a directory holds a checkpoint, complete but perhaps damaged."""
  folder = pathlib.Path(workdir) / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def saved_config(workdir: str) -> tuple[int, dict[str, Any]] | None:
  """Returns (step, config) of the newest checkpoint whose config can be read, None without one.

  Reads the JSON file itself: a checkpoint manager would wait for the other processes of a run.
  """
  folder = pathlib.Path(workdir) / FOLDER
  for step in reversed(saved_steps(workdir)):
    try:
      config = json.loads((folder / str(step) / 'config' / 'metadata').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
      continue
    if isinstance(config, dict) and all(isinstance(fields, dict) for fields in config.values()):
      return step, config
  return None


@jax.jit
def _bit_sums(state: Any) -> list[jax.Array]:
  def bit_sum(x):
    bits = jax.lax.bitcast_convert_type(x, {4: jnp.uint32, 2: jnp.uint16}[x.dtype.itemsize])
    # Weighted by index, so that swapped values are found, too; modulo 2**32.
    place = jnp.arange(1, bits.size + 1, dtype=jnp.uint32).reshape(bits.shape)
    return jnp.sum(bits.astype(jnp.uint32) * (place * 2 + 1), dtype=jnp.uint32)

  return [bit_sum(x) for x in jax.tree.leaves(state)]


def digest(state: Any) -> dict[str, list[int]]:
  """Returns one integer for each array; equal on every mesh."""
  return {'bit_sums': [int(x) for x in _bit_sums(state)]}


def _position_digest(data_position: dict[str, Any]) -> str:
  """Returns the SHA-256 of a position in the data as JSON, in which it is saved."""
  return hashlib.sha256(json.dumps(data_position, sort_keys=True).encode()).hexdigest()


# Messages of TensorStore, Orbax and Python on files, and their meaning.
_MEANINGS = (
  (r'NOT_FOUND|was not found|No such file', 'a file of it is missing'),
  (r'OUT_OF_RANGE', 'a file of it is cut short'),
  (r'DATA_LOSS|checksum', 'a file of it is damaged'),
)


def _reason(error: BaseException) -> str:
  """Returns why a checkpoint can't be restored: in plain words, then in the library's."""
  line = _first_line(error)
  meaning = next((words for pattern, words in _MEANINGS if re.search(pattern, line)), '')
  return f'{meaning} ({line.rstrip(".:;")})' if meaning else line


def _first_line(error: BaseException) -> str:
  """Returns the error, without the drivers TensorStore went through and its specification."""
  line = (str(error).strip().split('\n') or [''])[0].partition(' [')[0]
  line = re.sub(r'Error opening "\w+" driver: ', '', line)
  line = re.sub(r'<bound method.*?>>?', 'an array', line)
  line = re.sub(r' in OCDBT database at local file "[^"]*"', '', line).strip()
  return (line if len(line) <= 200 else f'{line[:200]}...') or type(error).__name__
