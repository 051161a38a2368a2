"""ST-MoE: top-2, renormalised gates, z-loss.

Zoph et al. 2022, arXiv:2202.08906. Differs: every second choice asks for a slot (the paper draws
them, see the preset gshard). The loss is K at balance, as in Flaxformer.

python -m moe_jax.train --config=configs/presets/st_moe.py --workdir=runs/st_moe
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    router='top_k',
    num_selected_experts=2,
    score='softmax',
    softmax_order='before',
    renormalize='before_drop',
    gate_scale=1.0,
    jitter=0.01,
    priority='choice',
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    balance_scope='global',
    load_balancing_weight=0.01,
    balance_normalization='k',
    device_balance_weight=0.0,
    router_z_weight=0.001,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.0,
    layer_reduction='sum',
    router_init_scale=0.1,
  )
