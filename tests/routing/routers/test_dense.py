"""The mixture of all experts against a softmax written with loops."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.plan import make_plan
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import dense
from moe_jax.routing.routers.dense import Options
from tests import oracle

choose = jax.jit(dense.choose, static_argnums=3)

# Groups, tokens, experts.
SHAPES = [(1, 1, 1), (1, 7, 4), (2, 5, 6), (2, 8, 2)]
DIM = 3


def inputs_of(tokens, valid=None):
  groups, size, _ = tokens.shape
  return RouterInputs(
    tokens=jnp.asarray(tokens, jnp.float32),
    valid=jnp.ones((groups, size), bool) if valid is None else jnp.asarray(valid),
    token_ids=jnp.zeros((groups, size), jnp.int32),
    positions=jnp.zeros((groups, size), jnp.int32),
    keys=jax.random.split(jax.random.key(0), groups),
  )


def draw_case(rng, groups, size, num_experts):
  """Whole numbers, so that equal logits are common."""
  tokens = rng.integers(-2, 3, (groups, size, DIM)).astype(np.float64)
  return tokens, rng.integers(-2, 3, (DIM, num_experts)).astype(np.float64)


def weights_of(token, router):
  """Softmax of one token's logits, one product at a time."""
  logits = [sum(token[d] * router[d, e] for d in range(DIM)) for e in range(router.shape[1])]
  exp = np.exp(np.array(logits) - max(logits))
  return np.array(logits), exp / exp.sum()


@hypothesis.given(st.integers(0, 1000), st.sampled_from(SHAPES))
def test_matches_the_oracle(seed, shape):
  tokens, router = draw_case(np.random.default_rng(seed), *shape)
  num_experts = shape[-1]
  choice = choose(
    {'router': jnp.asarray(router, jnp.float32)},
    {},
    inputs_of(tokens),
    Options(num_experts, 1),
  )
  assert choice.chosen.all()
  for g in range(shape[0]):
    for s in range(shape[1]):
      logits, weights = weights_of(tokens[g, s], router)
      np.testing.assert_array_equal(choice.expert_index[g, s], np.arange(num_experts))
      np.testing.assert_allclose(choice.gates[g, s], weights, rtol=1e-5, atol=1e-7)
      np.testing.assert_array_equal(choice.router_probs[g, s], choice.gates[g, s])
      np.testing.assert_allclose(choice.router_logits[g, s], logits, rtol=1e-6)


def test_by_hand():
  # Logits ln 1, ln 2, ln 5: weights 1/8, 2/8, 5/8; experts that say 8, 16, 80 give 1 + 4 + 50 = 55.
  router = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
  choice = dense.choose({'router': router}, {}, inputs_of(np.ones((1, 1, 1))), Options(3, 1))
  np.testing.assert_allclose(choice.gates[0, 0], [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)
  np.testing.assert_allclose(np.dot(choice.gates[0, 0], [8, 16, 80]), 55, rtol=1e-6)


def test_output_is_the_weighted_sum_over_all_experts():
  rng = np.random.default_rng(0)
  tokens, router = draw_case(rng, 1, 7, 4)
  experts = rng.normal(size=(4, DIM, DIM))
  valid = np.array([[True] * 5 + [False] * 2])
  inputs = inputs_of(tokens, valid)
  choice = choose({'router': jnp.asarray(router, jnp.float32)}, {}, inputs, Options(4, 1))
  plan = make_plan(choice, inputs.valid, inputs.keys, capacity=7)
  np.testing.assert_array_equal(plan.keep, np.broadcast_to(valid[..., None], (1, 7, 4)))
  outputs = np.einsum('sd,edf->sef', tokens[0], experts)
  y = np.einsum('sk,skf->sf', plan.combine_weights[0], outputs)
  for s in range(7):
    expected = np.zeros(DIM)
    for e, weight in enumerate(weights_of(tokens[0, s], router)[1]):
      expected += weight * (tokens[0, s] @ experts[e]) * valid[0, s]
    np.testing.assert_allclose(y[s], expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_gates():
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(1, 5, DIM)).astype(np.float32).astype(np.float64)
  router, direction = rng.normal(size=(2, DIM, 4)).astype(np.float32).astype(np.float64)
  cotangent = rng.normal(size=(5, 4))

  def gates(router):
    choice = dense.choose({'router': router}, {}, inputs_of(tokens), Options(4, 1))
    return jnp.sum(choice.gates[0] * jnp.asarray(cotangent, jnp.float32))

  def expected(router):
    return sum(cotangent[s] @ weights_of(tokens[0, s], router)[1] for s in range(5))

  slope = np.sum(jax.jit(jax.grad(gates))(jnp.asarray(router, jnp.float32)) * direction)
  np.testing.assert_allclose(slope, oracle.central_difference(expected, router, direction), 1e-4)


@pytest.mark.parametrize('case', ['equal', 'collapse', 'one_expert', 'padding'])
def test_degenerate_inputs_stay_finite(case):
  tokens, router = np.ones((1, 3, DIM)), np.zeros((DIM, 1 if case == 'one_expert' else 4))
  if case == 'collapse':
    router[:, 1] = 1e4
  valid = np.full((1, 3), case != 'padding')

  def total(router):
    options = Options(router.shape[1], 1)
    choice = dense.choose({'router': router}, {}, inputs_of(tokens, valid), options)
    return jnp.sum(jnp.square(choice.gates)), choice

  (_, choice), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    jnp.asarray(router, jnp.float32)
  )
  assert np.isfinite(gradient).all()
  expected = {'collapse': [0, 1, 0, 0], 'one_expert': [1]}.get(case, [0.25] * 4)
  np.testing.assert_allclose(choice.gates[0], 3 * [expected], atol=1e-7)


def test_a_token_looks_at_nothing_but_itself():
  tokens, router = draw_case(np.random.default_rng(1), 1, 7, 4)
  params = {'router': jnp.asarray(router, jnp.float32)}
  changed = tokens.copy()
  changed[0, 4:] = np.nan
  choice = choose(params, {}, inputs_of(tokens), Options(4, 1))
  other = choose(params, {}, inputs_of(changed), Options(4, 1))
  np.testing.assert_array_equal(choice.gates[0, :4], other.gates[0, :4])


def test_is_asked_for_as_many_assignments_as_experts():
  assert dense.ROUTER.keeps_all
  assert dense.ROUTER.allowed(Options(6, 6)) is None
  assert dense.ROUTER.allowed(Options(6, 1)) == (
    'num_selected_experts',
    'must be 6, all experts',
  )
