"""Attention and the dense layers against NumPy written from their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import experts
from moe_jax.layers import attention as attention_lib
from moe_jax.layers import basic
from tests import oracle

HEADS, HEAD_DIM, WIDTH, THETA = 4, 4, 6, 100.0


def draw(batch=2, length=5):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32)
  segment_ids = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
  positions = jnp.array([[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]])
  return x, segment_ids, positions


def init(num_kv_heads):
  module = attention_lib.Attention(HEADS, num_kv_heads, HEAD_DIM, THETA)
  x, segment_ids, positions = draw()
  mask = attention_lib.packed_causal_mask(segment_ids)
  return module, nn.unbox(module.init(jax.random.key(1), x, positions, mask))['params']


def rotated(x, position):
  """Pairs (i, i + H/2) turn by position * theta^(-2i/H)."""
  half = len(x) // 2
  y = np.empty_like(x)
  for i in range(half):
    angle = position * THETA ** (-i / half)
    cos, sin = np.cos(angle), np.sin(angle)
    y[i] = x[i] * cos - x[i + half] * sin
    y[i + half] = x[i + half] * cos + x[i] * sin
  return y


def expected(params, num_kv_heads):
  """One query at a time, over the earlier tokens of its own document."""
  x, segment_ids, positions = (np.asarray(a) for a in draw())
  w = {name: np.asarray(value, np.float64) for name, value in params.items()}
  y = np.zeros((*x.shape[:2], WIDTH))
  for b, t in np.ndindex(*x.shape[:2]):
    heads = []
    seen = [u for u in range(t + 1) if segment_ids[b, u] == segment_ids[b, t]]
    for head in range(HEADS):
      columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
      shared = head // (HEADS // num_kv_heads)
      kv = slice(shared * HEAD_DIM, (shared + 1) * HEAD_DIM)
      query = rotated((x[b, t] @ w['query'])[columns], positions[b, t])
      scores = [
        query @ rotated((x[b, u] @ w['key'])[kv], positions[b, u]) / np.sqrt(HEAD_DIM) for u in seen
      ]
      weights = oracle.softmax(scores)
      heads.append(sum(p * (x[b, u] @ w['value'])[kv] for p, u in zip(weights, seen, strict=True)))
    y[b, t] = np.concatenate(heads) @ w['out']
  return y


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
def test_matches_the_definition(num_kv_heads):
  module, params = init(num_kv_heads)
  x, segment_ids, positions = draw()
  mask = attention_lib.packed_causal_mask(segment_ids)
  y, cache = module.apply({'params': params}, x, positions, mask)
  assert cache is None
  np.testing.assert_allclose(y, expected(params, num_kv_heads), rtol=1e-4, atol=1e-5)


def test_shared_heads_equal_repeated_heads():
  module, params = init(2)

  def repeat(w):
    # Heads 0 and 1 read key-value head 0, heads 2 and 3 head 1.
    return jnp.repeat(w.reshape(WIDTH, 2, HEAD_DIM), 2, axis=1).reshape(WIDTH, -1)

  repeated = {**params, 'key': repeat(params['key']), 'value': repeat(params['value'])}
  x, segment_ids, positions = draw()
  mask = attention_lib.packed_causal_mask(segment_ids)
  full = attention_lib.Attention(HEADS, HEADS, HEAD_DIM, THETA)
  np.testing.assert_allclose(
    module.apply({'params': params}, x, positions, mask)[0],
    full.apply({'params': repeated}, x, positions, mask)[0],
    rtol=1e-5,
    atol=1e-6,
  )


def test_mask_by_hand():
  mask = attention_lib.packed_causal_mask(jnp.array([[1, 1, 2, 0]]))
  np.testing.assert_array_equal(
    mask[0, 0], np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
  )


def test_rotation_by_hand():
  # H = 2, one frequency theta^0 = 1: (1, 0) at position p becomes (cos p, sin p).
  x = jnp.tile(jnp.array([1.0, 0.0]), (1, 3, 1, 1))
  turned = attention_lib.rotate(x, jnp.array([[0, 1, 7]]), 10000.0)
  angles = np.array([0.0, 1.0, 7.0])
  np.testing.assert_allclose(
    turned[0, :, 0], np.stack([np.cos(angles), np.sin(angles)], axis=-1), atol=1e-6
  )


def test_rms_norm_by_hand():
  # Root mean square of (3, 4, 0, 0) is 2.5; scale 2 for the second element.
  norm = basic.RMSNorm(0.0)
  scale = jnp.array([1.0, 2.0, 1.0, 1.0])
  y = norm.apply({'params': {'scale': scale}}, jnp.array([[[3.0, 4.0, 0.0, 0.0]]]))
  np.testing.assert_allclose(y[0, 0], [1.2, 3.2, 0, 0], rtol=1e-6)
  zero = norm.clone(epsilon=1e-5).apply({'params': {'scale': scale}}, jnp.zeros((1, 1, 4)))
  np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize('activation', experts.ACTIVATIONS)
def test_mlp_matches_the_definition(activation):
  x = draw()[0]
  module = basic.Mlp(5, activation)
  params = nn.unbox(module.init(jax.random.key(0), x))['params']
  assert params['w_in'].shape == (WIDTH, experts.hidden_dim(5, activation))
  y = module.apply({'params': params}, x)
  np.testing.assert_allclose(
    y,
    oracle.expert(np.asarray(x, np.float64), params['w_in'], params['w_out'], activation),
    rtol=1e-4,
    atol=1e-5,
  )
