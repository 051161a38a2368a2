"""Shared parts of the tests of routers with a selection bias: formulas in NumPy float64, and cases.

The oracle is written from the formulas, with loops over tokens; it knows nothing of the package.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moe_jax.routing import plan as plan_lib
from moe_jax.routing import registry, stats
from moe_jax.routing import router as router_lib
from tests import oracle


def scores_of(row, score):
  """Returns the scores of one token."""
  row = [float(z) for z in row]
  if score == 'softmax':
    return oracle.softmax(row)
  if score == 'sigmoid':
    return np.array([1 / (1 + math.exp(-z)) for z in row])
  return np.array([math.sqrt(math.log1p(math.exp(z))) for z in row])


def biased(scores, bias, bias_update):
  return scores * bias if bias_update == 'multiplicative' else scores + bias


def gates_of(scores, chosen, renormalize, gate_scale):
  gates = np.array([scores[e] for e in chosen])
  return gate_scale * (gates / gates.sum() if renormalize == 'before_drop' else gates)


def count(chosen, valid, num_experts):
  """Returns how often each expert is chosen; chosen [T, K], valid [T]."""
  counts = np.zeros(num_experts)
  for experts, ok in zip(chosen, valid, strict=True):
    for e in experts:
      counts[e] += bool(ok)
  return counts


def moved(bias, counts, bias_update, rate):
  """Returns the bias after a step with these counts."""
  mean = counts.sum() / len(counts)
  sign = np.array([(c < mean) * 1.0 - (c > mean) * 1.0 for c in counts])
  if bias_update == 'sign':
    return bias + rate * sign
  if bias_update == 'proportional':
    return bias + rate * (mean - counts) / mean
  if bias_update == 'multiplicative':
    return bias * (1 + rate * sign)
  return bias + rate * sign - (rate * sign).sum() / len(counts)


def max_violation(counts):
  return max(counts) / (sum(counts) / len(counts)) - 1


def options(name, **changes):
  """Returns the options of a router."""
  fields = {'num_experts': 4, 'num_selected_experts': 2, 'score': 'sigmoid', **changes}
  return registry.ROUTERS[name].options(**fields)


@functools.partial(jax.jit, static_argnames=('name', 'choice_options'))
def choose(name, logits, valid, bias, choice_options):
  """Calls a router with tokens that are its logits."""
  inputs = router_lib.RouterInputs(
    tokens=logits,
    valid=valid,
    token_ids=jnp.zeros(valid.shape, jnp.int32),
    positions=jnp.zeros(valid.shape, jnp.int32),
    keys=jax.random.split(jax.random.key(0), len(valid)),
  )
  params = {'router': jnp.eye(choice_options.num_experts)}
  return registry.ROUTERS[name].choose(params, {'bias': bias}, inputs, choice_options)


def sums_of(choice, valid, num_scopes=1):
  """Returns the sums of a layer: `num_scopes` has the groups in as many scopes."""
  valid = jnp.asarray(valid)
  keys = jax.random.split(jax.random.key(0), len(valid))
  made = plan_lib.make_plan(choice, valid, keys, capacity=1)
  scope = jnp.arange(len(valid)) * num_scopes // len(valid)
  return stats.router_sums(choice, made, valid, scope[:, None], num_scopes)


@functools.partial(jax.jit, static_argnames=('name', 'choice_options', 'num_steps'))
def trajectory(name, logits, valid, choice_options, num_steps):
  """Routes one batch again and again; returns the biases after each step and the counts in it.

  The sums come without scopes, as a router's `update` gets them.
  """
  router = registry.ROUTERS[name]

  def step(state, _):
    choice = choose(name, logits, valid, state['bias'], choice_options)
    sums = sums_of(choice, valid)
    scopeless = {
      field: jnp.sum(getattr(sums, field), axis=0)
      for field in ('tokens', 'tokens_per_expert', 'prob_sum')
    }
    state = router.update(state, sums._replace(**scopeless), choice_options)
    return state, (state['bias'], scopeless['tokens_per_expert'])

  start = router.state(choice_options, choice_options.num_experts, 1)
  return jax.lax.scan(step, start, None, length=num_steps)[1]


def skewed_logits(num_tokens=512, num_experts=8, seed=0):
  """Returns one group whose later experts are better liked by everyone."""
  rng = np.random.default_rng(seed)
  offset = np.linspace(-1, 1, num_experts)
  return (rng.normal(size=(1, num_tokens, num_experts)) + offset).astype(np.float32)


def random_case(shape=(2, 6, 4), seed=0):
  """Returns logits, valid and a bias without ties."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=shape).astype(np.float32)
  valid = rng.random(shape[:2]) < 0.7
  return logits, valid, (0.3 * rng.normal(size=shape[-1])).astype(np.float32)


@st.composite
def cases(draw, shapes):
  """Draws (logits, valid, bias) of a shape (G, S, E): ties and one bias, or neither."""
  group, size, num_experts = shape = draw(st.sampled_from(shapes))
  bits = draw(st.lists(st.booleans(), min_size=group * size, max_size=group * size))
  valid = np.array(bits).reshape(group, size)
  if draw(st.booleans()):
    # Non-negative: sigmoid(1) + sigmoid(-1) would tie with 2 sigmoid(0), but for rounding.
    width = group * size * num_experts
    values = draw(st.lists(st.integers(0, 3), min_size=width, max_size=width))
    bias = np.full(num_experts, draw(st.sampled_from([1.0, -1.0])), np.float32)
    return np.array(values, np.float32).reshape(shape), valid, bias
  logits, _, bias = random_case(shape, draw(st.integers(0, 50)))
  return logits, valid, bias + np.float32(draw(st.sampled_from([0.0, -2.0])))


# Of [1, 4, 4]: what divides by zero or overflows if anything does.
DEGENERATE = {
  'equal': (np.zeros((1, 4, 4)), np.ones((1, 4), bool)),
  'collapse': (np.tile([-40.0, 40, -40, -40], (1, 4, 1)), np.ones((1, 4), bool)),
  'all low': (np.full((1, 4, 4), -200.0), np.ones((1, 4), bool)),
  'balance': (np.eye(4)[None], np.ones((1, 4), bool)),
  'padding': (np.eye(4)[None], np.zeros((1, 4), bool)),
}


def assert_finite(name, logits, valid, choice_options):
  """Checks the choice, its sums, the router's loss, and the gradient of all of it."""
  router = registry.ROUTERS[name]
  bias = router.state(choice_options, choice_options.num_experts, 1)['bias']

  def total(z):
    choice = choose(name, z, valid, bias, choice_options)
    value = jnp.sum(choice.gates) + jnp.sum(choice.router_probs)
    if router.loss is not None:
      value += router.loss(sums_of(choice, valid), {'bias': bias}, choice_options)
    return value, choice

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  (value, choice), gradient = run(jnp.asarray(logits, jnp.float32))
  for array in (value, gradient, choice.gates, choice.router_probs, *choice.sums.values()):
    assert np.isfinite(array).all()
  index = np.sort(choice.expert_index, axis=-1)
  assert index.min() >= 0
  assert index.max() < choice_options.num_experts
  assert (np.diff(index, axis=-1) > 0).all()


def assert_blind_to_padding(name, choice_options, logits, valid, bias):
  """Checks that no valid token and no sum changes with the tokens of padding."""
  other = np.where(valid[..., None], logits, 5.0 - 3 * logits)
  assert not np.array_equal(other, logits)
  one, two = (choose(name, z, valid, bias, choice_options) for z in (logits, other))
  for field in ('expert_index', 'gates', 'chosen', 'router_probs'):
    np.testing.assert_array_equal(getattr(one, field)[valid], getattr(two, field)[valid])
  for key, value in one.sums.items():
    np.testing.assert_array_equal(value, two.sums[key])


def assert_causal(name, choice_options):
  """Checks that no token's choice changes with later tokens of its group."""
  logits, _, bias = random_case((1, 8, 4), seed=3)
  valid = np.ones((1, 8), bool)
  one = choose(name, logits, valid, bias, choice_options)
  for place in range(1, 8):
    other = logits.copy()
    other[:, place:] = -2 * other[:, place:]
    two = choose(name, other, valid, bias, choice_options)
    for field in ('expert_index', 'gates', 'chosen'):
      before, after = getattr(one, field), getattr(two, field)
      np.testing.assert_array_equal(before[:, :place], after[:, :place])
    assert not np.array_equal(one.gates[:, place:], two.gates[:, place:])


def assert_indices_in_range_of_non_finite_logits(name, choice_options):
  logits, _, bias = random_case((1, 8, 4))
  logits[0, 0], logits[0, 1], logits[0, 2] = np.nan, np.inf, -np.inf
  logits[0, 3, 1], logits[0, 4, 2], logits[0, 5, 3] = np.nan, np.inf, -np.inf
  index = choose(name, logits, np.ones((1, 8), bool), bias, choice_options).expert_index
  assert index.min() >= 0
  assert index.max() < 4


def replace(choice_options, **changes):
  return dataclasses.replace(choice_options, **changes)
