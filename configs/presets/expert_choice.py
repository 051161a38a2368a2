"""Expert choice: each expert takes its best tokens.

Zhou et al. 2022, arXiv:2202.09368, capacity factor 2. Not causal in training; evaluated with a
threshold, as a language model must.

Its experts run SwiGLU; that the paper's run a gated unit, too, is not checked.

python -m moe_jax.train --config=configs/presets/expert_choice.py --workdir=runs/expert_choice
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='expert_choice',
    every=1,
    num_selected_experts=2,
    evaluation='threshold',
    threshold_decay=0.99,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=1.0,
    eval_capacity_factor=4.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.0,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.0,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.0,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
