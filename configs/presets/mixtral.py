"""Mixtral: softmax over the two selected logits.

Jiang et al. 2024, arXiv:2401.04088. The paper names no auxiliary loss; 0.02 is what is usual with
its weights; the loss is K at balance, as in Hugging Face's code. Differs: that code pools the
tokens of all layers before it multiplies f and P, here the losses of the layers are averaged.

With 8 experts C = S and nothing is dropped, as there; with the 16 of lm_small C = S / 2, and tokens
can be dropped.

Its experts run SwiGLU, as there.

python -m moe_jax.train --config=configs/presets/mixtral.py --workdir=runs/mixtral
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
    softmax_order='after',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=4.0,
    eval_capacity_factor=4.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.02,
    balance_normalization='k',
    device_balance_weight=0.0,
    router_z_weight=0.0,
    importance_weight=0.0,
    entropy_weight=0.0,
    router_loss_weight=0.0,
    layer_reduction='mean',
    router_dtype='float32',
    router_init_scale=0.1,
  )
