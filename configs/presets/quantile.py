"""Quantile balancing: the bias is moved to the quantile that balances.

Su 2026, https://kexue.fm/archives/11619; see moe_jax/routing/routers/quantile.py for what differs.
bias_rate 0.1 is the moving average with 0.9 of its part 7; its practical form has 1.

Its experts run SwiGLU; the source leaves the activation open.

python -m moe_jax.train --config=configs/presets/quantile.py --workdir=runs/quantile
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='quantile',
    every=1,
    num_selected_experts=2,
    bias_rate=0.1,
    num_shared_experts=0,
    group_size=1,
    score='sigmoid',
    softmax_order='before',
    renormalize='none',
    gate_scale=1.0,
    jitter=0.0,
    priority='token',
    capacity_factor=4.0,
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
    router_init_scale=0.1,
  )
