"""Selection bit by bit against a stable sort in NumPy and `jax.lax.top_k`."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing import selection

TINY = float(np.finfo(np.float32).tiny)
# Both zeros, both infinities, neighbours, numbers of either sign; NaNs of either sign are added.
VALUES = (0.0, -0.0, np.inf, -np.inf, 1.0, float(np.nextafter(np.float32(1), 2)), -1.0, 3e38, TINY)

kth_largest = jax.jit(selection.kth_largest)
k_largest = jax.jit(selection.k_largest, static_argnums=1)


def bits(x):
  return np.asarray(x, np.float32).view(np.uint32)


def order(column):
  """Returns the rows, largest first, of equals the upper; as Python integers made by hand."""
  numbers = [int(b) for b in bits(column)]
  # A negative number counts backwards from -0, which is below +0.
  numbers = [n if n < 2**31 else 2**31 - 1 - n for n in numbers]
  return sorted(range(len(numbers)), key=lambda row: (-numbers[row], row))


@st.composite
def columns(draw):
  """Draws [2, S, E] of few values, and k."""
  size, width = draw(st.sampled_from([(1, 1), (2, 3), (7, 2), (8, 1), (9, 3)]))
  nans = np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)
  values = np.concatenate([np.array(VALUES, np.float32), nans])
  picks = st.lists(
    st.integers(0, len(values) - 1), min_size=2 * size * width, max_size=2 * size * width
  )
  return values[draw(picks)].reshape(2, size, width), draw(st.integers(1, size))


@hypothesis.given(columns())
def test_matches_a_stable_sort(drawn):
  values, k = drawn
  which, last = k_largest(values, k)
  of_data = kth_largest(values, np.full((2, 1, 1), k, np.int32))
  np.testing.assert_array_equal(bits(last), bits(of_data))
  for g, e in np.ndindex(values.shape[0], values.shape[2]):
    rows = order(values[g, :, e])[:k]
    assert sorted(rows) == list(np.flatnonzero(which[g, :, e]))
    assert bits(last[g, 0, e]) == bits(values[g, rows[-1], e])
  index = jax.lax.top_k(values.swapaxes(1, 2), k)[1]
  np.testing.assert_array_equal(np.sort(index), [[np.flatnonzero(c) for c in w.T] for w in which])


@pytest.mark.parametrize('digits', [1, 7])
def test_every_k_of_many(digits):
  # With one digit nearly all are tied.
  values = np.random.default_rng(0).normal(size=(1, 300, 4)).round(digits).astype(np.float32)
  best_first = -np.sort(-values, axis=1, kind='stable')
  for k in (1, 2, 37, 255, 256, 299, 300):
    which, last = k_largest(values, k)
    np.testing.assert_array_equal(last[:, 0], best_first[:, k - 1])
    index = np.argsort(-values, axis=1, kind='stable')[:, :k]
    expected = np.zeros(values.shape, bool)
    np.put_along_axis(expected, index, values=True, axis=1)
    np.testing.assert_array_equal(which, expected)


def test_k_of_the_data():
  values = np.random.default_rng(1).normal(size=(3, 20, 5)).astype(np.float32)
  best_first = -np.sort(-values, axis=1)
  k = np.array([1, 20, 8], np.int32)[:, None, None]
  expected = np.take_along_axis(best_first, np.broadcast_to(k - 1, (3, 1, 5)), axis=1)
  np.testing.assert_array_equal(kth_largest(values, k), expected)
  k = np.random.default_rng(2).integers(1, 21, size=(3, 1, 5)).astype(np.int32)
  expected = np.take_along_axis(best_first, k - 1, axis=1)
  np.testing.assert_array_equal(kth_largest(values, k), expected)


def test_keys_and_back():
  values = np.array([*VALUES, -TINY, 7.25], np.float32)
  key = selection.to_key(jnp.asarray(values))
  np.testing.assert_array_equal(bits(selection.from_key(key)), bits(values))
  assert list(np.argsort(-np.asarray(key, np.int64), kind='stable')) == order(values)


def test_float32_only():
  with pytest.raises(ValueError, match='must be float32'):
    selection.to_key(jnp.zeros((1, 2, 3), jnp.bfloat16))
