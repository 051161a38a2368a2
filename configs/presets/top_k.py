"""OLMoE: softmax over all experts, no renormalisation.

Muennighoff et al. 2024, arXiv:2409.02060. Auxiliary losses are averaged over layers, as in its
trainer. Differs: 2 of 8 experts instead of 8 of 64.

With 8 experts C = S and nothing is dropped, as there; with the 16 of lm_small C = S / 2, and tokens
can be dropped.

The model around the experts lacks OLMoE's norm on queries and keys.

Its experts run SwiGLU, as there.

python -m moe_jax.train --config=configs/presets/top_k.py --workdir=runs/top_k
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='top_k',
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
    capacity_factor=4.0,
    eval_capacity_factor=4.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.01,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.001,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.0,
    layer_reduction='mean',
    router_dtype='float32',
    router_init_scale=0.1,
  )
