"""GShard: top-2, the second choice at random by its weight.

Lepikhin et al. 2020, arXiv:2006.16668. Its loss counts only first choices; 1 at balance here. Not
stated: the initial scale of the router. Differs: a MoE layer in every block, there in every second.

The model around the experts is a language model, where the paper has an encoder and a decoder that
translate.

Its experts run ReLU, as there.

python -m moe_jax.train --config=configs/presets/gshard.py --workdir=runs/gshard
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='gshard',
    every=1,
    num_selected_experts=2,
    second_choice='random',
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='before_drop',
    gate_scale=1.0,
    jitter=0.0,
    priority='choice',
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
    router_loss_weight=0.01,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
