"""Seconds: for trying a change. 8 simulated devices not needed; runs on one.

python -m moe_jax.train --config=configs/debug.py --workdir=runs/debug
"""

from moe_jax import config as schema


def get_config(arg: str = ''):
  """Returns the config; takes no argument."""
  if arg:
    raise ValueError(f'configs/debug.py takes no argument, got {arg!r}')
  config = schema.get_config()
  config.model.update(num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, mlp_dim=64)
  config.moe.update(num_experts=4, mlp_dim=32)
  config.data.update(sequence_length=64, batch_size=8)
  config.optim.update(warmup_steps=5)
  config.train.update(num_steps=50, checkpoint_every=25, eval_every=25, eval_batches=2)
  return config
