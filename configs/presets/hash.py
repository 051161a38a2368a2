"""Hash layers: a fixed table of token ids.

Roller et al. 2021, arXiv:2106.04426, balanced by the frequency of tokens in the training text.

Differs: a capacity, where ParlAI (13fe067) applies none. With 8 experts C = S / 2, in evaluation
C = S and nothing is dropped; with the 16 of lm_small S / 4 and S / 2, and tokens can be dropped.

Its experts run ReLU, the default of ParlAI's feed-forward layers.

python -m moe_jax.train --config=configs/presets/hash.py --workdir=runs/hash
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='relu',
    router='hash',
    every=1,
    num_selected_experts=1,
    hash_table='balanced',
    hash_seed=0,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=4.0,
    eval_capacity_factor=8.0,
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
