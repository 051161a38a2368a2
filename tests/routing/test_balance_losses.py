"""Losses scaled as elsewhere, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import losses, stats


def sums_with(tokens, counts, prob_sum):
  """Returns sums of these tokens [N], assignments [N, E] and probabilities [N, E]."""
  zero, none = jnp.zeros(()), jnp.zeros(counts.shape[-1])
  return stats.RouterSums(
    tokens=jnp.asarray(tokens, jnp.float32),
    tokens_per_expert=jnp.asarray(counts, jnp.float32),
    prob_sum=jnp.asarray(prob_sum, jnp.float32),
    kept_per_expert=none,
    tokens_all_dropped=zero,
    logsumexp_squared=zero,
    entropy=zero,
    top_prob=zero,
    logsumexp_max=zero,
    slots=zero,
    own={},
  )


def draw(num_scopes=3, num_experts=6, k=2, seed=0):
  """Returns tokens, counts and probabilities; the last scope is padding alone."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 9, size=num_scopes)
  tokens[-1] = 0
  counts = np.array([rng.multinomial(k * t, np.ones(num_experts) / num_experts) for t in tokens])
  probs = np.array([rng.dirichlet(np.ones(num_experts), size=t).sum(axis=0) for t in tokens])
  return tokens, counts, probs


def expected_device_loss(tokens, counts, probs, k, num_devices):
  total, num_experts = 0.0, counts.shape[-1]
  for n, c, p in zip(tokens, counts, probs, strict=True):
    size = num_experts // num_devices
    for device in range(num_devices):
      experts = range(device * size, (device + 1) * size)
      load = sum(num_experts / (k * n) * c[e] for e in experts) / size if n else 0
      prob = sum(p[e] / n for e in experts) if n else 0
      total += n * load * prob
  return total / max(1, sum(tokens))


def expected_value(tokens, counts, probs, k, normalization):
  total, num_experts = 0.0, counts.shape[-1]
  for n, c, p in zip(tokens, counts, probs, strict=True):
    for e in range(num_experts) if n else ():
      term = c[e] / n * p[e] / n
      if normalization == 'one':
        total += n * num_experts * term / k
      elif normalization == 'k':
        total += n * num_experts * term
      else:
        total += n * term / k / num_experts
  return total / max(1, sum(tokens))


@pytest.mark.parametrize('k', [1, 3])
def test_match_the_oracle(k):
  drawn = draw(k=k)
  sums = sums_with(*drawn)
  for num_devices in (1, 2, 3, 6):
    value = losses.device_balance_loss(sums, k, num_devices)
    expected = expected_device_loss(*drawn, k, num_devices)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
  for normalization in losses.NORMALIZATIONS:
    value = losses.load_balancing_value(sums, k, normalization)
    np.testing.assert_allclose(value, expected_value(*drawn, k, normalization), rtol=1e-6)


def test_values_at_balance_and_collapse():
  # 12 tokens, K = 2, E = 4: at balance 6 assignments and a probability sum of 3 each. All to
  # experts 0 and 1, with probability 1/2 each: 12, 12, 0, 0 and 6, 6, 0, 0.
  balanced = sums_with([12], np.full((1, 4), 6), np.full((1, 4), 3))
  collapsed = sums_with([12], np.array([[12, 12, 0, 0]]), np.array([[6, 6, 0, 0]]))

  def values(sums):
    return [
      *[losses.load_balancing_value(sums, 2, n) for n in ('one', 'k', 'gshard')],
      *[losses.device_balance_loss(sums, 2, d) for d in (1, 2, 4)],
    ]

  np.testing.assert_allclose(values(balanced), [1, 2, 1 / 16, 1, 1, 1], rtol=1e-6)
  # E sum f P = 4 (1/2 1/2 + 1/2 1/2) = 2. Two parts: f = (2, 0), P = (1, 0). One part: always 1.
  np.testing.assert_allclose(values(collapsed), [2, 4, 2 / 16, 1, 2, 2], rtol=1e-6)


def test_parts_may_be_unequal_inside():
  # Expert 0 takes all of the first part's: one by one 4 (1/2 1/2 + 1/2 1/2) = 2, by parts 1.
  sums = sums_with([4], np.array([[2, 0, 0, 2]]), np.array([[2, 0, 0, 2]]))
  np.testing.assert_allclose(losses.device_balance_loss(sums, 1, 4), 2, rtol=1e-6)
  np.testing.assert_allclose(losses.device_balance_loss(sums, 1, 2), 1, rtol=1e-6)


LOSSES = {
  'device': lambda sums: losses.device_balance_loss(sums, 2, 3),
  'k': lambda sums: losses.load_balancing_value(sums, 2, 'k'),
  'gshard': lambda sums: losses.load_balancing_value(sums, 2, 'gshard'),
}


@pytest.mark.parametrize('name', LOSSES)
def test_gradient_is_through_the_probabilities_alone(name):
  tokens, counts, probs = draw()
  loss = LOSSES[name]

  def value(c, p):
    return loss(sums_with(tokens, c, p))

  to_counts, to_probs = jax.grad(value, argnums=(0, 1))(
    jnp.asarray(counts, jnp.float32), jnp.asarray(probs, jnp.float32)
  )
  np.testing.assert_array_equal(to_counts, 0)
  expected = np.zeros(probs.shape)
  for index in np.ndindex(*probs.shape):
    # Linear in the probabilities: a slope of 1 is as good as a small one. Padding has none.
    step = np.zeros(probs.shape)
    step[index] = tokens[index[0]] > 0
    if name == 'device':
      high = expected_device_loss(tokens, counts, probs + step, 2, 3)
      low = expected_device_loss(tokens, counts, probs, 2, 3)
    else:
      high = expected_value(tokens, counts, probs + step, 2, name)
      low = expected_value(tokens, counts, probs, 2, name)
    expected[index] = high - low
  np.testing.assert_allclose(to_probs, expected, rtol=1e-5, atol=1e-7)
  assert np.abs(expected).max() > 1e-3


def test_layers_are_apart():
  drawn = [draw(seed=seed) for seed in (1, 2)]
  both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(sums_with(*d) for d in drawn))
  for loss in LOSSES.values():
    expected = [loss(sums_with(*d)) for d in drawn]
    np.testing.assert_allclose(loss(both), expected, rtol=1e-6)


def test_padding_alone_is_zero():
  sums = sums_with([0, 0], np.zeros((2, 6)), np.zeros((2, 6)))
  for loss in LOSSES.values():
    np.testing.assert_array_equal(loss(sums), 0)


def test_names_the_bad_value():
  sums = sums_with(*draw())
  with pytest.raises(ValueError, match='num_devices=4'):
    losses.device_balance_loss(sums, 2, 4)
  with pytest.raises(ValueError, match="normalization='two'"):
    losses.load_balancing_value(sums, 2, 'two')
