"""Two levels: groups of experts, then experts of the group.

Shazeer et al. 2017, arXiv:1701.06538, app. B: noise at both levels, importance and load losses over
all experts, each weighted by 0.1; app. C: two groups and two experts in each. Differs: 4 groups
where the paper has 16; matrices of logits that do not start at zero. With 8 experts C = S and
nothing is dropped, as in the paper, which has no capacity; with the 16 of lm_small C = S / 2.

Its experts run ReLU, as there.

python -m moe_jax.train --config=configs/presets/hierarchical.py --workdir=runs/hierarchical
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='hierarchical',
    every=1,
    num_selected_experts=4,
    num_expert_groups=4,
    num_selected_groups=2,
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
