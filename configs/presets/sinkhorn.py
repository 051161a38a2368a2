"""S-BASE: selection on a Sinkhorn-balanced plan.

Clark et al. 2022, arXiv:2202.01169. Not causal in training.

Differs: a capacity, where Megatron-LM (005742f) applies none. C = S / 4 with 8 experts and S / 8
with the 16 of lm_small, twice that in evaluation, and tokens can be dropped.

Its experts run SwiGLU; the activation of the paper's is not checked.

python -m moe_jax.train --config=configs/presets/sinkhorn.py --workdir=runs/sinkhorn
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='sinkhorn',
    every=1,
    num_selected_experts=1,
    assignment_tolerance=1e-4,
    num_shared_experts=0,
    group_size=1,
    score='sigmoid',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=2.0,
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
