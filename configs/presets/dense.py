"""Dense mixture: all experts, softmax weights.

Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79.

Its experts run SwiGLU, which is younger than the paper.

python -m moe_jax.train --config=configs/presets/dense.py --workdir=runs/dense
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  config = presets.make(
    arg,
    activation='swiglu',
    router='dense',
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
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
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
  # All of them, as many as the base has.
  config.moe.num_selected_experts = config.moe.num_experts
  return config
