"""The schema of an experiment: every field with its default, its meaning and what it allows.

`get_config()` gives a ConfigDict with the defaults, a file in `configs/` changes some of them, and
`validate(config)` names the field, its value and what is allowed. `python -m moe_jax.config` prints
the schema. Every choice that peers make silently is a field here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections

from moe_jax.errors import UserError

# Two choices of the schema that other rooms implement; tests hold the lists equal.
PRIORITIES = ('token', 'choice', 'priority', 'random')
CAUSAL_PRIORITIES = ('token',)


class Field(NamedTuple):
  """One field: its default (whose type is the field's type), meaning, and what is allowed."""

  default: Any
  meaning: str
  allowed: str
  check: Callable[[Any], bool]


def _one_of(default: str, choices: tuple[str, ...], meaning: str) -> Field:
  return Field(default, meaning, f'must be one of {", ".join(choices)}', lambda v: v in choices)


def _at_least(default: int, low: int, meaning: str) -> Field:
  return Field(default, meaning, f'must be an integer >= {low}', lambda v: v >= low)


def _non_negative(default: float, meaning: str) -> Field:
  check = lambda v: math.isfinite(v) and v >= 0  # noqa: E731
  return Field(default, meaning, 'must be a finite number >= 0', check)


def _positive(default: float, meaning: str) -> Field:
  check = lambda v: math.isfinite(v) and v > 0  # noqa: E731
  return Field(default, meaning, 'must be a finite number > 0', check)


def _share(default: float, meaning: str) -> Field:
  return Field(default, meaning, 'must be at least 0 and below 1', lambda v: 0 <= v < 1)


def _held_out(default: float, meaning: str) -> Field:
  return Field(default, meaning, 'must be at least 0 and below 0.5', lambda v: 0 <= v < 0.5)


def _any(default: Any, meaning: str) -> Field:
  kind = {bool: 'true or false', str: 'text'}[type(default)]
  return Field(default, meaning, f'must be {kind}', lambda v: True)


SCHEMA: dict[str, dict[str, Field]] = {
  'model': {
    'family': _one_of('decoder', ('decoder',), 'Architecture; one file of moe_jax/models each.'),
    'num_layers': _at_least(2, 1, 'L, transformer blocks.'),
    'embed_dim': _at_least(128, 1, 'D, width of the residual stream.'),
    'num_heads': _at_least(4, 1, 'Query heads.'),
    'num_kv_heads': _at_least(4, 1, 'Key-value heads, shared by query heads; divides num_heads.'),
    'head_dim': _at_least(0, 0, 'Width of a head, even; 0 means embed_dim / num_heads.'),
    'mlp_dim': _at_least(256, 1, 'Hidden units of a dense feed-forward layer.'),
    'activation': _one_of('swiglu', ('swiglu', 'gelu'), 'Of dense layers and of experts.'),
    'rope_theta': _positive(10000.0, 'Base of the rotary position frequencies.'),
    'norm_epsilon': _positive(1e-5, 'Added to the mean square in RMSNorm.'),
    'tied_embeddings': _any(True, 'Output matrix = transposed input embedding.'),
    'remat': _any(False, 'Recompute blocks in the backward pass instead of storing them.'),
    'compute_dtype': _one_of(
      'float32',
      ('float32', 'bfloat16'),
      'Of matrix products. Router, parameters, statistics and losses are always float32.',
    ),
  },
  'moe': {
    'num_experts': _at_least(8, 0, 'E; 0 makes a dense model and ignores the rest of moe.'),
    'num_selected_experts': _at_least(2, 1, 'K, experts each token selects.'),
    'mlp_dim': _at_least(256, 1, 'F, hidden units of one expert.'),
    'num_shared_experts': _at_least(0, 0, 'Experts every token passes, beside the routed ones.'),
    'every': _at_least(1, 1, 'A MoE layer in every n-th block; divides model.num_layers.'),
    'router': _one_of('top_k', ('top_k',), 'Way of choosing; one file of moe_jax/routing each.'),
    'softmax_order': _one_of(
      'before',
      ('before', 'after'),
      'Gates from the softmax over all experts (before selection) or over the K selected (after).',
    ),
    'renormalize': _one_of(
      'before_drop',
      ('none', 'before_drop', 'after_drop'),
      'Divide the gates of a token by their sum: never, over the K selected, over those that kept '
      'it. With K = 1 only none, or the gate is always 1 and the router learns nothing.',
    ),
    'jitter': _share(0.0, 'epsilon of the noise U(1-e, 1+e) on the router input, training only.'),
    'router_init_scale': _positive(0.1, 'Variance of the router init is this / embed_dim.'),
    'capacity_factor': _positive(
      1.25, 'Slots per assignment in training: C = ceil(S K factor / E); E / K never drops.'
    ),
    'eval_capacity_factor': _positive(2.0, 'The same in evaluation. Decoding never drops.'),
    'priority': _one_of(
      'token',
      PRIORITIES,
      'Who gets a slot: position order; all first choices first; largest router probability; '
      'random. Only token is causal.',
    ),
    'group_size': _at_least(1, 1, 'Sequences in a routing group, within which slots are shared.'),
    'balance_scope': _one_of(
      'global',
      ('global', 'device', 'group'),
      'Where balance is asked for: the (micro-)batch, each of balance_devices equal parts of it, '
      'or each routing group.',
    ),
    'balance_devices': _at_least(
      8, 1, 'Parts of the batch when balance_scope=device; a number of the study, not of the mesh.'
    ),
    'load_balancing_weight': _non_negative(0.01, 'Of the load-balancing loss (1 at balance).'),
    'router_z_weight': _non_negative(0.001, 'Of the router z-loss.'),
    'importance_weight': _non_negative(0.0, 'Of the importance loss, CV^2 (0 at balance).'),
    'layer_reduction': _one_of(
      'mean', ('mean', 'sum'), 'How the auxiliary losses of the layers are put together.'
    ),
    'dispatch': _one_of(
      'gather', ('gather', 'einsum'), 'How tokens move to slots; einsum is the slow oracle.'
    ),
  },
  'mesh': {
    'data': _at_least(1, 1, 'Devices along the data axis: copies of each expert.'),
    'expert': _at_least(1, 1, 'Devices along the expert axis; divides num_experts.'),
    'model': Field(
      1, 'Tensor parallelism.', 'must be 1: tensor parallelism is not supported', lambda v: v == 1
    ),
  },
  'data': {
    'name': _any('tier1', 'tier1, tier2, tfds:NAME, or text:PATH (a folder of .txt or .jsonl).'),
    'data_dir': _any('runs/data', 'Where prepared data sets are kept.'),
    'tokenizer': _one_of('bytes', ('bytes', 'bpe'), 'Bytes, or byte-level BPE trained on train.'),
    'vocab_size': _at_least(0, 0, 'Of the BPE, at least 512; 0 for bytes.'),
    'sequence_length': _at_least(256, 2, 'T, tokens in a sequence.'),
    'batch_size': _at_least(32, 1, 'B, sequences in an optimizer step, over all devices.'),
    'valid_fraction': _held_out(
      0.05, 'Share held out for validation where the source has no split.'
    ),
    'test_fraction': _held_out(0.05, 'Share held out for test where the source has no split.'),
  },
  'optim': {
    'name': _one_of('adamw', ('adamw', 'adafactor', 'muon', 'sgd'), 'Optimizer.'),
    'learning_rate': _positive(1e-3, 'Peak of the schedule.'),
    'schedule': _one_of(
      'cosine',
      ('cosine', 'linear', 'wsd', 'constant'),
      'After the warm-up; wsd stays at the peak and decays over the last decay_fraction.',
    ),
    'warmup_steps': _at_least(100, 0, 'Linear warm-up from 0.'),
    'decay_fraction': _share(0.2, 'Of num_steps; the decay of wsd.'),
    'final_fraction': _share(0.1, 'Learning rate at the end, as a share of the peak.'),
    'weight_decay': _non_negative(0.1, 'Decoupled, on matrices only (not norms, not embedding).'),
    'b1': _share(0.9, 'First-moment decay of adamw and of the AdamW part of muon.'),
    'b2': _share(0.95, 'Second-moment decay of the same.'),
    'epsilon': _positive(1e-8, 'Of adamw and muon.'),
    'momentum': _share(0.95, 'Of sgd (0 is plain) and of muon.'),
    'adam_learning_rate': _non_negative(
      0.0, 'Of what muon leaves to AdamW (embedding, norms); 0 means learning_rate.'
    ),
    'clip_norm': _non_negative(1.0, 'Global gradient norm above which gradients shrink; 0 never.'),
  },
  'train': {
    'num_steps': _at_least(1000, 1, 'Optimizer steps.'),
    'seed': Field(
      0,
      'Of initialisation, data order, jitter and random drops.',
      'must be an integer in 0..2**31-1',
      lambda v: 0 <= v < 2**31,
    ),
    'accumulation_steps': _at_least(1, 1, 'Micro-batches in an optimizer step; divides the batch.'),
    'accumulation_scope': _one_of(
      'microbatch',
      ('microbatch', 'batch'),
      'Auxiliary losses of each micro-batch, averaged; or of the whole batch, exactly as without '
      'accumulation, at the price of one more forward pass.',
    ),
    'log_every': _at_least(10, 1, 'Steps between lines of metrics.jsonl.'),
    'eval_every': _at_least(0, 0, 'Steps between evaluations on the validation split; 0 never.'),
    'eval_batches': _at_least(0, 0, 'Batches of such an evaluation; 0 is the whole split.'),
    'checkpoint_every': _at_least(200, 1, 'Steps between checkpoints; one is made at the end.'),
    'keep_checkpoints': _at_least(2, 1, 'Newest checkpoints that stay.'),
  },
}


def get_config() -> ml_collections.ConfigDict:
  """Returns a new config with every field at its default."""
  return ml_collections.ConfigDict(
    {
      room: {name: field.default for name, field in fields.items()}
      for room, fields in SCHEMA.items()
    },
    type_safe=True,
  )


def validate(config: ml_collections.ConfigDict) -> None:
  """Checks every field alone, then those that depend on each other.

  Raises:
    UserError: for the first field that is unknown, missing, of the wrong type or out of bounds.
  """
  for room in config:
    if room not in SCHEMA:
      raise UserError(f'config.{room}', '...', f'unknown; must be one of {", ".join(SCHEMA)}')
    for name in config[room]:
      if name not in SCHEMA[room]:
        raise UserError(
          f'{room}.{name}', config[room][name], f'unknown; must be one of {", ".join(SCHEMA[room])}'
        )
  for room, fields in SCHEMA.items():
    for name, field in fields.items():
      if room not in config or name not in config[room]:
        raise UserError(f'{room}.{name}', None, f'missing; {field.allowed}')
      _check_field(f'{room}.{name}', config[room][name], field)
  _check_model(config)
  if config.moe.num_experts:
    _check_moe(config)
  _check_batch(config)


def _check_field(name: str, value: Any, field: Field) -> None:
  kind = type(field.default)
  # bool is an int in Python, and an int serves as a float; nothing else crosses types.
  right_type = type(value) is kind or (kind is float and type(value) is int)
  if not right_type:
    raise UserError(name, value, f'must be of type {kind.__name__}; {field.allowed}')
  if not field.check(value):
    raise UserError(name, value, field.allowed)


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
  moe, mesh = config.moe, config.mesh
  if moe.num_selected_experts > moe.num_experts:
    raise UserError(
      'moe.num_selected_experts', moe.num_selected_experts, f'must be <= {moe.num_experts} experts'
    )
  if moe.num_selected_experts == 1 and (moe.renormalize != 'none' or moe.softmax_order == 'after'):
    field = 'moe.renormalize' if moe.renormalize != 'none' else 'moe.softmax_order'
    value = config.moe[field.split('.')[1]]
    raise UserError(
      field,
      value,
      'with num_selected_experts=1 the gate would always be 1 and the router would learn nothing '
      'from the task; use renormalize=none and softmax_order=before',
    )
  if config.model.num_layers % moe.every:
    raise UserError('moe.every', moe.every, f'must divide {config.model.num_layers} layers')
  if moe.num_experts % mesh.expert:
    raise UserError('mesh.expert', mesh.expert, f'must divide {moe.num_experts} experts')


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
  if moe.balance_scope == 'device':
    parts = train.accumulation_steps if train.accumulation_scope == 'batch' else 1
    return moe.balance_devices // parts
  return 1


def is_causal(config: ml_collections.ConfigDict) -> bool:
  """Whether no token's result can depend on later tokens of its own sequence."""
  return config.moe.num_experts == 0 or config.moe.priority in CAUSAL_PRIORITIES


def main() -> None:
  """Prints every field with its default, meaning and bounds."""
  for room, fields in SCHEMA.items():
    for name, field in fields.items():
      print(f'{room}.{name} = {field.default!r}\n    {field.meaning}\n    {field.allowed}')


if __name__ == '__main__':
  main()
