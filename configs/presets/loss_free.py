"""Balance without a loss: a bias on the selection follows the load.

Wang et al. 2024, arXiv:2408.15664. Differs: 2 of 8 experts, where the paper has 6 of 64 and two
shared ones.

With 8 experts C = S and nothing is dropped; with the 16 of lm_small C = S / 2, and tokens can be
dropped.

Its experts run SwiGLU, as DeepSeekMoE's do, on which the paper builds.

python -m moe_jax.train --config=configs/presets/loss_free.py --workdir=runs/loss_free
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='loss_free',
    every=1,
    num_selected_experts=2,
    bias_update='sign',
    bias_rate=0.001,
    num_shared_experts=0,
    group_size=1,
    score='sigmoid',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
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
    router_loss_weight=0.0,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
