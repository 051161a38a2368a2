"""Activations against their formulas, in NumPy (`tests/oracle.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import experts
from tests import oracle

X = np.array([-30.0, -2.0, -0.75, -1e-3, 0.0, 1e-3, 0.5, 1.0, 3.0, 30.0])
VALUE = np.array([1.0, -2.0, 0.5, 3.0, 1.0, -1.0, 4.0, 0.25, -0.5, 2.0])


def hidden_of(activation):
  gated = activation in ('swiglu', 'geglu')
  return np.concatenate([X, VALUE]) if gated else X


@pytest.mark.parametrize('activation', experts.ACTIVATIONS)
def test_matches_the_formula(activation):
  hidden = hidden_of(activation)
  assert experts.hidden_dim(len(X), activation) == len(hidden)
  found = experts.activate(jnp.asarray(hidden, jnp.float32), activation)
  np.testing.assert_allclose(found, oracle.activate(hidden, activation), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('activation', experts.ACTIVATIONS)
def test_the_gradient_is_that_of_the_formula(activation):
  hidden = hidden_of(activation)[X.tolist().index(0.0) :]  # not at the corner of ReLU
  gate, value = np.array([-2.0, 0.5, 3.0]), np.array([1.0, -2.0, 0.25])
  hidden = np.concatenate([gate, value]) if len(hidden) > len(X) else gate
  loss = lambda h: jnp.sum(experts.activate(h, activation))  # noqa: E731
  found = np.asarray(jax.grad(loss)(jnp.asarray(hidden, jnp.float32)))
  step = 1e-5
  for place in range(len(hidden)):
    moved = np.stack([hidden, hidden])
    moved[:, place] += [step, -step]
    sums = [np.sum(oracle.activate(h, activation)) for h in moved]
    np.testing.assert_allclose(found[place], (sums[0] - sums[1]) / (2 * step), rtol=1e-4, atol=1e-5)


def test_the_two_gelus_differ_and_by_hand():
  """At 1, Phi(1) = 0.8413447; with the tanh 0.8411920."""
  one = jnp.float32([1.0])
  np.testing.assert_allclose(experts.activate(one, 'gelu_exact'), 0.8413447, rtol=1e-6)
  np.testing.assert_allclose(experts.activate(one, 'gelu'), 0.8411920, rtol=1e-6)
  two = jnp.float32([1.0, -2.0])
  np.testing.assert_allclose(experts.activate(two, 'geglu'), -2 * 0.8411920, rtol=1e-6)
  np.testing.assert_array_equal(experts.activate(two, 'relu'), [1.0, 0.0])


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="activation='silu': must be one of swiglu"):
    experts.activate(jnp.zeros(2), 'silu')
