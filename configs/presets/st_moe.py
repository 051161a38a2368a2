"""ST-MoE: top-2, renormalised gates, z-loss.

Zoph et al. 2022, arXiv:2202.08906, with Mesh TensorFlow (da90793) and Flaxformer (399ea3a). An
expert has 1.25 S / E slots, 2 S / E in evaluation: their factor leaves out K, so ours is half of
it. No jitter: the paper tries it on the input, finds that it costs quality, and takes the z-loss;
Mesh TensorFlow's top-2 has none, in Flaxformer it is an option. The loss is 1 at balance.

The second choice requests a slot with probability min(1, g2 / 0.2), as in Mesh TensorFlow (the
paper's threshold of 1/5, sec. 3.4), and the balance loss counts only first choices (app. A): both
are those of the router gshard.

Differs: in evaluation every second choice requests a slot, there the draw is made too; a MoE layer
in every block, there in every fourth.

The model around the experts is a decoder, where the paper has T5's encoder and decoder.

Its experts run GEGLU, as there.

python -m moe_jax.train --config=configs/presets/st_moe.py --workdir=runs/st_moe
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='geglu',
    router='gshard',
    every=1,
    num_selected_experts=2,
    second_choice='threshold',
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='before_drop',
    gate_scale=1.0,
    jitter=0.0,
    priority='choice',
    capacity_factor=0.625,
    eval_capacity_factor=1.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.0,
    balance_normalization='one',
    device_balance_weight=0.0,
    router_z_weight=0.001,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.01,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
