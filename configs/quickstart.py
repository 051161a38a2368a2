"""The main job in about five minutes, set-up included: 8 experts over 8 simulated devices.

./launch/quickstart
"""

from moe_jax import config as schema


def get_config(arg: str = ''):
  """Returns the config; takes no argument."""
  if arg:
    raise ValueError(f'configs/quickstart.py takes no argument, got {arg!r}')
  config = schema.get_config()
  config.model.update(num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=2)
  config.moe.update(num_experts=8, num_selected_experts=2, mlp_dim=256, load_balancing_weight=0.05)
  config.mesh.update(data=2, expert=4)
  config.data.update(
    name='tier1', tokenizer='bpe', vocab_size=2048, sequence_length=128, batch_size=16
  )
  config.optim.update(learning_rate=6e-3, warmup_steps=40)
  config.train.update(num_steps=400, checkpoint_every=100)
  return config
