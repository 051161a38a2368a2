"""Errors of devices in one line that says what to do: too little memory, a process that is gone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections

from moe_jax.errors import UserError, is_full
from moe_jax.field_names import field_value
from moe_jax.parallel import watch

_EXHAUSTED = 'RESOURCE_EXHAUSTED'
# 'Gloo AllGather failed: ... Connection reset by peer', only of CPUs.
_LOST = 'Gloo '
_SHOWN = 160


@contextlib.contextmanager
def explained(config: ml_collections.ConfigDict, together: int = 1) -> Iterator[None]:
  """Turns running out of memory within the block into an error that names the fields to change.

  Ends the process where another one of the run was killed, see `watch`.

  Args:
    config: that is trained or evaluated.
    together: runs in the program, if they are packed.

  Raises:
    UserError: instead of JAX's error, when memory is exhausted; every other error as it is.
  """
  with instead('data.batch_size', config.data.batch_size, _remedies(config, together)):
    yield


@contextlib.contextmanager
def instead(field: str, value: Any, remedies: str) -> Iterator[None]:
  """Turns running out of memory within the block into the error of a field; as in `explained`.

  Args:
    field: that is named.
    value: of it.
    remedies: for the message.

  Raises:
    UserError: instead of JAX's error, when memory is exhausted; every other error as it is.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if _LOST in str(error) and jax.process_count() > 1:
      watch.connection_lost(jax.process_count())
    if _EXHAUSTED not in str(error) or is_full(error):
      raise
    said = ' '.join(str(error).split())
    shown = said if len(said) <= _SHOWN else f'{said[:_SHOWN]}...'
    raise UserError(field, value, f'out of memory; {remedies}. JAX: {shown}') from error


def _remedies(config: ml_collections.ConfigDict, together: int) -> str:
  """Returns the fields that need less memory, with the values."""
  fields = ['data.sequence_length', 'model.embed_dim', 'model.num_layers']
  if config.moe.num_experts:
    fields += ['moe.num_experts', 'moe.mlp_dim']
  lower = ', '.join(f'{field}={field_value(config, field)}' for field in fields)
  remedies = [f'lower it, or {lower}']
  remedies.append(f'raise train.accumulation_steps={config.train.accumulation_steps}')
  if not config.model.remat:
    remedies.append('set model.remat=True')
  if together > 1:
    remedies.append(f'pack fewer than {together} (--pack)')
  return f'{"; ".join(remedies)}; in another --workdir, or the same run on a mesh of more devices'
