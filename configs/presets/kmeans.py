"""The nearest centroids of the inputs, learned online.

Roy et al. 2021, arXiv:2003.05997; see moe_jax/routing/routers/kmeans.py for what differs. The decay
is that of google-research's routing_transformer (0c1bbe5).

Its experts run SwiGLU; the paper routes attention and has no experts.

python -m moe_jax.train --config=configs/presets/kmeans.py --workdir=runs/kmeans
"""

from configs import presets


def get_config(arg: str = ''):
  """Returns the choices on the model of a base config; see `configs.presets.make`."""
  return presets.make(
    arg,
    activation='swiglu',
    router='kmeans',
    every=1,
    num_selected_experts=2,
    kmeans_update='ema',
    kmeans_decay=0.999,
    kmeans_temperature=1.0,
    kmeans_reseed_after=100,
    num_shared_experts=0,
    group_size=1,
    score='softmax',
    softmax_order='before',
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
    router_loss_weight=0.0,
    layer_reduction='sum',
    router_dtype='float32',
    router_init_scale=0.1,
  )
