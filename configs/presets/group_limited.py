"""DeepSeek-V3: sigmoid scores, bias, groups, a weak loss in each sequence.

DeepSeek-AI 2024, arXiv:2412.19437. Differs: 2 of 8 experts in 4 groups instead of 8 of 256 in 8;
bias_rate 0.001 to the end, there for 14.3T tokens and then 0 for 500B. The weight of the sequence
loss, 0.0001, is from a secondary copy of the paper.

The model around the experts lacks V3's multi-head latent attention (MLA), its first three layers
without experts (every layer has them here) and the prediction of further tokens.

Its experts run SwiGLU, as V3's do.

python -m moe_jax.train --config=configs/presets/group_limited.py --workdir=runs/group_limited
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='group_limited',
    every=1,
    num_selected_experts=2,
    num_expert_groups=4,
    num_selected_groups=2,
    bias_update='sign',
    bias_rate=0.001,
    num_shared_experts=1,
    group_size=1,
    score='sigmoid',
    softmax_order='before',
    renormalize='before_drop',
    gate_scale=2.5,
    jitter=0.0,
    priority='token',
    capacity_factor=4.0,
    eval_capacity_factor=4.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.0,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.0,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.0001,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
