"""ReMoE: ReLU gates, sparsity held by an adaptive coefficient.

Wang et al. 2024, arXiv:2412.14711. Differs: the sparsity is that of each layer; 2 of 8 experts on
average, where the official scripts (thu-ml/ReMoE, 463c6af) have 1 of 8.

Its experts run SwiGLU, as in the paper's LLaMA blocks.

python -m moe_jax.train --config=configs/presets/remoe.py --workdir=runs/remoe
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='remoe',
    every=1,
    num_selected_experts=2,
    sparsity_factor=1.2,
    sparsity_start=1e-8,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
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
    router_loss_weight=1.0,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
