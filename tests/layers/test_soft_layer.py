"""The layer of the Soft MoE preset, which no language model here can have, trained by itself."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.presets import soft
from moe_jax import config as schema
from moe_jax.layers import moe
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train import metrics
from tests.layers import small_layer

BATCH, LENGTH = 16, 8


def test_the_layer_learns_a_function_of_the_whole_sequence():
  """Each token is to give its own numbers turned by a matrix, plus the mean of its sequence."""
  options = dataclasses.replace(
    small_layer.OPTIONS, router='soft', choice=schema.router_options(soft.get_config())
  )
  layer = moe.Moe(options, make_mesh(2, 4), small_layer.VOCAB_SIZE)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, small_layer.WIDTH)), jnp.float32)
  valid = jnp.asarray(rng.random((BATCH, LENGTH)) < 0.85).at[1].set(False)
  info, mask = small_layer.info_of(valid), valid[..., None]
  mean = jnp.sum(x * mask, axis=1, keepdims=True) / jnp.maximum(
    jnp.sum(mask, axis=1, keepdims=True), 1
  )
  turn = jnp.asarray(rng.normal(size=(small_layer.WIDTH,) * 2), jnp.float32) * 0.3
  target = jnp.einsum('btd,de->bte', x, turn) + mean

  def apply(params):
    return layer.apply({'params': params}, x, info, deterministic=True)

  def loss(params):
    error = jnp.square(apply(params).y - target) * mask
    return jnp.sum(error) / (jnp.sum(mask) * small_layer.WIDTH)

  optimizer = optax.adam(0.02)

  @jax.jit
  def train(params):
    def step(carry, _):
      params, moments = carry
      value, gradients = jax.value_and_grad(loss)(params)
      updates, moments = optimizer.update(gradients, moments)
      return (optax.apply_updates(params, updates), moments), value

    carry, values = jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)
    return carry[0], values, apply(carry[0])

  key = jax.random.key(0)
  start = nn.unbox(layer.init({'params': key}, x, info, deterministic=True)['params'])
  params, values, (y, sums, *_) = jax.device_get(train(start))
  assert np.isfinite(values).all() and np.isfinite(y).all()
  assert values[-1] < 0.2 * values[0], (values[0], values[-1])
  assert all(np.abs(params[name] - start[name]).max() > 1e-2 for name in ('phi', 'scale'))
  total = sums._replace(
    **{name: getattr(sums, name).sum(0) for name in ('tokens', 'tokens_per_expert', 'prob_sum')}
  )
  report = metrics.router_metrics(jax.tree.map(lambda a: np.asarray(a)[None], total))
  assert all(np.isfinite(np.ravel(value)).all() for value in report.values())
  # Every token asks every expert, and none is dropped.
  np.testing.assert_allclose(report['router/load'], np.full((1, 8), 1 / 8))
  assert report['router/drop_share'] == 0
