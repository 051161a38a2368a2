"""The two mixtures of Soft MoE against loops in float64."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import soft
from moe_jax.routing.routers.soft import Options
from tests import oracle

mix = jax.jit(soft.mix, static_argnums=3)
choose = jax.jit(soft.choose, static_argnums=3)

# Groups, tokens, experts, slots per expert.
SHAPES = [(1, 1, 1, 1), (1, 7, 3, 2), (2, 5, 4, 1), (2, 4, 1, 3)]
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


def params_of(phi, scale):
  return {'phi': jnp.asarray(phi, jnp.float32), 'scale': jnp.asarray([scale], jnp.float32)}


def unit(vector):
  return vector / np.sqrt(sum(v * v for v in vector) + 1e-6)


def mix_oracle(tokens, phi, scale, valid):
  """Logits, dispatch and combine weights [G S slots], one number at a time."""
  groups, size, _ = tokens.shape
  num_slots = phi.shape[1]
  logits, dispatch, combine = np.zeros((3, groups, size, num_slots))
  for g in range(groups):
    there = [s for s in range(size) if valid[g, s]]
    for s in there:
      for p in range(num_slots):
        logits[g, s, p] = unit(tokens[g, s]) @ (scale * unit(phi[:, p]))
    for s in there:
      for p in range(num_slots):
        dispatch[g, s, p] = np.exp(logits[g, s, p]) / sum(np.exp(logits[g, t, p]) for t in there)
        combine[g, s, p] = np.exp(logits[g, s, p]) / sum(
          np.exp(logits[g, s, q]) for q in range(num_slots)
        )
  return logits, dispatch, combine


@hypothesis.given(st.integers(0, 1000), st.sampled_from(SHAPES))
def test_matches_the_oracle(seed, shape):
  rng = np.random.default_rng(seed)
  groups, size, num_experts, slots = shape
  # Whole numbers, so that zero tokens and equal ones are common.
  tokens = rng.integers(-1, 2, (groups, size, DIM)).astype(np.float64)
  phi = rng.normal(size=(DIM, num_experts * slots))
  valid = rng.random((groups, size)) < 0.7
  options = Options(num_experts, 1, slots_per_expert=slots)
  params, inputs = params_of(phi, 2.5), inputs_of(tokens, valid)
  logits, dispatch, combine = (
    value.reshape(groups, size, num_experts, slots) for value in mix_oracle(tokens, phi, 2.5, valid)
  )
  mixture = mix(params, {}, inputs, options)
  np.testing.assert_allclose(mixture.dispatch, dispatch, rtol=1e-5)
  np.testing.assert_allclose(mixture.combine, combine, rtol=1e-5)
  choice = choose(params, {}, inputs, options)
  np.testing.assert_allclose(choice.gates, combine.sum(axis=-1), rtol=1e-5)
  np.testing.assert_array_equal(choice.router_probs, choice.gates)
  np.testing.assert_allclose(
    choice.router_logits, np.log(np.exp(logits).sum(axis=-1)), rtol=1e-5, atol=1e-5
  )
  experts = np.broadcast_to(np.arange(num_experts), choice.expert_index.shape)
  np.testing.assert_array_equal(choice.expert_index, experts)
  assert choice.chosen.all()


def test_by_hand():
  # Unit tokens (1, 0), (0, 1); two experts of one slot, phi = 7 I, scale ln 3. Logits ln 3 on the
  # diagonal and 0 off it: every softmax is of (ln 3, 0), that is (3/4, 1/4).
  params = params_of(7 * np.eye(2), np.log(3))
  inputs, options = inputs_of(np.eye(2)[None]), Options(2, 1)
  mixture = soft.mix(params, {}, inputs, options)
  expected = [[3 / 4, 1 / 4], [1 / 4, 3 / 4]]
  np.testing.assert_allclose(mixture.dispatch[0, :, :, 0], expected, rtol=1e-5)
  np.testing.assert_allclose(mixture.combine[0, :, :, 0], expected, rtol=1e-5)


def test_slots_of_an_expert_are_neighbouring_columns():
  # Expert 1 has columns 2 and 3 of phi; the token points along column 3.
  phi = np.eye(4)
  params, options = params_of(phi, 9.0), Options(2, 1, slots_per_expert=2)
  combine = soft.mix(params, {}, inputs_of(phi[None, 3:]), options).combine[0, 0]
  np.testing.assert_array_equal(np.unravel_index(np.argmax(combine), (2, 2)), (1, 1))


def test_gradients_of_both_mixtures():
  rng = np.random.default_rng(0)
  valid = np.array([[True, True, False, True]])
  point = rng.normal(size=12 + 12 + 1).astype(np.float32).astype(np.float64)
  direction = rng.normal(size=point.shape)
  cotangent = rng.normal(size=(2, 1, 4, 4))
  options = Options(2, 1, slots_per_expert=2)

  def values(point):
    tokens, phi = point[:12].reshape(1, 4, DIM), point[12:24].reshape(DIM, 4)
    mixture = soft.mix({'phi': phi, 'scale': point[24:]}, {}, inputs_of(tokens, valid), options)
    weights = [jnp.asarray(c, jnp.float32).reshape(1, 4, 2, 2) for c in cotangent]
    return jnp.stack([jnp.sum(w * m) for w, m in zip(weights, mixture, strict=True)])

  def expected(point):
    tokens, phi = point[:12].reshape(1, 4, DIM), point[12:24].reshape(DIM, 4)
    _, dispatch, combine = mix_oracle(tokens, phi, point[24], valid)
    return np.array([np.sum(cotangent[0] * dispatch), np.sum(cotangent[1] * combine)])

  slopes = np.asarray(jax.jit(jax.jacobian(values))(jnp.asarray(point, jnp.float32))) @ direction
  np.testing.assert_allclose(slopes, oracle.central_difference(expected, point, direction), 1e-4)


@pytest.mark.parametrize('case', ['equal', 'zero_tokens', 'huge_scale', 'one_token', 'padding'])
def test_degenerate_inputs_stay_finite(case):
  tokens = np.ones((1, 1 if case == 'one_token' else 3, DIM)) * (case != 'zero_tokens')
  valid = np.full(tokens.shape[:2], case != 'padding')
  phi = np.random.default_rng(0).normal(size=(DIM, 4))
  options = Options(2, 1, slots_per_expert=2)

  def total(params, tokens):
    mixture = soft.mix(params, {}, inputs_of(tokens, valid), options)
    choice = soft.choose(params, {}, inputs_of(tokens, valid), options)
    squares = [jnp.sum(jnp.square(value)) for value in (*mixture, choice.router_logits)]
    return sum(squares), mixture

  params = params_of(phi, 1e4 if case == 'huge_scale' else 1.0)
  gradients, mixture = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
    params, jnp.asarray(tokens, jnp.float32)
  )
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all()
  there = float(case != 'padding')
  np.testing.assert_allclose(np.sum(mixture.dispatch, axis=1), there, rtol=1e-6)
  np.testing.assert_allclose(np.sum(mixture.combine, axis=(2, 3)), there, rtol=1e-6)
  if case in ('equal', 'zero_tokens'):
    np.testing.assert_allclose(mixture.dispatch, 1 / 3, rtol=1e-6)


def test_padding_changes_nothing():
  rng = np.random.default_rng(1)
  tokens, options = rng.normal(size=(1, 7, DIM)), Options(3, 1, slots_per_expert=2)
  params, valid = params_of(rng.normal(size=(DIM, 6)), 2.0), np.arange(7)[None] % 3 > 0
  changed = np.where(valid[..., None], tokens, np.nan)
  for function in (mix, choose):
    one = function(params, {}, inputs_of(tokens, valid), options)
    other = function(params, {}, inputs_of(changed, valid), options)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_does_not_care_for_the_order_or_length_of_tokens():
  rng = np.random.default_rng(2)
  tokens, options = rng.normal(size=(1, 7, DIM)), Options(3, 1, slots_per_expert=2)
  params = params_of(rng.normal(size=(DIM, 6)), 2.0)
  mixture = mix(params, {}, inputs_of(tokens), options)
  turned = mix(params, {}, inputs_of(100 * tokens[:, ::-1]), options)
  for one, other in zip(mixture, turned, strict=True):
    np.testing.assert_allclose(one, other[:, ::-1], rtol=1e-4)
  longer = mix({**params, 'phi': 100 * params['phi']}, {}, inputs_of(tokens), options)
  np.testing.assert_allclose(mixture.dispatch, longer.dispatch, rtol=1e-4)


def test_leaks_the_future():
  rng = np.random.default_rng(3)
  tokens, options = rng.normal(size=(1, 7, DIM)), Options(3, 1, slots_per_expert=2)
  params = params_of(rng.normal(size=(DIM, 6)), 2.0)
  changed = tokens.copy()
  changed[0, -1] *= -1
  before = mix(params, {}, inputs_of(tokens), options)
  after = mix(params, {}, inputs_of(changed), options)
  # What the slots read of the first token depends on the last one; what it reads of them does not.
  assert np.abs(before.dispatch[0, 0] - after.dispatch[0, 0]).max() > 1e-3
  np.testing.assert_array_equal(before.combine[0, :-1], after.combine[0, :-1])
  assert not soft.ROUTER.causal
  assert soft.ROUTER.rejected
  assert not options.decodes


def test_parameters_and_options():
  options = Options(3, 1, slots_per_expert=2)
  weights = soft.ROUTER.params(options, DIM)
  assert weights['phi'].shape == (DIM, 6)
  assert (weights['scale'].shape, weights['scale'].init) == ((1,), 'ones')
  assert soft.ROUTER.allowed(options) is None
  assert soft.ROUTER.allowed(Options(3, 1, slots_per_expert=0))[0] == 'slots_per_expert'
