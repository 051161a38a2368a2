"""Sparsely-gated mixture of experts: noisy top-k, importance and load losses.

Shazeer et al. 2017, arXiv:1701.06538. Differs: a capacity, where the paper has none; K = 2, where
its flat layers have 4.

Its experts run ReLU, as there.

python -m moe_jax.train --config=configs/presets/noisy_top_k.py --workdir=runs/noisy_top_k
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='noisy_top_k',
    every=1,
    num_selected_experts=2,
    noise_floor=0.0,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='after',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.0,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.0,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.1,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
