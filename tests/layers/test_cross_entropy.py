"""Cross-entropy by parts against the one that holds all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.cross_entropy import cross_entropy_sum, logits
from moe_jax.parallel.mesh import make_mesh
from tests import tiny

VOCAB = 23


def draw(batch=8, length=5, width=6, vocab=VOCAB, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(batch, length, width)) * 3, dtype)
  output = jnp.asarray(rng.normal(size=(width, vocab)), dtype)
  targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
  segments = jnp.asarray(rng.integers(0, 3, (batch, length)), jnp.int32)
  return hidden, output, targets, segments


def whole(hidden, output, targets, segments):
  return tiny.cross_entropy_sum(logits(hidden, output), targets, segments)


def by_parts(mesh, num_logits):
  return lambda *arrays: cross_entropy_sum(*arrays, mesh, num_logits)


def both(function, arrays):
  """A multiple of the sum, so that the factor of the gradient is seen, with its gradients."""
  scaled = lambda hidden, output: -0.3 * function(hidden, output, *arrays[2:])  # noqa: E731
  return jax.jit(jax.value_and_grad(scaled, argnums=(0, 1)))(*arrays[:2])


def test_the_oracle_against_numpy():
  hidden, output, targets, segments = draw()
  scores = np.asarray(logits(hidden, output), np.float64)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  picked = np.take_along_axis(probs, np.asarray(targets)[..., None], -1)[..., 0]
  expected = -np.log(picked[np.asarray(segments) > 0]).sum()
  np.testing.assert_allclose(whole(hidden, output, targets, segments), expected, rtol=1e-5)


# One token at a time, parts that do not divide the tokens, all at once.
@pytest.mark.parametrize('num_logits', [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_value_and_gradients_are_those_of_all_logits(mesh, num_logits):
  arrays = draw()
  wanted, wanted_grads = both(whole, arrays)
  found, grads = both(by_parts(make_mesh(*mesh), num_logits), arrays)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  for grad, other in zip(grads, wanted_grads, strict=True):
    np.testing.assert_allclose(grad, other, rtol=1e-5, atol=1e-5)
  # Without a gradient another function runs.
  np.testing.assert_allclose(-0.3 * by_parts(make_mesh(*mesh), num_logits)(*arrays), wanted, 1e-6)


def test_by_hand():
  # Logits (log 1, log 3): probabilities (1/4, 3/4). Targets 1 and 0 cost -log 3/4 and -log 1/4; the
  # third token is padding. d/d hidden = (p - onehot) output^T: output is the unit matrix.
  hidden = jnp.log(jnp.array([[[1.0, 3.0]] * 3]))
  targets, segments = jnp.array([[1, 0, 0]]), jnp.array([[1, 2, 0]])
  value, (grad, _) = both(by_parts(make_mesh(1, 1), 2), (hidden, jnp.eye(2), targets, segments))
  np.testing.assert_allclose(value, -0.3 * (np.log(4 / 3) + np.log(4)), rtol=1e-6)
  np.testing.assert_allclose(grad[0] / -0.3, [[0.25, -0.25], [-0.75, 0.75], [0, 0]], atol=1e-6)


def test_large_logits_and_padding_that_is_not_finite():
  hidden, output, targets, _ = draw()
  segments = jnp.ones_like(targets).at[0].set(0)
  arrays = (hidden.at[0].set(jnp.inf).at[1].mul(1e4), output, targets, segments)
  value, (grad, grad_output) = both(by_parts(make_mesh(1, 1), VOCAB), arrays)
  assert np.isfinite(value)
  np.testing.assert_array_equal(grad[0], 0)
  assert np.isfinite(grad[1:]).all()
  # As with all logits at once, a token that is not finite spoils the matrix: no silence.
  assert not np.isfinite(grad_output).all()


def test_trials_side_by_side():
  arrays = draw()
  mesh = make_mesh(2, 4)
  pack = [jnp.stack([a, jnp.flip(a, 0)]) for a in (arrays[0], *arrays[2:])]
  outputs = jnp.stack([arrays[1], 2 * arrays[1]])

  def gradient(hidden, output, targets, segments):
    return jax.value_and_grad(by_parts(mesh, 2 * VOCAB), (0, 1))(hidden, output, targets, segments)

  packed = jax.jit(jax.vmap(gradient))(pack[0], outputs, *pack[1:])
  for i in range(2):
    alone = jax.jit(gradient)(pack[0][i], outputs[i], *(a[i] for a in pack[1:]))
    for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(one[i], other, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_and_float32_sums():
  arrays = draw(dtype=jnp.bfloat16)
  wanted, wanted_grads = both(whole, draw())
  found, grads = both(by_parts(make_mesh(1, 1), 4 * VOCAB), arrays)
  assert found.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype('bfloat16')}
  np.testing.assert_allclose(found, wanted, rtol=1e-2)
  for grad, other in zip(grads, wanted_grads, strict=True):
    scale = np.abs(other).max()
    np.testing.assert_allclose(np.float32(grad) / scale, other / scale, atol=3e-2)


def test_all_logits_are_never_there_at_once():
  arrays = draw(batch=16, length=64, vocab=4096)
  num_bytes = 16 * 64 * 4096 * 4

  def temporary(function):
    gradient = jax.jit(jax.grad(lambda h, o: function(h, o, *arrays[2:]), argnums=(0, 1)))
    return gradient.lower(*arrays[:2]).compile().memory_analysis().temp_size_in_bytes

  assert temporary(whole) >= num_bytes
  assert temporary(by_parts(make_mesh(1, 1), 2**16)) < num_bytes / 8
