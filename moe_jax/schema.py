"""The schema of an experiment: every field with its default, its meaning and its allowed values.

Every choice that implementations make silently is a field here. `moe_jax.config` makes configs of
it and checks them. Routers declare their own fields, see `moe_jax.router_options`. Without JAX, so
that a command reports wrong flags at once: a test holds the choices equal to those of the packages
that implement them.
"""

from moe_jax import router_options
from moe_jax.fields import (
  Field,
  anything,
  at_least,
  held_out,
  non_negative,
  number,
  one_of,
  positive,
  share,
)

# Families of models, those of `moe_jax.models.build`.
FAMILIES = ('decoder',)

# Hyperparameters that router files declare, as fields of `moe`.
ROUTER_FIELDS = router_options.declared()

SCHEMA: dict[str, dict[str, Field]] = {
  'model': {
    'family': one_of('decoder', FAMILIES, 'Architecture; one file of moe_jax/models each.'),
    'num_layers': at_least(2, 1, 'L, transformer blocks.'),
    'embed_dim': at_least(128, 1, 'D, width of the residual stream.'),
    'num_heads': at_least(4, 1, 'Query heads.'),
    'num_kv_heads': at_least(4, 1, 'Key-value heads, shared by query heads; divides num_heads.'),
    'head_dim': at_least(0, 0, 'Width of a head, even; 0 means embed_dim / num_heads.'),
    'mlp_dim': at_least(
      256, 1, 'Hidden units of a dense feed-forward layer; with moe.every=1 there is none.'
    ),
    'activation': one_of(
      'swiglu',
      ('swiglu', 'geglu', 'gelu', 'gelu_exact', 'relu'),
      'Of dense layers and of experts; gelu and geglu with the tanh, gelu_exact with erf.',
    ),
    'rope_theta': positive(10000.0, 'Base of the rotary position frequencies.'),
    'norm_epsilon': positive(1e-5, 'Added to the mean square in RMSNorm.'),
    'tied_embeddings': anything(True, 'Output matrix = transposed input embedding.'),
    'remat': anything(
      False, 'Recompute blocks in the backward pass, all but what was exchanged between devices.'
    ),
    'compute_dtype': one_of(
      'float32',
      ('float32', 'bfloat16'),
      'Of matmuls. Router, parameters, statistics and losses are always float32.',
    ),
  },
  'moe': {
    'num_experts': at_least(
      8,
      0,
      'E; 0 makes a dense model and ignores the rest of moe, so that a config and its dense twin '
      'may differ only in this field.',
      high=2**30,
    ),
    'num_selected_experts': at_least(2, 1, 'K, experts each token selects.'),
    'mlp_dim': at_least(256, 1, 'F, hidden units of one expert.'),
    'num_shared_experts': at_least(0, 0, 'Experts every token passes, besides the routed ones.'),
    'every': at_least(1, 1, 'A MoE layer in every n-th block; divides model.num_layers.'),
    'router': one_of(
      'top_k',
      router_options.router_names(),
      'The router; python -m moe_jax.routers describes each.',
    ),
    'renormalize': one_of(
      'before_drop',
      ('none', 'before_drop', 'after_drop'),
      'Divide the gates of a token by their sum: never, over the K selected, over those that kept '
      'it. With K = 1 only none, or the gate is always 1 and the router learns nothing.',
    ),
    **ROUTER_FIELDS,
    'jitter': share(0.0, 'epsilon of the noise U(1-e, 1+e) on the router input, training only.'),
    'router_init_scale': positive(0.1, 'Variance of the router init is this / embed_dim.'),
    'capacity_factor': positive(
      1.25, 'Slots per assignment in training: C = ceil(S K factor / E); E / K never drops.'
    ),
    'eval_capacity_factor': positive(2.0, 'The same in evaluation. Decoding never drops.'),
    'priority': one_of(
      'token',
      ('token', 'choice', 'priority', 'random'),
      'Who gets a slot: position order; all first choices first; largest router probability; '
      'random. Only token is causal.',
    ),
    'group_size': at_least(1, 1, 'Sequences in a routing group, within which slots are shared.'),
    'balance_scope': one_of(
      'global',
      ('global', 'device', 'group', 'sequence'),
      'Tokens that share one load-balancing loss, which is averaged over such sets: the whole '
      '(micro-)batch, each of balance_devices equal parts of it, each routing group, or each '
      'sequence (a row of the batch).',
    ),
    'balance_devices': at_least(
      8, 1, 'Parts of the batch, for balance_scope=device; a number of the study, not of the mesh.'
    ),
    'load_balancing_weight': non_negative(0.01, 'Of the load-balancing loss.'),
    'balance_normalization': one_of(
      'one',
      ('one', 'k', 'gshard'),
      'Value of that loss at perfect balance: 1, K, or 1 / E^2 (gshard). Codebases differ.',
    ),
    'device_balance_weight': non_negative(0.0, 'Of the same loss between parts of the experts.'),
    'device_balance_parts': at_least(
      1, 1, 'Equal parts of consecutive experts for it; divides num_experts, whatever the mesh.'
    ),
    'router_z_weight': non_negative(0.001, 'Of the router z-loss.'),
    'importance_weight': non_negative(0.0, 'Of the importance loss, CV^2 (0 at balance).'),
    'entropy_weight': number(
      0.0,
      'Of the mean entropy of the router probabilities: above 0 surer, below 0 undecided.',
      'must be a finite number',
    ),
    'router_loss_weight': non_negative(0.0, 'Of the loss that the router itself defines, if any.'),
    'layer_reduction': one_of(
      'mean', ('mean', 'sum'), 'How the auxiliary losses of the layers are put together.'
    ),
    'dispatch': one_of(
      'gather',
      ('gather', 'dropless', 'einsum'),
      'How tokens move to slots; dropless drops none, so the capacity factors do not apply; einsum '
      'is the slow oracle.',
    ),
    'exchange': one_of(
      'padded',
      ('padded', 'ragged'),
      'What crosses the expert axis: every slot (padded), or those that hold a token (ragged; '
      'only on GPUs and TPUs). Changes no result.',
    ),
  },
  'mesh': {
    'data': at_least(1, 1, 'Devices along the data axis: copies of each expert.'),
    'expert': at_least(1, 1, 'Devices along the expert axis; divides num_experts.'),
    'model': Field(
      1, 'Tensor parallelism.', 'must be 1: tensor parallelism is not supported', lambda v: v == 1
    ),
  },
  'data': {
    'name': anything(
      'tier1', 'tier1, tier2, tfds:NAME, or text:PATH (a folder of .txt or .jsonl).'
    ),
    'data_dir': Field(
      'runs/data', 'Where prepared data sets are kept.', 'must be a path', lambda v: bool(v)
    ),
    'tokenizer': one_of('bytes', ('bytes', 'bpe'), 'Bytes, or byte-level BPE trained on train.'),
    'vocab_size': at_least(0, 0, 'Of the BPE, at least 512; 0 for bytes.'),
    'sequence_length': at_least(256, 2, 'T, tokens in a sequence.'),
    'batch_size': at_least(32, 1, 'B, sequences in an optimizer step, over all devices.'),
    'valid_fraction': held_out(
      0.05, 'Share held out for validation where the source has no split.'
    ),
    'test_fraction': held_out(0.05, 'Share held out for test where the source has no split.'),
  },
  'optim': {
    'name': one_of('adamw', ('adamw', 'adafactor', 'muon', 'sgd'), 'Optimizer.'),
    'learning_rate': positive(1e-3, 'Peak of the schedule.'),
    'schedule': one_of(
      'cosine',
      ('cosine', 'linear', 'wsd', 'constant'),
      'After the warm-up; wsd stays at the peak and decays over the last decay_fraction.',
    ),
    'warmup_steps': at_least(100, 0, 'Linear warm-up from 0.'),
    'decay_fraction': share(0.2, 'Of num_steps; the decay of wsd.'),
    'final_fraction': share(0.1, 'Learning rate at the end, as a share of the peak.'),
    'weight_decay': non_negative(0.1, 'Decoupled, on matrices only (not norms, not embedding).'),
    'b1': share(0.9, 'First-moment decay of adamw and of the AdamW part of muon.'),
    'b2': share(0.95, 'Second-moment decay of the same.'),
    'epsilon': positive(1e-8, 'Of adamw and muon.'),
    'momentum': share(0.95, 'Of sgd (0 is plain) and of muon.'),
    'adam_learning_rate': non_negative(
      0.0, 'Of what muon leaves to AdamW (embedding, norms); 0 means learning_rate.'
    ),
    'clip_norm': non_negative(1.0, 'Global gradient norm above which gradients shrink; 0 never.'),
  },
  'train': {
    'num_steps': Field(
      1000, 'Optimizer steps.', 'must be an integer in 1..2**31-1', lambda v: 1 <= v < 2**31
    ),
    'init_from': anything(
      '',
      'DIR or DIR@STEP of a run whose parameters, and tokenizer, a new one starts from; no step is '
      'the newest.',
    ),
    'init_optimizer': anything(False, "The same with the state of that run's optimizer."),
    'init_router_state': anything(True, 'The same with what its routers carry from step to step.'),
    'seed': Field(
      0,
      'Of initialisation, data order, jitter and random drops.',
      'must be an integer in 0..2**31-1',
      lambda v: 0 <= v < 2**31,
    ),
    'accumulation_steps': at_least(1, 1, 'Micro-batches in an optimizer step; divides the batch.'),
    'accumulation_scope': one_of(
      'microbatch',
      ('microbatch', 'running', 'batch'),
      'Auxiliary losses of each micro-batch, averaged; the same with the loads of all '
      'micro-batches so far; or of the whole batch, exactly as without accumulation, at the price '
      'of one more forward pass.',
    ),
    'load_decay': share(0.99, 'Per step, of the moving average of the load, only for metrics.'),
    'log_every': at_least(10, 1, 'Steps between lines of metrics.jsonl.'),
    'eval_every': at_least(0, 0, 'Steps between evaluations on the validation split; 0 never.'),
    'eval_batches': at_least(0, 0, 'Batches of such an evaluation; 0 is the whole split.'),
    'checkpoint_every': at_least(200, 1, 'Steps between checkpoints; one is made at the end.'),
    'keep_checkpoints': at_least(2, 1, 'Newest checkpoints that stay.'),
    'check_causal': anything(
      True, 'Check at the start that a router which says that it is causal is; takes a second.'
    ),
  },
}

# Fields that may change when a run continues: none of them changes a result.
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
# Fields that came when there were runs and results already, without which their default held; but
# trials since then have ids that count them, also at their default.
LATER_FIELDS_IN_IDS = ('moe.null_balance_weight', 'moe.router_dtype')
# Hyperparameters of routers in the first results; every other one came later. Never add one.
_FIRST_ROUTER_FIELDS = (
  'score',
  'softmax_order',
  'gate_scale',
  'noise_scale',
  'noise_floor',
  'second_choice',
  'bias_update',
  'bias_rate',
  'num_expert_groups',
  'num_selected_groups',
  'assignment_tolerance',
  'evaluation',
  'threshold_decay',
  'hash_table',
  'hash_seed',
  'kmeans_update',
  'kmeans_decay',
  'kmeans_temperature',
  'kmeans_reseed_after',
  'num_null_experts',
  'sparsity_factor',
  'sparsity_start',
  'slots_per_expert',
)
# Those that came later, or will, and that ids leave out at their default.
LATER_FIELDS = (
  'train.init_from',
  'train.init_optimizer',
  'train.init_router_state',
  *sorted(
    {f'moe.{name}' for name in ROUTER_FIELDS.keys() - {*_FIRST_ROUTER_FIELDS}}
    - {*LATER_FIELDS_IN_IDS}
  ),
)
