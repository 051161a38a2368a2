"""BASE layers: a balanced assignment of tokens to experts.

Lewis et al. 2021, arXiv:2103.16716, checked against fairseq's modules/base_layer.py (26d62ae). Not
causal in training. Its router starts orthogonal with gain 0.1, elements of variance 0.01 / D; ours
are of that variance, from a truncated normal.

Differs: a capacity, where the source has none. In training it is what the assignment fills, so
nothing is dropped; in evaluation C = S / 2 with 8 experts, S / 4 with the 16 of lm_small, and
tokens can be dropped.

Its experts run ReLU; those of the source are ReLU layers behind a norm, several in a row.

python -m moe_jax.train --config=configs/presets/base.py --workdir=runs/base
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='base',
    every=1,
    num_selected_experts=1,
    num_shared_experts=0,
    group_size=1,
    score='sigmoid',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=1.0,
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
    router_init_scale=0.01,
  )
