"""Detection of trials that would train one and the same model under different configs."""

import copy
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from moe_jax import config as config_lib
from moe_jax import routing, unread
from moe_jax.schema import ROUTER_FIELDS, SCHEMA

# Fields of only metrics, and of only memory.
_NO_MODEL = ('train.load_decay', 'model.remat')


def same_model(config: ml_collections.ConfigDict, free: Sequence[str]) -> dict[str, Any]:
  """Returns the values that decide a trained model: two arms with equal values are one model.

  Numbers are what float32 holds, in which the step takes them. A field that stands for another, as
  model.head_dim=0, has its effective value, and so has one that is rounded to slots, scopes or
  steps. Fields that nothing reads are left out: of experts in a dense model, and of other routers.

  Args:
    config: validated.
    free: fields that change no result.
  """
  config = _spelled_out(config)
  with np.errstate(over='ignore', under='ignore'):
    fields = {
      f'{section}.{name}': float(np.float32(value)) if isinstance(value, float) else value
      for section, values in config.to_dict().items()
      for name, value in values.items()
      if f'{section}.{name}' not in free
    }
  inert = _unread(config) | {*_NO_MODEL}
  known = {name: value for name, value in fields.items() if name not in inert}
  return {**known, **_come_to(config, known)}


def differing(one: ml_collections.ConfigDict, other: ml_collections.ConfigDict) -> list[str]:
  """Returns the fields in which two configs differ."""
  sections = other.to_dict()
  return [
    f'{section}.{name}'
    for section, values in one.to_dict().items()
    for name, value in values.items()
    if sections[section][name] != value
  ]


def _spelled_out(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a copy in which no value stands for that of other fields."""
  result = copy.deepcopy(config)
  moe, train = result.moe, result.train
  result.model.head_dim = config_lib.head_dim(config)
  result.optim.adam_learning_rate = result.optim.adam_learning_rate or result.optim.learning_rate
  # Those that the loads of earlier micro-batches are part of.
  reads_loads = moe.load_balancing_weight or moe.device_balance_weight or moe.router_loss_weight
  if train.accumulation_scope == 'running' and not reads_loads:
    train.accumulation_scope = 'microbatch'
  return result


def _come_to(config: ml_collections.ConfigDict, known: dict[str, Any]) -> dict[str, Any]:
  """Returns the effective values of fields that are rounded, or that only change how to count."""
  moe, train = config.moe, config.train
  found: dict[str, Any] = {}
  if 'moe.capacity_factor' in known:
    found['moe.capacity_factor'] = f'{config_lib.training_capacity(config)} slots'
  if 'moe.balance_scope' in known:
    scopes = config_lib.balance_scopes(config, config.data.batch_size // train.accumulation_steps)
    found['moe.balance_scope'] = f'{scopes} in a micro-batch'
    found['moe.balance_devices'] = ''
    if moe.balance_scope != 'global' and 'train.accumulation_scope' in known:
      found['train.accumulation_scope'] = 'microbatch'
  if 'optim.decay_fraction' in known:
    found['optim.decay_fraction'] = f'{round(config.optim.decay_fraction * train.num_steps)} steps'
  return found


def _unread(config: ml_collections.ConfigDict) -> set[str]:
  """Returns the fields that nothing reads in a trial of a study."""
  moe = config.moe
  if not moe.num_experts:
    return {f'moe.{name}' for name in SCHEMA['moe']} | unread.unread(config).keys()
  router = routing.ROUTERS[moe.router]
  # Every evaluation of a study sets `eval_capacity_factor`.
  inert = {'eval_capacity_factor'} | ROUTER_FIELDS.keys() - {*router.reads}
  tokens = config.data.sequence_length * moe.group_size
  if not router.fills_slots and config_lib.training_capacity(config) == tokens:
    # Slots for all are no limit, here and in the evaluations.
    config = copy.deepcopy(config)
    config.moe.dispatch = 'dropless'
  return {f'moe.{name}' for name in inert} | unread.unread(config).keys()
