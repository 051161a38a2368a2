"""A decoder of a few hundred weights, with parameters drawn in NumPy: nothing to compile."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.decoder import Decoder, DecoderOptions
from moe_jax.parallel.mesh import make_mesh
from tests.layers import small_layer

MOE = small_layer.make_options(num_experts=4, mlp_dim=6)
OPTIONS = DecoderOptions(
  vocab_size=32,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  num_kv_heads=1,
  head_dim=4,
  mlp_dim=10,
  activation='swiglu',
  rope_theta=100.0,
  norm_epsilon=1e-5,
  tied_embeddings=False,
  remat=False,
  compute_dtype='float32',
  moe=MOE,
  every=1,
  num_shared_experts=0,
)


def make_model(mesh=(1, 1), moe=(), **changes):
  """Returns the decoder with some options changed; `moe` changes those of its MoE layers."""
  moe_options = small_layer.change(MOE, **dict(moe)) if moe is not None else None
  options = dataclasses.replace(OPTIONS, **{'moe': moe_options, **changes})
  return Decoder(options, make_mesh(*mesh))


def draw_params(model, seed=0):
  """Weights of variance 1 / fan-in, larger than those of training: nothing is nearly linear."""
  moe = model.options.moe
  rows = model.mesh.size * (moe.group_size * moe.balance_scopes if moe else 1)
  tokens = jnp.ones((rows, 2), jnp.int32)
  boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, tokens, tokens))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    normal = rng.normal(size=leaf.shape)
    if path[-1].key == 'scale':
      return jnp.asarray(1 + 0.1 * normal, jnp.float32)
    fan_in = 1 if path[-1].key == 'embedding' else leaf.shape[-2]
    return jnp.asarray(normal / np.sqrt(fan_in), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed)['params'])


def draw_tokens(batch, length, seed=1):
  """Returns tokens, segment ids and positions of rows of one document each."""
  rng = np.random.default_rng(seed)
  tokens = jnp.asarray(rng.integers(0, OPTIONS.vocab_size, (batch, length)), jnp.int32)
  positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1))
  return tokens, jnp.ones((batch, length), jnp.int32), positions
