"""gather == einsum == oracle, forward and backward, with drops and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.dispatch import einsum, gather

HALVES = {'gather': gather, 'einsum': einsum}
NAMES = tuple(HALVES)


def make_plan(capacity=2, num_groups=3, size=6, num_experts=4, k=2, seed=0, priority='choice'):
  rng = np.random.default_rng(seed)
  logits = jnp.asarray(rng.normal(size=(num_groups, size, num_experts)), jnp.float32)
  valid = jnp.asarray(rng.random((num_groups, size)) < 0.8)
  choice = routing.choose_top_k(logits, num_selected_experts=k, renormalize='none')
  keys = jax.random.split(jax.random.key(seed), num_groups)
  return routing.make_plan(choice, valid, keys, capacity=capacity, priority=priority)


def draw_tokens(plan, width=5, seed=1):
  num_groups, size, _ = plan.keep.shape
  rng = np.random.default_rng(seed)
  tokens = rng.normal(size=(num_groups, size, width))
  outputs = rng.normal(size=(plan.source_index.shape[1], num_groups, plan.source_index.shape[2], 5))
  return jnp.asarray(tokens, jnp.float32), jnp.asarray(outputs, jnp.float32)


def expected_dispatch(tokens, plan):
  """Slot (e, g, c) holds the token whose assignment names it."""
  num_groups, size, k = plan.keep.shape
  _, num_experts, capacity = plan.source_index.shape
  slots = np.zeros((num_experts, num_groups, capacity, tokens.shape[-1]))
  for g, s, i in np.ndindex(num_groups, size, k):
    if plan.keep[g, s, i]:
      slots[plan.expert_index[g, s, i], g, plan.slot_index[g, s, i]] = tokens[g, s]
  return slots


def expected_combine(outputs, plan):
  """A token is the weighted sum of the slots of its kept assignments."""
  num_groups, size, k = plan.keep.shape
  y = np.zeros((num_groups, size, outputs.shape[-1]))
  for g, s, i in np.ndindex(num_groups, size, k):
    if plan.keep[g, s, i]:
      slot = outputs[plan.expert_index[g, s, i], g, plan.slot_index[g, s, i]]
      y[g, s] += float(plan.combine_weights[g, s, i]) * np.asarray(slot, np.float64)
  return y


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('capacity', [1, 2, 6])
def test_both_halves_match_the_oracle(name, capacity):
  plan = make_plan(capacity)
  assert (capacity == 6) == bool(jnp.all(plan.keep == plan.keep.any(-1, keepdims=True)))
  tokens, outputs = draw_tokens(plan)
  dispatcher = HALVES[name]
  slots = dispatcher.dispatch(tokens, plan)
  np.testing.assert_allclose(slots, expected_dispatch(np.asarray(tokens), plan), rtol=1e-6)
  y = dispatcher.combine(outputs, plan)
  np.testing.assert_allclose(y, expected_combine(outputs, plan), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_combine_undoes_dispatch_on_kept_tokens(name):
  # With one choice and weight 1, what comes back is the token; 0 where it was dropped.
  plan = make_plan(capacity=1, k=1)
  plan = plan._replace(combine_weights=plan.keep.astype(jnp.float32))
  tokens, _ = draw_tokens(plan)
  dispatcher = HALVES[name]
  back = dispatcher.combine(dispatcher.dispatch(tokens, plan), plan)
  assert 0 < plan.keep.sum() < plan.keep.size
  np.testing.assert_array_equal(back, jnp.where(plan.keep, tokens, 0))


def gradients(dispatcher, plan):
  """Slopes of a sum of squares through both halves, a nonlinear layer between."""
  tokens, _ = draw_tokens(plan)

  def loss(tokens, weights):
    weighted = plan._replace(combine_weights=weights)
    slots = dispatcher.dispatch(tokens, weighted)
    outputs = jnp.tanh(slots * (1 + jnp.arange(slots.shape[0]))[:, None, None, None])
    return jnp.sum(jnp.square(dispatcher.combine(outputs, weighted) + tokens))

  return jax.grad(loss, argnums=(0, 1))(tokens, plan.combine_weights)


def expected_gradients(plan):
  """The same by hand: y = x + sum_k w_k tanh((1 + e) x), L = sum y^2, and the chain rule."""
  tokens = np.asarray(draw_tokens(plan)[0], np.float64)
  num_groups, size, k = plan.keep.shape
  kept = [i for i in np.ndindex(num_groups, size, k) if plan.keep[i]]
  y = tokens.copy()
  for g, s, i in kept:
    scale = 1 + int(plan.expert_index[g, s, i])
    y[g, s] += float(plan.combine_weights[g, s, i]) * np.tanh(scale * tokens[g, s])
  of_tokens, of_weights = 2 * y, np.zeros((num_groups, size, k))
  for g, s, i in kept:
    scale = 1 + int(plan.expert_index[g, s, i])
    hidden = np.tanh(scale * tokens[g, s])
    of_weights[g, s, i] = 2 * y[g, s] @ hidden
    slope = float(plan.combine_weights[g, s, i]) * scale * (1 - hidden**2)
    of_tokens[g, s] += 2 * y[g, s] * slope
  return of_tokens, of_weights


def check_gradients(name, capacity):
  plan = make_plan(capacity)
  of_tokens, of_weights = gradients(HALVES[name], plan)
  expected_tokens, expected_weights = expected_gradients(plan)
  np.testing.assert_allclose(of_tokens, expected_tokens, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(of_weights, expected_weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('capacity', [1, 2, 6])
def test_gradients_match_the_chain_rule(name, capacity):
  check_gradients(name, capacity)


# 8 slots for 12 assignments, and 24: the two ways of the backward passes.
@pytest.mark.parametrize('capacity', [2, 6])
@pytest.mark.parametrize('half', ['_dispatch', '_combine'])
def test_control_a_doubled_gradient_is_noticed(half, capacity, monkeypatch):
  function = getattr(gather, half)
  rule = function.bwd

  def doubled(residuals, grad):
    return jax.tree.map(lambda g: 2 * g, rule(residuals, grad))

  monkeypatch.setattr(function, 'bwd', doubled)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    check_gradients('gather', capacity)


@pytest.mark.parametrize('name', NAMES)
def test_narrow_numbers_are_summed_in_float32(name):
  # 256 + 1 + 1 in bfloat16, one by one, stays 256; the sum of products in float32 is 258.
  plan = make_plan(capacity=3, num_groups=1, size=1, num_experts=3, k=3)
  plan = plan._replace(
    keep=jnp.ones((1, 1, 3), bool),
    combine_weights=jnp.array([[[256.0, 1.0, 1.0]]]),
    slot_index=jnp.zeros((1, 1, 3), jnp.int32),
  )
  outputs = jnp.ones((3, 1, 3, 2), jnp.bfloat16)
  y = HALVES[name].combine(outputs, plan)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), 258)


def test_gather_moves_rows_without_scatter():
  plan = make_plan(3)
  tokens, _ = draw_tokens(plan)

  def loss(tokens):
    return jnp.sum(jnp.square(gather.combine(gather.dispatch(tokens, plan), plan)))

  assert 'gather' in str(jax.make_jaxpr(jax.grad(loss))(tokens))
  assert 'scatter' not in str(jax.make_jaxpr(jax.grad(loss))(tokens))


@pytest.mark.parametrize('name', NAMES)
def test_padding_reaches_no_expert(name):
  plan = make_plan(capacity=6)
  lost = ~np.asarray(plan.keep.any(-1))
  tokens, _ = draw_tokens(plan)
  other = jnp.where(lost[..., None], 1e6, tokens)
  run = functools.partial(HALVES[name].dispatch, plan=plan)
  assert lost.any()
  np.testing.assert_array_equal(run(tokens), run(other))


@pytest.mark.parametrize('name', NAMES)
def test_products_ask_for_full_precision(name):
  # TPUs and GPUs round float32 products to fewer bits unless told otherwise; a CPU never shows it.
  plan = make_plan(capacity=3)
  tokens, outputs = draw_tokens(plan)

  def both(tokens, outputs):
    inputs, pull_inputs = jax.vjp(lambda t: HALVES[name].dispatch(t, plan), tokens)
    y, pull_y = jax.vjp(lambda o: HALVES[name].combine(o, plan), outputs)
    return pull_inputs(inputs), pull_y(y)

  program = str(jax.make_jaxpr(both)(tokens, outputs))
  assert program.count('dot_general') == program.count('Precision.HIGHEST, Precision.HIGHEST') > 0
