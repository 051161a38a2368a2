"""About 30M parameters: the smallest size at which ablations are worth reading.

python -m moe_jax.train --config=configs/lm_small.py --workdir=runs/lm_small
Tier-2 text (npm needed). Hours on 2 cores, minutes on one accelerator; on a pod, set the mesh.
"""

from moe_jax import config as schema


def get_config(arg: str = ''):
  """Returns the config; takes no argument."""
  if arg:
    raise ValueError(f'configs/lm_small.py takes no argument, got {arg!r}')
  config = schema.get_config()
  config.model.update(num_layers=8, embed_dim=256, num_heads=8, num_kv_heads=4, mlp_dim=1024)
  config.moe.update(num_experts=16, num_selected_experts=2, mlp_dim=512, every=2)
  config.data.update(
    name='tier2', tokenizer='bpe', vocab_size=8192, sequence_length=512, batch_size=32
  )
  config.optim.update(learning_rate=2e-3, warmup_steps=200)
  config.train.update(num_steps=5000, checkpoint_every=500, eval_every=500)
  return config
