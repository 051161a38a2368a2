"""Gradients of experts' weights from some of the rows, against sums over all rows in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import cpu, cpu_weight_gradients
from moe_jax.experts.cpu_weight_gradients import costs, filled_gradients, sizes_of

E, C = 8, 50


def make_pairs(num_filled, seed=0):
  rng = np.random.default_rng(seed)
  is_filled = np.arange(C)[None, :, None] < np.asarray(num_filled)[:, None, None]
  arrays = [np.where(is_filled, rng.normal(size=(E, C, n)), 0) for n in (4, 10, 5, 4)]
  rows, grad, hidden, grad_y = [jnp.asarray(array, jnp.float32) for array in arrays]
  return (rows, grad), (hidden, grad_y)


def expected(pairs):
  for pair in pairs:
    rows, grad = (np.asarray(values, np.float64) for values in pair)
    yield np.stack([sum(np.outer(rows[e, c], grad[e, c]) for c in range(C)) for e in range(E)])


def run(filled, pairs):
  """Compiles again: a program that was made while the choice was another would be found again."""
  return jax.jit(lambda *of: filled_gradients(*of))(filled, pairs)


def assert_right(num_filled):
  filled, pairs = jnp.asarray(num_filled, jnp.int32), make_pairs(num_filled)
  for got, want in zip(run(filled, pairs), expected(pairs), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.integers(0, C), min_size=E, max_size=E), st.sampled_from([0, 20, 85]))
def test_any_loads(num_filled, rows_to_add):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(cpu_weight_gradients, 'ROWS_TO_ADD', rows_to_add)
    assert_right(num_filled)


@pytest.mark.parametrize('size', [28, 44, 50])
def test_each_number_of_rows(monkeypatch, size):
  """Also where it is not the cheapest, with loads below, at and above it."""
  choice = lambda filled, sizes: jnp.array([abs(n - size) for n in sizes])  # noqa: E731
  monkeypatch.setattr(cpu_weight_gradients, 'costs', choice)
  assert_right([0, 1, size - 1, size, min(size + 1, C), C, 31, 49])


@pytest.mark.parametrize(
  ('num_filled', 'size'),
  [
    ([16] * E, 28),
    # 8 x 28 + (20 + 22) rows for one that has more, against 352 + 26 and 400.
    ([50] + [10] * (E - 1), 28),
    # 224 + 4 (20 + 22) = 392, 352, 400.
    ([44] * 4 + [0] * (E - 4), 44),
  ],
)
def test_the_cheapest_number_of_rows_is_taken(num_filled, size):
  """Rows beyond it are not read, except of experts that have more."""
  filled, pairs = jnp.asarray(num_filled, jnp.int32), make_pairs(num_filled)
  unread = (jnp.arange(C)[None, :, None] >= size) & (filled <= size)[:, None, None]
  spoilt = jax.tree.map(lambda values: jnp.where(unread, jnp.nan, values), pairs)
  for got, want in zip(run(filled, spoilt), expected(pairs), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_largest_number_is_read_where_all_have_as_many():
  """Of rows that do not count, too: so the test above would see a wrong choice."""
  pairs = make_pairs([C] * E)
  spoilt = jax.tree.map(lambda values: values.at[0, C - 1].set(jnp.nan), pairs)
  assert all(np.isnan(of[0]).any() for of in run(jnp.full((E,), C), spoilt))


def test_sizes():
  # From 50 / 2 on in steps of 25 / 2, both rounded up to a multiple of 4.
  assert sizes_of(50) == (28, 44, 50)
  # 84 / 2 = 42, so 44.
  assert sizes_of(168) == (84, 128, 168)
  assert sizes_of(3) == (3,)
  assert sizes_of(5) == (4, 5)
  assert sizes_of(16) == (8, 12, 16)


def test_costs_by_hand():
  filled = jnp.array([30, 33, 41, 41, 20, 30, 0, 32])
  # 8 x 28 and six experts with more: each 20 rows' time to add, and 50 - 28 rows more.
  # 8 x 44 and none, 8 x 50.
  want = [224 + 6 * (20 + 22), 352, 400]
  assert costs(filled, sizes_of(50)).tolist() == want


@pytest.mark.parametrize(('capacity', 'after'), [(168, True), (192, True), (304, False)])
def test_up_to_which_capacity_gradients_come_after_the_loops(capacity, after):
  """As measured (experiments/LOG.md): no loop of the backward pass then writes those of w_in."""
  w_in, w_out = jnp.zeros((E, 6, 10)), jnp.zeros((E, 5, 6))
  rows, hidden = jnp.zeros((E, capacity, 6)), jnp.zeros((E, capacity, 10))
  backward = functools.partial(cpu._looped_backward, 'swiglu')
  arguments = (rows, rows, jnp.zeros((E,), jnp.int32), hidden, w_in, w_out)
  equations = jax.make_jaxpr(backward)(*arguments).jaxpr.eqns
  loops = [equation for equation in equations if equation.primitive.name == 'while']
  written = {var.aval.shape for loop in loops for var in loop.outvars}
  assert loops and (w_in.shape not in written) == after
