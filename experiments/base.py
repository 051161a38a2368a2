"""The model that the studies for small machines change: 4 blocks, 2 of them with experts."""

from moe_jax import config as schema


def small(num_steps: int):
  """Returns a config of about 1.3M active parameters on tier-2 text.

  Args:
    num_steps: of 4,096 tokens each.
  """
  config = schema.get_config()
  config.model.update(num_layers=4, embed_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=512)
  config.moe.update(num_experts=8, num_selected_experts=2, mlp_dim=256, every=2)
  config.mesh.update(data=2, expert=4)
  config.data.update(
    name='tier2', tokenizer='bpe', vocab_size=4096, sequence_length=256, batch_size=16
  )
  config.optim.update(learning_rate=4e-3, warmup_steps=100)
  config.train.update(num_steps=num_steps, checkpoint_every=200, eval_every=0, log_every=20)
  return config
