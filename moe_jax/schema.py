"""The schema of an experiment: every field with its default, its meaning and what it allows.

Every choice that implementations make silently is a field here. `moe_jax.config` makes configs of
it and checks them. Without JAX, so that a command can say what is wrong with its flags at once: a
test holds the choices equal to those of the rooms that implement them.
"""

import math
import pathlib
import pkgutil
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.errors import UserError, did_you_mean


class Field(NamedTuple):
  """One field: its default (whose type is the field's type), meaning, and what is allowed.

  `choices` are the values of a field of names, else ().
  """

  default: Any
  meaning: str
  allowed: str
  check: Callable[[Any], bool]
  choices: tuple[str, ...] = ()


def check_field(name: str, value: Any, field: Field) -> None:
  """Checks one value alone.

  Args:
    name: 'section.field', for the message.
    value: of that field.
    field: of the schema.

  Raises:
    UserError: if it is of the wrong type or out of bounds.
  """
  kind = type(field.default)
  # bool is an int in Python, and an int serves as a float; nothing else crosses types.
  right_type = type(value) is kind or (kind is float and type(value) is int)
  if not right_type:
    raise UserError(name, value, f'must be of type {kind.__name__}; {field.allowed}')
  if not field.check(value):
    near = did_you_mean(value, field.choices) if field.choices else ''
    raise UserError(name, value, f'{field.allowed}{near}')


def router_names() -> tuple[str, ...]:
  """Returns the names of all routers: those of the files in `routing/routers`."""
  folder = pathlib.Path(__file__).parent / 'routing' / 'routers'
  return tuple(sorted(module.name for module in pkgutil.iter_modules([str(folder)])))


def _one_of(default: str, choices: tuple[str, ...], meaning: str) -> Field:
  allowed = f'must be one of {", ".join(choices)}'
  return Field(default, meaning, allowed, lambda v: v in choices, choices)


def _at_least(default: int, low: int, meaning: str, high: int = 2**31 - 1) -> Field:
  return Field(default, meaning, f'must be an integer in {low}..{high}', lambda v: low <= v <= high)


def _as_float32(value: float) -> float:
  """Returns what a program makes of a number: inf beyond float32, 0 below its normal numbers."""
  try:
    rounded = struct.unpack('<f', struct.pack('<f', value))[0]
  except OverflowError:
    return math.copysign(math.inf, value)
  return 0.0 if abs(rounded) < 2.0**-126 else rounded


def _is_number(value: float) -> bool:
  """Whether a number is finite in float32, and 0 there only if it is 0."""
  return math.isfinite(_as_float32(value)) and (_as_float32(value) != 0 or value == 0)


def _number(
  default: float, meaning: str, allowed: str, check: Callable[[float], bool] = lambda v: True
) -> Field:
  """A number of the program, where it is a float32; `check` is told what it is there."""
  allowed = f'{allowed}, in float32'
  return Field(default, meaning, allowed, lambda v: _is_number(v) and check(_as_float32(v)))


def _non_negative(default: float, meaning: str) -> Field:
  return _number(default, meaning, 'must be a finite number >= 0', lambda v: v >= 0)


def _positive(default: float, meaning: str) -> Field:
  return _number(default, meaning, 'must be a finite number > 0', lambda v: v > 0)


def _share(default: float, meaning: str) -> Field:
  return _number(default, meaning, 'must be at least 0 and below 1', lambda v: 0 <= v < 1)


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
    'mlp_dim': _at_least(
      256, 1, 'Hidden units of a dense feed-forward layer; with moe.every=1 there is none.'
    ),
    'activation': _one_of('swiglu', ('swiglu', 'gelu'), 'Of dense layers and of experts.'),
    'rope_theta': _positive(10000.0, 'Base of the rotary position frequencies.'),
    'norm_epsilon': _positive(1e-5, 'Added to the mean square in RMSNorm.'),
    'tied_embeddings': _any(True, 'Output matrix = transposed input embedding.'),
    'remat': _any(
      False, 'Recompute blocks in the backward pass, all but what was exchanged between devices.'
    ),
    'compute_dtype': _one_of(
      'float32',
      ('float32', 'bfloat16'),
      'Of matrix products. Router, parameters, statistics and losses are always float32.',
    ),
  },
  'moe': {
    'num_experts': _at_least(
      8,
      0,
      'E; 0 makes a dense model and ignores the rest of moe, so that a config and its dense twin '
      'may differ in this field alone.',
    ),
    'num_selected_experts': _at_least(2, 1, 'K, experts each token selects.'),
    'mlp_dim': _at_least(256, 1, 'F, hidden units of one expert.'),
    'num_shared_experts': _at_least(0, 0, 'Experts every token passes, beside the routed ones.'),
    'every': _at_least(1, 1, 'A MoE layer in every n-th block; divides model.num_layers.'),
    'router': _one_of(
      'top_k',
      router_names(),
      'Way of choosing; python -m moe_jax.routers says what each is.',
    ),
    'score': _one_of(
      'softmax',
      ('softmax', 'sigmoid', 'sqrt_softplus'),
      'What gates are read from: top_k, loss_free, group_limited, quantile, null_experts.',
    ),
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
    'gate_scale': _positive(
      1.0, 'Multiplies the gates; not of dense, remoe, hash, kmeans, round_robin and random_choice.'
    ),
    'noise_scale': _positive(1.0, 'vmoe: the noise on the logits has deviation noise_scale / E.'),
    'noise_floor': _non_negative(
      0.0, 'noisy_top_k, hierarchical: added to the softplus of the noise.'
    ),
    'second_choice': _one_of(
      'random',
      ('random', 'threshold', 'all'),
      'gshard, training: the second choice asks for a slot with probability 2 g2, with '
      'min(1, g2 / 0.2), or always.',
    ),
    'bias_update': _one_of(
      'sign',
      ('sign', 'proportional', 'multiplicative', 'centred'),
      'loss_free, group_limited: how the selection bias follows the load.',
    ),
    'bias_rate': Field(
      0.001,
      'loss_free, group_limited, quantile: size of such a step.',
      'must be at least 1e-30 and at most 1000',
      lambda v: 1e-30 <= v <= 1000,
    ),
    'num_expert_groups': _at_least(
      1, 1, 'group_limited, hierarchical: equal groups of experts; divides num_experts.'
    ),
    'num_selected_groups': _at_least(1, 1, 'The same: groups a token may choose from.'),
    'assignment_tolerance': _positive(1e-4, 'sinkhorn: change at which the iteration ends.'),
    'evaluation': _one_of(
      'token_choice',
      ('token_choice', 'threshold', 'same'),
      'expert_choice, outside training: top-k of each token; experts whose score passes the '
      'running threshold; or as in training, which sees the future.',
    ),
    'threshold_decay': _share(0.99, 'expert_choice: decay of that running threshold.'),
    'hash_table': _one_of(
      'random', ('random', 'balanced'), 'hash: random table, or balanced by frequency of tokens.'
    ),
    'hash_seed': _at_least(0, 0, 'hash: of the random table.'),
    'kmeans_update': _one_of(
      'ema', ('ema', 'minibatch'), 'kmeans: moving average, or mini-batch k-means.'
    ),
    'kmeans_decay': _share(0.999, 'kmeans: decay of the moving average.'),
    'kmeans_temperature': _positive(1.0, 'kmeans: divides the similarities in the gates.'),
    'kmeans_reseed_after': _at_least(100, 1, 'kmeans: empty steps after which a centroid moves.'),
    'num_null_experts': _at_least(0, 0, 'null_experts: experts that compute nothing.', high=65_536),
    'null_balance_weight': _positive(
      1.0,
      'null_experts: what such an expert counts in their own loss (tau); at balance it gets '
      '1 / tau times the tokens of a real one.',
    ),
    'sparsity_factor': _number(
      1.2,
      'remoe: what the coefficient of sparsity is multiplied or divided by after each step.',
      'must be a finite number > 1',
      lambda v: v > 1,
    ),
    'sparsity_start': _positive(1e-8, 'remoe: that coefficient before the first step.'),
    'slots_per_expert': _at_least(1, 1, 'soft: slots of each expert.'),
    'jitter': _share(0.0, 'epsilon of the noise U(1-e, 1+e) on the router input, training only.'),
    'router_dtype': _one_of(
      'float32',
      ('float32', 'bfloat16'),
      "Of the factors of the router's product, which is summed in float32; bfloat16 is faster on "
      'GPUs and picks other experts here and there (evaluate --compare_router_dtype).',
    ),
    'router_init_scale': _positive(0.1, 'Variance of the router init is this / embed_dim.'),
    'capacity_factor': _positive(
      1.25, 'Slots per assignment in training: C = ceil(S K factor / E); E / K never drops.'
    ),
    'eval_capacity_factor': _positive(2.0, 'The same in evaluation. Decoding never drops.'),
    'priority': _one_of(
      'token',
      ('token', 'choice', 'priority', 'random'),
      'Who gets a slot: position order; all first choices first; largest router probability; '
      'random. Only token is causal.',
    ),
    'group_size': _at_least(1, 1, 'Sequences in a routing group, within which slots are shared.'),
    'balance_scope': _one_of(
      'global',
      ('global', 'device', 'group', 'sequence'),
      'Tokens that share one load-balancing loss, which is averaged over such sets: the whole '
      '(micro-)batch, each of balance_devices equal parts of it, each routing group, or each '
      'sequence (a row of the batch).',
    ),
    'balance_devices': _at_least(
      8, 1, 'Parts of the batch, for balance_scope=device; a number of the study, not of the mesh.'
    ),
    'load_balancing_weight': _non_negative(0.01, 'Of the load-balancing loss.'),
    'balance_normalization': _one_of(
      'one',
      ('one', 'k', 'gshard'),
      'Value of that loss at perfect balance: 1, K, or 1 / E^2 (gshard). Codebases differ.',
    ),
    'device_balance_weight': _non_negative(0.0, 'Of the same loss between parts of the experts.'),
    'device_balance_parts': _at_least(
      1, 1, 'Equal parts of consecutive experts for it; divides num_experts, whatever the mesh.'
    ),
    'router_z_weight': _non_negative(0.001, 'Of the router z-loss.'),
    'importance_weight': _non_negative(0.0, 'Of the importance loss, CV^2 (0 at balance).'),
    'entropy_weight': _number(
      0.0,
      'Of the mean entropy of the router probabilities: above 0 surer, below 0 undecided.',
      'must be a finite number',
    ),
    'router_loss_weight': _non_negative(0.0, 'Of the loss that the router itself defines, if any.'),
    'layer_reduction': _one_of(
      'mean', ('mean', 'sum'), 'How the auxiliary losses of the layers are put together.'
    ),
    'dispatch': _one_of(
      'gather',
      ('gather', 'dropless', 'einsum'),
      'How tokens move to slots; dropless drops none, so the capacity factors do not apply; einsum '
      'is the slow oracle.',
    ),
    'exchange': _one_of(
      'padded',
      ('padded', 'ragged'),
      'What crosses the expert axis: every slot (padded), or those that hold a token (ragged; on '
      'GPUs and TPUs alone). Changes no result.',
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
    'data_dir': Field(
      'runs/data', 'Where prepared data sets are kept.', 'must be a path', lambda v: bool(v)
    ),
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
    'num_steps': Field(
      1000, 'Optimizer steps.', 'must be an integer in 1..2**31-1', lambda v: 1 <= v < 2**31
    ),
    'init_from': _any(
      '',
      'DIR or DIR@STEP of a run whose parameters, and tokenizer, a new one starts from; no step is '
      'the newest.',
    ),
    'init_optimizer': _any(False, "The same with the state of that run's optimizer."),
    'init_router_state': _any(True, 'The same with what its routers carry from step to step.'),
    'seed': Field(
      0,
      'Of initialisation, data order, jitter and random drops.',
      'must be an integer in 0..2**31-1',
      lambda v: 0 <= v < 2**31,
    ),
    'accumulation_steps': _at_least(1, 1, 'Micro-batches in an optimizer step; divides the batch.'),
    'accumulation_scope': _one_of(
      'microbatch',
      ('microbatch', 'running', 'batch'),
      'Auxiliary losses of each micro-batch, averaged; the same with the loads of all '
      'micro-batches so far; or of the whole batch, exactly as without accumulation, at the price '
      'of one more forward pass.',
    ),
    'load_decay': _share(0.99, 'Per step, of the moving average of the load, for metrics alone.'),
    'log_every': _at_least(10, 1, 'Steps between lines of metrics.jsonl.'),
    'eval_every': _at_least(0, 0, 'Steps between evaluations on the validation split; 0 never.'),
    'eval_batches': _at_least(0, 0, 'Batches of such an evaluation; 0 is the whole split.'),
    'checkpoint_every': _at_least(200, 1, 'Steps between checkpoints; one is made at the end.'),
    'keep_checkpoints': _at_least(2, 1, 'Newest checkpoints that stay.'),
    'check_causal': _any(
      True, 'Check at the start that a router which says that it is causal is; takes a second.'
    ),
  },
}

# What may change when a run goes on: nothing of it changes a result.
FREE_FIELDS = (
  'moe.exchange',
  'mesh.data',
  'mesh.expert',
  'data.data_dir',
  'train.log_every',
  'train.checkpoint_every',
  'train.keep_checkpoints',
  'train.eval_every',
  'train.eval_batches',
  'train.check_causal',
)
# Fields that came when there were runs and results already: without them, their default held.
LATER_FIELDS = ('train.init_from', 'train.init_optimizer', 'train.init_router_state')
# The same, but trials since then have ids that count them, also at their default.
LATER_FIELDS_IN_IDS = ('moe.null_balance_weight', 'moe.router_dtype')
