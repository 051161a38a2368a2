"""ReLU gates, their regularisation and its coefficient, against loops in float64."""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.plan import make_plan
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import remoe
from moe_jax.routing.routers.remoe import Options
from moe_jax.routing.stats import router_sums
from tests import oracle

choose = jax.jit(remoe.choose, static_argnums=3)

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


def sums_of(choice, valid):
  """Returns the sums that the layer passes to `loss`: each group a balance scope of its own."""
  asked = choice.chosen & valid[..., None]
  return types.SimpleNamespace(
    tokens=jnp.sum(valid, axis=1, dtype=jnp.float32),
    tokens_per_expert=jnp.sum(asked, axis=1, dtype=jnp.float32),
    own={name: jnp.sum(value, axis=0) for name, value in choice.sums.items()},
  )


def gates_of(token, router):
  """ReLU of one token's logits, one product at a time."""
  logits = [sum(token[d] * router[d, e] for d in range(DIM)) for e in range(router.shape[1])]
  return np.array([max(z, 0.0) for z in logits])


def loss_oracle(tokens, router, valid, k, coefficient):
  """Sums over tokens and experts, one by one."""
  rows = [gates_of(token, router) for token in tokens[valid]]
  if not rows:
    return 0.0
  num_experts, total = router.shape[1], 0.0
  for e in range(num_experts):
    share = num_experts / (k * len(rows)) * sum(row[e] > 0 for row in rows)
    for row in rows:
      total += share * row[e] / len(rows)
  return coefficient * total


@hypothesis.given(st.integers(0, 1000), st.sampled_from(SHAPES))
def test_matches_the_oracle(seed, shape):
  rng = np.random.default_rng(seed)
  groups, size, num_experts = shape
  # Whole numbers, so that logits of exactly 0 are common.
  tokens = rng.integers(-2, 3, (groups, size, DIM)).astype(np.float64)
  router = rng.integers(-2, 3, (DIM, num_experts)).astype(np.float64)
  valid = rng.random((groups, size)) < 0.7
  options = Options(num_experts, int(rng.integers(1, num_experts + 1)))
  params = {'router': jnp.asarray(router, jnp.float32)}
  choice = choose(params, {}, inputs_of(tokens, valid), options)
  for g in range(groups):
    gate_sum = np.zeros(num_experts)
    for s in range(size):
      gates = gates_of(tokens[g, s], router)
      gate_sum += gates * valid[g, s]
      np.testing.assert_array_equal(choice.expert_index[g, s], np.arange(num_experts))
      np.testing.assert_array_equal(choice.chosen[g, s], gates > 0)
      np.testing.assert_allclose(choice.gates[g, s], gates, rtol=1e-6)
      probs = gates / gates.sum() if gates.sum() else gates
      np.testing.assert_allclose(choice.router_probs[g, s], probs, rtol=1e-6)
      np.testing.assert_allclose(choice.router_logits[g, s], tokens[g, s] @ router, rtol=1e-6)
    np.testing.assert_allclose(choice.sums['gate_sum'][g], gate_sum, rtol=1e-6)
  state = {'coefficient': jnp.float32(0.3)}
  expected = loss_oracle(tokens, router, valid, options.num_selected_experts, 0.3)
  np.testing.assert_allclose(
    remoe.loss(sums_of(choice, jnp.asarray(valid)), state, options), expected, rtol=1e-5
  )


def test_by_hand():
  # Two tokens, two experts, K = 1. Gates (3, 0) and (1, 2): counts 2 and 1.
  # f = E / (K T) counts = 2 / 2 (2, 1) = (2, 1). Mean gates (4 / 2, 2 / 2) = (2, 1).
  # Loss 0.1 (2 * 2 + 1 * 1) = 0.5. Sparsity 1 - 3 / 4 < 1 - 1 / 2: the coefficient grows.
  tokens, options = np.array([[[3.0, -5.0], [1.0, 2.0]]]), Options(2, 1)
  choice = remoe.choose({'router': jnp.eye(2)}, {}, inputs_of(tokens), options)
  np.testing.assert_array_equal(choice.gates[0], [[3, 0], [1, 2]])
  np.testing.assert_array_equal(choice.chosen[0], [[True, False], [True, True]])
  np.testing.assert_allclose(choice.router_probs[0], [[1, 0], [1 / 3, 2 / 3]], rtol=1e-6)
  sums, state = sums_of(choice, jnp.ones((1, 2), bool)), {'coefficient': jnp.float32(0.1)}
  np.testing.assert_allclose(remoe.loss(sums, state, options), 0.5, rtol=1e-6)
  new = remoe.update(state, sums, options)
  np.testing.assert_allclose(new['coefficient'], 0.12, rtol=1e-6)


def test_reads_the_counts_of_the_layer():
  rng = np.random.default_rng(4)
  tokens, router = rng.normal(size=(2, 5, DIM)), rng.normal(size=(DIM, 4))
  valid = rng.random((2, 5)) < 0.7
  inputs, options = inputs_of(tokens, valid), Options(4, 1)
  choice = choose({'router': jnp.asarray(router, jnp.float32)}, {}, inputs, options)
  # One slot per expert: nearly all is dropped, and the loss must not notice.
  plan = make_plan(choice, inputs.valid, inputs.keys, capacity=1)
  sums = router_sums(choice, plan, inputs.valid, jnp.arange(2)[:, None], 2)
  state = remoe.new_state(options, DIM, 10)
  expected = loss_oracle(tokens, router, valid, 1, 1e-8)
  np.testing.assert_allclose(remoe.loss(sums, state, options), expected, rtol=1e-5)


def test_gradients_of_gates_probs_and_loss():
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(2, 5, DIM)).astype(np.float32).astype(np.float64)
  router, direction = rng.normal(size=(2, DIM, 4)).astype(np.float32).astype(np.float64)
  cotangent = rng.normal(size=(2, 2, 5, 4))
  valid = np.arange(10).reshape(2, 5) % 4 > 0
  options, state = Options(4, 2), {'coefficient': jnp.float32(0.3)}

  def values(router):
    choice = remoe.choose({'router': router}, {}, inputs_of(tokens, valid), options)
    gates = jnp.sum(choice.gates * jnp.asarray(cotangent[0], jnp.float32))
    probs = jnp.sum(choice.router_probs * jnp.asarray(cotangent[1], jnp.float32))
    return jnp.stack(
      [gates, probs, remoe.loss(sums_of(choice, jnp.asarray(valid)), state, options)]
    )

  def expected(router):
    rows = np.array([[gates_of(token, router) for token in group] for group in tokens])
    total = rows.sum(axis=-1, keepdims=True)
    probs = rows / np.where(total > 0, total, 1)
    loss = loss_oracle(tokens, router, valid, 2, 0.3)
    return np.array([np.sum(rows * cotangent[0]), np.sum(probs * cotangent[1]), loss])

  slopes = np.sum(
    np.asarray(jax.jit(jax.jacobian(values))(jnp.asarray(router, jnp.float32))) * direction,
    axis=(1, 2),
  )
  np.testing.assert_allclose(slopes, oracle.central_difference(expected, router, direction), 1e-4)


@pytest.mark.parametrize(
  'case', ['no_gate', 'zero_logits', 'tiny_gate', 'collapse', 'one_expert', 'padding']
)
def test_degenerate_inputs_stay_finite(case):
  value = {'no_gate': -1.0, 'zero_logits': 0.0, 'tiny_gate': 1e-25}.get(case, 1.0)
  router = np.full((DIM, 1 if case == 'one_expert' else 4), value)
  if case == 'collapse':
    router[:, 1:] = -1e4
  valid = jnp.full((1, 3), case != 'padding')
  options = Options(router.shape[1], 1)

  def total(router):
    choice = remoe.choose({'router': router}, {}, inputs_of(np.ones((1, 3, DIM)), valid), options)
    loss = remoe.loss(sums_of(choice, valid), {'coefficient': jnp.float32(1)}, options)
    return loss + jnp.sum(choice.gates) + jnp.sum(jnp.square(choice.router_probs)), (choice, loss)

  (_, (choice, loss)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(
    jnp.asarray(router, jnp.float32)
  )
  assert np.isfinite(gradient).all()
  assert np.isfinite(loss)
  assert np.isfinite(choice.router_probs).all()
  if case in ('no_gate', 'zero_logits'):
    # No expert, no output, and no gradient that would bring the token back.
    assert not choice.chosen.any()
    np.testing.assert_array_equal(choice.router_probs, 0)
    np.testing.assert_array_equal(gradient, 0)
  if case == 'padding':
    assert loss == 0


def test_padding_changes_nothing():
  rng = np.random.default_rng(1)
  tokens, options = rng.normal(size=(1, 7, DIM)), Options(4, 1)
  params = {'router': jnp.asarray(rng.normal(size=(DIM, 4)), jnp.float32)}
  valid = np.arange(7)[None] < 4
  changed = np.where(valid[..., None], tokens, np.nan)
  choice = choose(params, {}, inputs_of(tokens, valid), options)
  other = choose(params, {}, inputs_of(changed, valid), options)
  np.testing.assert_array_equal(choice.sums['gate_sum'], other.sums['gate_sum'])
  # The places of the padding are also those after the others: nothing before them changes.
  np.testing.assert_array_equal(choice.chosen[:, :4], other.chosen[:, :4])
  np.testing.assert_array_equal(choice.gates[:, :4], other.gates[:, :4])


def counted(num_tokens, counts):
  return types.SimpleNamespace(
    tokens=jnp.float32(num_tokens), tokens_per_expert=jnp.asarray(counts, jnp.float32)
  )


def test_coefficient_follows_the_sparsity():
  # E = 4, K = 1, 10 tokens: the target is 10 active gates.
  options = Options(4, 1, sparsity_factor=1.5, sparsity_start=1e-3)
  state, expected = remoe.new_state(options, DIM, 10), 1e-3
  assert state['coefficient'] == np.float32(1e-3)
  for active in [40, 20, 11, 10, 9, 0, 13]:
    state = remoe.update(state, counted(10, [active, 0, 0, 0]), options)
    expected *= 1.5 ** np.sign((1 - 1 / 4) - (1 - active / 40))
    np.testing.assert_allclose(state['coefficient'], expected, rtol=1e-5)
  after = remoe.update(state, counted(0, [0, 0, 0, 0]), options)
  np.testing.assert_array_equal(after['coefficient'], state['coefficient'])


@pytest.mark.parametrize(('active', 'end'), [(0, 1e-20), (40, 1e20)])
def test_coefficient_can_always_come_back(active, end):
  options = Options(4, 1)
  state = {'coefficient': jnp.float32(end)}
  state = remoe.update(state, counted(10, [active, 0, 0, 0]), options)
  np.testing.assert_allclose(state['coefficient'], end, rtol=1e-6)
  state = remoe.update(state, counted(10, [40 - active, 0, 0, 0]), options)
  np.testing.assert_allclose(state['coefficient'], end * 1.2 ** (1 if active == 0 else -1), 1e-5)


def test_sparsity_approaches_its_target():
  """A router of one offset per expert; the model wants larger gates, the penalty smaller ones."""
  options = Options(8, 2)
  noise = jax.random.normal(jax.random.key(0), (1, 64, 8))
  valid = jnp.ones((1, 64), bool)

  def step(carry, _):
    offsets, state = carry

    def total(offsets):
      inputs = inputs_of(noise + offsets[None, None, :])
      choice = remoe.choose({'router': jnp.eye(8)}, {}, inputs, options)
      sums = sums_of(choice, valid)
      wish = -jnp.sum(sums.own['gate_sum']) / 64
      return wish + remoe.loss(sums, state, options), sums

    gradient, sums = jax.grad(total, has_aux=True)(offsets)
    # The wanted pull may not vanish where all gates are 0.
    offsets = offsets - 0.05 * gradient
    active = jnp.sum(sums.tokens_per_expert) / 64
    return (offsets, remoe.update(state, sums, options)), active

  start = (jnp.linspace(0.0, 1.0, 8), remoe.new_state(options, 8, 10))
  _, active = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=400))(start)
  assert active[0] > 4
  np.testing.assert_allclose(np.mean(active[-100:]), 2, atol=0.1)


@pytest.mark.parametrize(
  ('field', 'value'),
  [('sparsity_factor', 1.0), ('sparsity_start', 0.0), ('renormalize', 'after_drop')],
)
def test_names_the_bad_option(field, value):
  assert remoe.ROUTER.allowed(Options(4, 1)) is None
  assert remoe.ROUTER.allowed(Options(4, 1, **{field: value}))[0] == field
