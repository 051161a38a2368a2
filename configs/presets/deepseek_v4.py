"""DeepSeek-V4: sqrt-softplus scores, bias, no limit to groups, a weak loss in each sequence.

DeepSeek-AI 2026, arXiv:2606.19348, known from descriptions of the report and of its code, which
agree: the scores are the square root of softplus instead of V3's sigmoid, the limit to groups is
gone (one group here), bias and sequence loss stay. Differs: 2 of 8 experts; its first layers route
by a hash of the token, here every layer by scores. gate_scale 1.5 is that of the smaller model
(Flash); bias_rate and the weight of the loss were not found and are V3's.

Its experts run SwiGLU, as V3's do.

python -m moe_jax.train --config=configs/presets/deepseek_v4.py --workdir=runs/deepseek_v4
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
    num_expert_groups=1,
    num_selected_groups=1,
    bias_update='sign',
    bias_rate=0.001,
    num_shared_experts=1,
    group_size=1,
    score='sqrt_softplus',
    softmax_order='before',
    renormalize='before_drop',
    gate_scale=1.5,
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
