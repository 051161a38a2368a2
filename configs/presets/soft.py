"""Soft MoE: slots that read mixtures of all tokens. Not for causal models, of which all here are.

Puigcerver et al. 2023, arXiv:2308.00951; one slot for each expert, as in the code's own config
(google-research/vmoe, 662341d, projects/soft_moe/configs/pretrain_jft4b.py), where 128 experts read
the 196 tokens of an image. Differs: a sequence instead of an image; without noise on the logits, an
option there. Nothing is dropped: capacity, priority and `num_selected_experts` are not read, nor is
the size of the weights' start, as they are normalised.

Its experts run GELU, as there; by the tanh, the default of the library of its code.

`python -m moe_jax.train` refuses it in one line. tests/layers/test_soft_layer.py trains its layer.
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='gelu',
    router='soft',
    every=1,
    num_selected_experts=1,
    slots_per_expert=1,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
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
    router_loss_weight=0.0,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=1.0,
  )
