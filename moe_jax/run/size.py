"""Check that a config can fit the machine at all, from its values only and before it is built."""

import copy
import os

import jax
import ml_collections

from moe_jax.errors import UserError
from moe_jax.field_names import field_value, split_field
from moe_jax.schema import SCHEMA
from moe_jax.train import accounting

# Fields that make a model, or a batch, larger.
_MODEL_FIELDS = (
  'moe.num_experts',
  'moe.mlp_dim',
  'moe.num_shared_experts',
  'model.num_layers',
  'model.embed_dim',
  'model.mlp_dim',
  'model.num_heads',
  'model.head_dim',
)
_BATCH_FIELDS = ('data.batch_size', 'data.sequence_length', 'model.embed_dim')


def check_size(config: ml_collections.ConfigDict, vocab_size: int) -> None:
  """Refuses a config of which only the parameters, or one activation, exceed all memory.

  What passes may still be too large: optimizer, gradients and activations come on top.

  Args:
    config: validated.
    vocab_size: of the tokenizer.

  Raises:
    UserError: names the field that contributes most, beyond its default.
  """
  memory = _memory()

  def model_bytes(config):
    return 4 * accounting.parameter_counts(config, vocab_size)['total']

  def batch_bytes(config):
    microbatch = config.data.batch_size // config.train.accumulation_steps
    return 4 * microbatch * config.data.sequence_length * config.model.embed_dim

  for needed, what, fields in (
    (model_bytes, 'the parameters', _MODEL_FIELDS),
    (batch_bytes, 'the tokens of a batch, a vector each,', _BATCH_FIELDS),
  ):
    size = needed(config)
    if memory is None or size <= memory:
      continue
    smaller = {field: needed(_at_default(config, field)) for field in fields}
    largest = min(smaller, key=smaller.__getitem__)
    raise UserError(
      largest,
      field_value(config, largest),
      f'{what} would take {size / 2**30:,.0f} GiB, more than the {memory / 2**30:,.0f} GiB of '
      'memory here',
    )


def _at_default(config: ml_collections.ConfigDict, field: str) -> ml_collections.ConfigDict:
  section, name = split_field(field)
  changed = copy.deepcopy(config)
  # 0 stands for something else.
  changed[section][name] = min(config[section][name], SCHEMA[section][name].default or 64)
  changed.model.num_kv_heads = min(changed.model.num_kv_heads, changed.model.num_heads)
  return changed


def _memory() -> int | None:
  """Returns the bytes of memory of all devices of all processes; None if they do not say."""
  if jax.default_backend() == 'cpu':
    local = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  else:
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(one and 'bytes_limit' in one for one in stats):
      return None
    local = sum(one['bytes_limit'] for one in stats)
  return local * jax.process_count()
