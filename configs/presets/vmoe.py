"""V-MoE: fixed noise on the logits, importance and load losses.

Riquelme et al. 2021, arXiv:2106.05974, with its code, google-research/vmoe (942a78b): first choices
get slots first (priority=choice), its default in training, batch priority being an option; the
router starts as lecun_normal, of variance 1 / D. Neither order is causal. Differs: a language model
instead of images; a MoE layer in every block, there in every second or the last few; a capacity
rounded up to a whole number, where the code rounds it up to a multiple of 4.

The model around the experts lacks the patches, the learned positions and the class token of a
vision transformer, and the biases of its matrices.

Its experts run GELU, as there; by the tanh, the default of the library of its code.

python -m moe_jax.train --config=configs/presets/vmoe.py --workdir=runs/vmoe
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='gelu',
    router='vmoe',
    every=1,
    num_selected_experts=2,
    noise_scale=1.0,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='choice',
    capacity_factor=1.05,
    eval_capacity_factor=1.05,
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
    router_init_scale=1.0,
  )
