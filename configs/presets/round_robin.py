"""Control: experts in rotation, by position.

No paper.

Its experts run SwiGLU.

python -m moe_jax.train --config=configs/presets/round_robin.py --workdir=runs/round_robin
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='round_robin',
    every=1,
    num_selected_experts=1,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
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
