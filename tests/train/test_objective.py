"""The one place where losses are normalised and weighted."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.train import objective
from tests.layers import small_layer


def _sums(tokens_per_expert, prob_sum, tokens):
  """Sums of layers with one balance scope: (L E), (L E), number of tokens."""
  selected = jnp.asarray(tokens_per_expert, jnp.float32)
  layers = selected.shape[0]
  each = jnp.full((layers,), 8.0)
  return routing.RouterSums(
    tokens=jnp.full((layers, 1), float(tokens)),
    tokens_per_expert=selected[:, None],
    prob_sum=jnp.asarray(prob_sum, jnp.float32)[:, None],
    kept_per_expert=selected,
    tokens_all_dropped=jnp.zeros((layers,)),
    logsumexp_squared=each,
    entropy=each,
    top_prob=each,
    logsumexp_max=each,
    slots=each,
    own={},
  )


def moe_of(num_selected_experts):
  return small_layer.make_options(num_selected_experts=num_selected_experts)


def test_layers_that_collapse_on_different_experts_do_not_cancel():
  # Pooled over the layers the load would be balanced, and the loss 1.
  loads = [[4.0, 0.0], [0.0, 4.0]]
  losses = objective.auxiliary_losses(_sums(loads, loads, 4), moe_of(1), {})
  np.testing.assert_allclose(losses.load_balancing, [2.0, 2.0])
  np.testing.assert_allclose(losses.importance, [1.0, 1.0])


def test_balance_gives_one_and_zero():
  loads = np.full((2, 4), 2.0)
  losses = objective.auxiliary_losses(_sums(loads, loads / 2, 4), moe_of(2), {})
  np.testing.assert_allclose(losses.load_balancing, [1.0, 1.0])
  np.testing.assert_allclose(losses.importance, [0.0, 0.0], atol=1e-7)
  np.testing.assert_allclose(losses.router_z, [2.0, 2.0])


@pytest.mark.parametrize(
  ('reduction', 'expected'),
  [('mean', 0.5 * 2 + 0.25 * 3 + 4 - 0.5 * 8 + 0.5 * 2 + 1), ('sum', 7.5)],
)
def test_weighted_sum(reduction, expected):
  losses = objective.AuxiliaryLosses(
    *map(jnp.array, ([1.0, 3.0], [2.0, 4.0], [4.0, 4.0], [8.0, 8.0], [2.0, 2.0], [16.0, 0.0]))
  )
  weights = objective.LossWeights(*map(jnp.array, (0.5, 0.25, 1.0, -0.5, 0.5, 0.125)))
  np.testing.assert_allclose(objective.weighted_sum(losses, weights, reduction), expected)


def test_weights_enter_once():
  """Not `aux + weight * aux`: half the weight is half of what is added."""
  losses = objective.AuxiliaryLosses(*(jnp.array([1.0, 3.0]) for _ in range(6)))
  zero = objective.LossWeights(*(jnp.zeros(()) for _ in range(6)))
  assert objective.weighted_sum(losses, zero, 'mean') == 0
