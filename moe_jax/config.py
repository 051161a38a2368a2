"""Fields of an experiment, with defaults and checks: python -m moe_jax.config.

`get_config()` gives a ConfigDict with the defaults, a file in `configs/` changes some of them, and
`validate(config)` names the field, its value and what is allowed. `moe_jax.schema` defines them.

Examples:
  python -m moe_jax.config
  python -m moe_jax.config --json
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import ml_collections

from moe_jax.errors import UserError, did_you_mean
from moe_jax.fields import check_field
from moe_jax.schema import ROUTER_FIELDS, SCHEMA

# The routing package imports JAX, which takes seconds: only where a whole config is checked, so
# that single fields are listed and checked at once.
if TYPE_CHECKING:
  import moe_jax.routing


def get_config() -> ml_collections.ConfigDict:
  """Returns a new config with every field at its default."""
  return ml_collections.ConfigDict(
    {
      section: {name: field.default for name, field in fields.items()}
      for section, fields in SCHEMA.items()
    },
    type_safe=True,
  )


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks each field by itself, then those that depend on each other.

  Raises:
    UserError: for the first field that is unknown, missing, of the wrong type or out of bounds.
  """
  for section in config:
    if section not in SCHEMA:
      raise UserError(f'config.{section}', '...', f'unknown{_instead(section, SCHEMA)}')
    for name in config[section]:
      if name not in SCHEMA[section]:
        raise UserError(
          f'{section}.{name}', config[section][name], f'unknown{_instead(name, SCHEMA[section])}'
        )
  for section, fields in SCHEMA.items():
    for name, field in fields.items():
      if section not in config or name not in config[section]:
        raise UserError(f'{section}.{name}', None, f'missing; {field.allowed}')
      check_field(f'{section}.{name}', config[section][name], field)
  _check_model(config)
  if config.moe.num_experts:
    _check_moe(config)
  _check_batch(config)
  _check_start(config)


def _check_start(config: ml_collections.ConfigDict) -> None:
  """Rejects options of a starting checkpoint where none is named."""
  for name in ('init_optimizer', 'init_router_state'):
    default = SCHEMA['train'][name].default
    if not config.train.init_from and config.train[name] != default:
      raise UserError(
        f'train.{name}', config.train[name], f'must be {default} without train.init_from'
      )


def _instead(name: str, known: Iterable[str]) -> str:
  return did_you_mean(name, known) or f'; must be one of {", ".join(known)}'


def _check_model(config: ml_collections.ConfigDict) -> None:
  model, data, optim = config.model, config.data, config.optim
  if model.num_heads % model.num_kv_heads:
    raise UserError(
      'model.num_kv_heads', model.num_kv_heads, f'must divide {model.num_heads} heads'
    )
  if not model.head_dim and model.embed_dim % model.num_heads:
    raise UserError(
      'model.embed_dim', model.embed_dim, f'must be divisible by {model.num_heads} heads'
    )
  if head_dim(config) % 2:
    raise UserError('model.head_dim', head_dim(config), 'must be even')
  if data.tokenizer == 'bytes' and data.vocab_size:
    raise UserError('data.vocab_size', data.vocab_size, 'must be 0 with data.tokenizer=bytes')
  if data.tokenizer == 'bpe' and data.vocab_size < 512:
    raise UserError('data.vocab_size', data.vocab_size, 'must be >= 512 with data.tokenizer=bpe')
  if optim.schedule != 'constant' and optim.warmup_steps >= config.train.num_steps:
    raise UserError(
      'optim.warmup_steps', optim.warmup_steps, f'must be below {config.train.num_steps} steps'
    )


def _check_moe(config: ml_collections.ConfigDict) -> None:
  from moe_jax import routing

  moe, mesh = config.moe, config.mesh
  if moe.num_selected_experts > moe.num_experts:
    raise UserError(
      'moe.num_selected_experts', moe.num_selected_experts, f'must be <= {moe.num_experts} experts'
    )
  router = routing.ROUTERS[moe.router]
  if router.rejected:
    raise UserError('moe.router', moe.router, f'not in a causal language model: {router.rejected}')
  wrong = router.allowed(router_options(config))
  if wrong:
    field, allowed = wrong
    raise UserError(f'moe.{field}', moe[field], f'{allowed} (moe.router={moe.router})')
  _check_unread(config)
  if moe.router_loss_weight and router.loss is None:
    raise UserError(
      'moe.router_loss_weight', moe.router_loss_weight, f'must be 0: {moe.router} has no own loss'
    )
  if config.model.num_layers % moe.every:
    raise UserError('moe.every', moe.every, f'must divide {config.model.num_layers} layers')
  if moe.num_experts % moe.device_balance_parts:
    raise UserError(
      'moe.device_balance_parts',
      moe.device_balance_parts,
      f'must divide {moe.num_experts} experts',
    )
  if moe.num_experts % mesh.expert:
    raise UserError('mesh.expert', mesh.expert, f'must divide {moe.num_experts} experts')


def _check_unread(config: ml_collections.ConfigDict) -> None:
  """Rejects a choice that the router never reads: two configs would name one and the same model."""
  from moe_jax import routing

  router = routing.ROUTERS[config.moe.router]
  for name, field in ROUTER_FIELDS.items():
    if name in router.reads:
      continue
    inert = [field.default, *filter(None, [router.always.get(name)])]
    if config.moe[name] not in inert:
      allowed = ' or '.join(map(str, inert))
      raise UserError(
        f'moe.{name}',
        config.moe[name],
        f'must be {allowed}: moe.router={router.name} has no use for it',
      )


def _check_batch(config: ml_collections.ConfigDict) -> None:
  data, train, moe, mesh = config.data, config.train, config.moe, config.mesh
  if data.batch_size % train.accumulation_steps:
    raise UserError(
      'train.accumulation_steps',
      train.accumulation_steps,
      f'must divide the batch of {data.batch_size} sequences',
    )
  microbatch = data.batch_size // train.accumulation_steps
  devices = mesh.data * mesh.expert
  group_size = moe.group_size if moe.num_experts else 1
  if microbatch % (devices * group_size):
    raise UserError(
      'data.batch_size',
      data.batch_size,
      f'{train.accumulation_steps} micro-batches of {microbatch} must be divisible by {devices} '
      f'devices x {group_size} sequences in a routing group (moe.group_size)',
    )
  if train.accumulation_scope == 'running' and moe.num_experts and moe.balance_scope != 'global':
    raise UserError(
      'train.accumulation_scope',
      train.accumulation_scope,
      f'must be microbatch or batch with moe.balance_scope={moe.balance_scope}, whose scopes each '
      'lie in one micro-batch',
    )
  if moe.num_experts and moe.balance_scope == 'device':
    whole = train.accumulation_scope == 'batch'
    num_groups = (data.batch_size if whole else microbatch) // group_size
    if num_groups % moe.balance_devices:
      raise UserError(
        'moe.balance_devices', moe.balance_devices, f'must divide {num_groups} routing groups'
      )
    if whole and moe.balance_devices % train.accumulation_steps:
      raise UserError(
        'moe.balance_devices',
        moe.balance_devices,
        f'must be divisible by {train.accumulation_steps} micro-batches with '
        'train.accumulation_scope=batch',
      )


def head_dim(config: ml_collections.ConfigDict) -> int:
  """Returns the width of an attention head."""
  return config.model.head_dim or config.model.embed_dim // config.model.num_heads


def balance_scopes(config: ml_collections.ConfigDict, microbatch: int) -> int:
  """Returns the number of scopes of the load-balancing loss in a micro-batch of sequences."""
  moe, train = config.moe, config.train
  if moe.balance_scope == 'group':
    return microbatch // moe.group_size
  if moe.balance_scope == 'sequence':
    return microbatch
  if moe.balance_scope == 'device':
    parts = train.accumulation_steps if train.accumulation_scope == 'batch' else 1
    return moe.balance_devices // parts
  return 1


def router_options(config: ml_collections.ConfigDict) -> 'moe_jax.routing.RouterOptions':
  """Returns the router's hyperparameters as in training; the layer fills in the capacity."""
  from moe_jax import routing

  options = routing.ROUTERS[config.moe.router].options
  names = [field.name for field in dataclasses.fields(options)]
  return options(**{name: config.moe[name] for name in names if name in config.moe})


def limits_slots(moe: ml_collections.ConfigDict) -> bool:
  """True if an expert may have fewer slots than requests; `dropless` gives it all it needs.

  A router that fills slots needs their number all the same, and loses none of what it chooses.
  """
  from moe_jax import routing

  return moe.dispatch != 'dropless' or routing.ROUTERS[moe.router].fills_slots


def training_capacity(config: ml_collections.ConfigDict) -> int:
  """Returns the slots of an expert in a routing group: its S tokens where none can be dropped."""
  from moe_jax import routing
  from moe_jax.routing.sizes import group_sizes

  moe = config.moe
  sizes = group_sizes(
    routing.ROUTERS[moe.router],
    config.data.sequence_length * moe.group_size,
    num_experts=moe.num_experts,
    num_selected_experts=moe.num_selected_experts,
    capacity_factor=moe.capacity_factor if limits_slots(moe) else None,
  )
  return sizes.capacity


def why_not_causal(config: ml_collections.ConfigDict) -> str | None:
  """Returns the field by which a token's result can depend on later tokens, None if none does."""
  if not config.moe.num_experts:
    return None
  from moe_jax import routing
  from moe_jax.routing.plan import CAUSAL_PRIORITIES

  if not routing.ROUTERS[config.moe.router].causal:
    return f'moe.router={config.moe.router}'
  if config.moe.priority not in CAUSAL_PRIORITIES and limits_slots(config.moe):
    return f'moe.priority={config.moe.priority}'
  return None


def is_causal(config: ml_collections.ConfigDict) -> bool:
  """True if, in training, no token's result can depend on later tokens of its own sequence."""
  return why_not_causal(config) is None


def fields() -> dict[str, dict[str, Any]]:
  """Returns {field: {default, meaning, allowed}} of every field."""
  return {
    f'{section}.{name}': {
      'default': field.default,
      'meaning': field.meaning,
      'allowed': field.allowed,
    }
    for section, declared in SCHEMA.items()
    for name, field in declared.items()
  }


def as_text() -> str:
  """Returns every field with its default, meaning and bounds."""
  return '\n'.join(
    f'{name} = {field["default"]!r}\n    {field["meaning"]}\n    {field["allowed"]}'
    for name, field in fields().items()
  )


if __name__ == '__main__':
  from moe_jax import cli

  _JSON = cli.define_json_flag()
  cli.run(lambda: cli.print_json(fields()) if _JSON.value else cli.show(as_text()))
