"""The model that the studies for small machines change: 2 blocks, both with experts."""

from moe_jax import config as schema

# Chosen on the validation split by experiments/learning_rate: the best of 2e-3, 4e-3 and 8e-3 for
# the dense model, 4, 16 and 64 experts alike.
LEARNING_RATE = 4e-3


def small(num_steps: int = 1000):
  """Returns a config of 16 experts, 2 of them active, on tier-2 text.

  A single device by default: on a CPU a worker per core is faster than a mesh. Results do not
  depend on the mesh, so `sweep --set=mesh.data=2 --set=mesh.expert=2` is free.

  Args:
    num_steps: of 2,048 tokens each.
  """
  config = schema.get_config()
  config.model.update(num_layers=2, embed_dim=128, num_heads=4, num_kv_heads=2, mlp_dim=512)
  config.moe.update(num_experts=16, num_selected_experts=2, mlp_dim=256, group_size=4)
  # As many as there are routing groups.
  config.moe.balance_devices = 4
  config.mesh.update(data=1, expert=1)
  config.data.update(
    name='tier2', tokenizer='bpe', vocab_size=2048, sequence_length=128, batch_size=16
  )
  config.optim.update(learning_rate=LEARNING_RATE, warmup_steps=50)
  config.train.update(num_steps=num_steps, checkpoint_every=200, eval_every=0, log_every=20)
  return config
