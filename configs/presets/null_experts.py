"""Experts that compute nothing, so that a token chooses how much is computed.

Jin et al. 2024, arXiv:2410.07348, zero experts alone (no copy and constant experts).

python -m moe_jax.train --config=configs/presets/null_experts.py --workdir=runs/null_experts
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    router='null_experts',
    num_selected_experts=2,
    num_null_experts=4,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    balance_scope='global',
    load_balancing_weight=0.0,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.0,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.01,
    layer_reduction='sum',
    router_init_scale=0.1,
  )
