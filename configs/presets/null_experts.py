"""Experts that compute nothing, so that a token chooses how much is computed.

Zeng et al. 2024, arXiv:2406.13233 (AdaMoE), experiment 1 of its code (CengZihao/AdaMoE, 180f122):
loss weight 0.001, gates divided by their sum over the true experts (after_drop, the same if nothing
is dropped). Differs: the numbers of experts; trained from scratch, where AdaMoE adds the null
experts to trained models.

With 8 experts C = S and nothing is dropped, as there; with the 16 of lm_small C = S / 2, and tokens
can be dropped.

Jin et al. 2024, arXiv:2410.07348 (MoE++) has 8 FFN experts, 1 zero, 1 copy and 2 constant ones; a
loss weight beta of 0.01 on the sum of eta f P, without our factor (E + N / tau) / K; a capacity
factor gamma of 1.1 and, by default, tau (null_balance_weight) 0.75. Only zero experts are here.

Its experts run SwiGLU, as those of the trained models do that AdaMoE starts from.

python -m moe_jax.train --config=configs/presets/null_experts.py --workdir=runs/null_experts
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='null_experts',
    every=1,
    num_selected_experts=2,
    num_null_experts=4,
    null_balance_weight=1.0,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='after_drop',
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
    router_loss_weight=0.001,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
