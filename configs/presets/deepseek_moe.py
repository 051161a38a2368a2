"""DeepSeekMoE: fine-grained experts and some that every token passes.

Dai et al. 2024, arXiv:2401.06066: experts cut in two, two of the four active ones shared; no
device-level loss, as in its 2B validation models. Differs: all m N experts are routed and the
shared ones come on top, where the paper routes m N less the shared; all weights start there from
N(0, 0.006^2).

With 8 experts (16 after the cut) C = S and nothing is dropped, as there; with the 16 of lm_small
(32) C = S / 2, and tokens can be dropped.

Its experts run SwiGLU, as in the paper's released models.

python -m moe_jax.train --config=configs/presets/deepseek_moe.py --workdir=runs/deepseek_moe
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  config = presets.make(
    arg,
    activation='swiglu',
    router='top_k',
    every=1,
    num_selected_experts=1,
    num_shared_experts=2,
    group_size=1,
    score='softmax',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=8.0,
    eval_capacity_factor=8.0,
    dispatch='gather',
    balance_scope='global',
    load_balancing_weight=0.01,
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
  return presets.segmented(config, 2)
