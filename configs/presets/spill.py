"""In order of position, each token takes the best experts that are not full.

The causal relative of greedy assignment; see moe_jax/routing/routers/spill.py.

Its experts run SwiGLU; there is no paper.

python -m moe_jax.train --config=configs/presets/spill.py --workdir=runs/spill
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='spill',
    every=1,
    num_selected_experts=2,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=1.0,
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
