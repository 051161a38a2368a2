"""Fields of a config that nothing reads, given its other fields.

Two arms that differ only in such a field are one and the same model under two names. So a new run
that changes one is refused. Runs that began earlier continue, and all trained runs can be read.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections

from moe_jax import config as config_lib
from moe_jax import routing
from moe_jax.data.sources import TIERS
from moe_jax.errors import UserError
from moe_jax.field_names import field_value
from moe_jax.schema import SCHEMA

# Of those that not all read: which each optimizer reads, and each schedule.
OPTIMIZER_READS = {
  'adamw': ('b1', 'b2', 'epsilon'),
  'adafactor': (),
  'muon': ('b1', 'b2', 'epsilon', 'momentum', 'adam_learning_rate'),
  'sgd': ('momentum',),
}
SCHEDULE_READS = {
  'cosine': ('final_fraction',),
  'linear': ('final_fraction',),
  'wsd': ('final_fraction', 'decay_fraction'),
  'constant': (),
}
# Fields that a loss of weight 0 leaves unread: the model that is trained does not depend on it.
WEIGHTED = {
  'load_balancing_weight': 'balance_normalization',
  'device_balance_weight': 'device_balance_parts',
}
# The losses that are formed in scopes; a router's own may be.
SCOPED = (
  'load_balancing_weight',
  'device_balance_weight',
  'importance_weight',
  'router_loss_weight',
)
# Fields that a config file may state in case another of its fields is changed: a preset its
# capacity though one may choose `dropless`, a study its balance_devices for the arm that balances
# over them.
STATED = (
  'data.test_fraction',
  'data.valid_fraction',
  'model.mlp_dim',
  'moe.balance_devices',
  'moe.balance_normalization',
  'moe.balance_scope',
  'moe.capacity_factor',
  'moe.device_balance_parts',
  'moe.eval_capacity_factor',
  'moe.group_size',
  'moe.layer_reduction',
  'moe.priority',
  'train.accumulation_scope',
)
_DENSE = 'moe.num_experts=0'


def unread(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns {field: why} of the fields that decide nothing, as 'moe.num_experts=0'.

  Fields that change no result anyway are not among them, as `train.eval_batches` without
  evaluation, nor what a router does not read, which `moe_jax.config.validate` refuses by the
  router's own list.

  Args:
    config: validated.
  """
  optim, train, moe = config.optim, config.train, config.moe
  found = {}
  for table, choice in ((OPTIMIZER_READS, 'name'), (SCHEDULE_READS, 'schedule')):
    for field in {field for reads in table.values() for field in reads}:
      if field not in table[optim[choice]]:
        found[f'optim.{field}'] = f'optim.{choice}={optim[choice]}'
  if config.data.name in TIERS:
    why = f'data.name={config.data.name}'
    found |= {'data.valid_fraction': why, 'data.test_fraction': why}
  if not moe.num_experts:
    found |= {f'moe.{field}': _DENSE for field in SCHEMA['moe'] if field != 'num_experts'}
    return found | {'train.load_decay': _DENSE, 'train.accumulation_scope': _DENSE}
  if moe.every == 1:
    found['model.mlp_dim'] = 'moe.every=1'
  if train.accumulation_steps == 1:
    found['train.accumulation_scope'] = 'train.accumulation_steps=1'
  elif moe.balance_scope in ('group', 'sequence'):
    found['train.accumulation_scope'] = f'moe.balance_scope={moe.balance_scope}'
  if config.model.num_layers == moe.every:
    found['moe.layer_reduction'] = f'moe.every={moe.every}, the one layer of experts'
  for weight, field in WEIGHTED.items():
    if not moe[weight]:
      found[f'moe.{field}'] = f'moe.{weight}=0'
  if not any(moe[weight] for weight in SCOPED):
    why = ', '.join(f'moe.{weight}=0' for weight in SCOPED)
    found['moe.balance_scope'] = why
    found.setdefault('train.accumulation_scope', why)
  if moe.balance_scope != 'device':
    found['moe.balance_devices'] = f'moe.balance_scope={moe.balance_scope}'
  return found | _unread_by_layer(config)


def _unread_by_layer(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the fields that the layer reads for its router but that this router leaves unread."""
  moe = config.moe
  router = routing.ROUTERS[moe.router]
  setting = f'moe.router={router.name}'
  found: dict[str, str] = {}
  if router.keeps_all or not config_lib.limits_slots(moe):
    why = setting if router.keeps_all else f'moe.dispatch={moe.dispatch}'
    found |= dict.fromkeys(('moe.capacity_factor', 'moe.eval_capacity_factor', 'moe.priority'), why)
    # Noise is drawn by group, too.
    by_scope = moe.balance_scope == 'group' and any(moe[weight] for weight in SCOPED)
    noisy = moe.jitter and router.reads_tokens
    if not (router.by_group or noisy or by_scope):
      found['moe.group_size'] = f'{why}, {setting}' if why != setting else why
  if not router.reads_tokens:
    found['moe.jitter'] = setting
  weights = router.params(config_lib.router_options(config), config.model.embed_dim)
  if not any(weight.init == 'scaled' for weight in weights.values()):
    found['moe.router_init_scale'] = setting
  return found


def check_unread(config: ml_collections.ConfigDict, unchanged: Mapping[str, Any]) -> None:
  """Refuses a change without effect.

  Args:
    config: validated.
    unchanged: of the fields that are checked, the values that they have without a change: for a
      study those of its base, and for a config file `defaults`.

  Raises:
    UserError: for a field that is changed and that nothing reads.
  """
  for field, why in unread(config).items():
    value = field_value(config, field)
    if value != unchanged.get(field, value):
      raise UserError(field, value, f'must be {unchanged[field]}: nothing reads it with {why}')


def defaults(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that a config file may not change without effect, with their defaults.

  A dense model may state anything of `moe`, or a config and its dense twin would differ in more
  than `moe.num_experts`; any model may state what is in `STATED`.
  """
  return {
    field: field_value(SCHEMA, field).default
    for field, why in unread(config).items()
    if field not in STATED and why != _DENSE
  }


def check_decay(config: ml_collections.ConfigDict) -> None:
  """Refuses a schedule of a new run that does not end at `optim.final_fraction`.

  Raises:
    UserError: if the decay of `wsd` is shorter than a step, or begins before the warm-up ends.
  """
  optim, steps = config.optim, config.train.num_steps
  if optim.schedule != 'wsd':
    return  # The others decay over all steps after the warm-up, of which there is at least one.
  decay = round(optim.decay_fraction * steps)
  if not decay:
    raise UserError(
      'optim.decay_fraction',
      optim.decay_fraction,
      f'is less than one of train.num_steps={steps}; without a decay take optim.schedule=constant',
    )
  if decay > steps - optim.warmup_steps:
    raise UserError(
      'optim.decay_fraction',
      optim.decay_fraction,
      f'a decay of {decay} of train.num_steps={steps} would begin within '
      f'optim.warmup_steps={optim.warmup_steps}, and not reach optim.final_fraction',
    )
