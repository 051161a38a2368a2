"""Switch Transformer: top-1 with a capacity and an auxiliary loss.

Fedus et al. 2021, arXiv:2101.03961. Differs: the balance is over
the batch, not per core; a MoE layer in every block, there in every second.

The model around the experts is a decoder, where the paper has T5's encoder and decoder with
relative positions.

Its experts run ReLU, as in the paper's equations and Switch-C; its other models have GEGLU.

python -m moe_jax.train --config=configs/presets/switch.py --workdir=runs/switch
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='top_k',
    every=1,
    num_selected_experts=1,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.01,
    priority='token',
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.01,
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
