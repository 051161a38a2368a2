"""Shared tests of stateless token-choice routers: running one, and what all must pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from moe_jax.routing import plan as plan_lib
from moe_jax.routing import registry, stats
from moe_jax.routing.router import RouterInputs
from tests import oracle


def options(name, **changes):
  """Returns the options of a router."""
  fields = {'num_experts': 4, 'num_selected_experts': 2, **changes}
  return registry.ROUTERS[name].options(**fields)


def keys(num_groups, seed=0):
  return jax.random.split(jax.random.key(seed), num_groups)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(name, options, params, tokens, valid, keys):
  ids = jnp.zeros(valid.shape, jnp.int32)
  inputs = RouterInputs(tokens, valid, ids, ids, keys)
  return registry.ROUTERS[name].choose(params, {}, inputs, options)


def choose(name, options, params, tokens, valid=None, seed=0):
  """Returns the choice; params and tokens in float64 are rounded to float32 first."""
  tokens = jnp.asarray(tokens, jnp.float32)
  valid = np.ones(tokens.shape[:2], bool) if valid is None else valid
  params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
  return _choose(name, options, params, tokens, jnp.asarray(valid), keys(len(tokens), seed))


def sums_of(choice, valid, keys):
  """Returns the sums, one balance scope per group, with most assignments dropped."""
  made = plan_lib.make_plan(choice, valid, keys, capacity=1, renormalize='none')
  return stats.router_sums(choice, made, valid, jnp.arange(len(valid))[:, None], len(valid))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _objectives(name, options, params, tokens, valid, keys, cotangent):
  choice = _choose(name, options, params, tokens, valid, keys)
  gates = jnp.where(valid[..., None], choice.gates, 0) * cotangent
  probs = jnp.where(valid[..., None], choice.router_probs, 0)
  own_loss = registry.ROUTERS[name].loss
  loss = jnp.float32(0)
  if own_loss is not None:
    loss = own_loss(sums_of(choice, valid, keys), {}, options)
  return jnp.stack([jnp.sum(gates), jnp.sum(jnp.square(probs)), loss])


_jacobian = jax.jit(jax.jacrev(_objectives, argnums=2), static_argnums=(0, 1))


def cotangent(shape):
  return np.random.default_rng(7).normal(size=shape)


def objectives(name, options, params, tokens, valid, seed=0, jacobian=False):
  """Returns sum(c gates), sum(probs^2) and the router's loss, or their gradients by parameter."""
  tokens = jnp.asarray(tokens, jnp.float32)
  params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
  made = jax.eval_shape(lambda: choose(name, options, params, tokens))
  weight = cotangent(made.gates.shape)
  function = _jacobian if jacobian else _objectives
  return function(
    name,
    options,
    params,
    tokens,
    jnp.asarray(valid),
    keys(len(tokens), seed),
    jnp.asarray(weight, jnp.float32),
  )


def check_gradients(name, options, params, tokens, valid, expected, rtol=2e-4):
  """Compares the gradients of all parameters with slopes of the oracle's objectives.

  Args:
    name: of the router.
    options: of the router.
    params: float32 numbers.
    tokens: float32 numbers.
    valid: False for padding.
    expected: params -> (gates, probs, loss) in float64; `objective_values` makes the three.
    rtol: of each slope.
  """
  gradient = objectives(name, options, params, tokens, valid, jacobian=True)
  rng = np.random.default_rng(3)
  for param in params:
    direction = rng.normal(size=params[param].shape)

    def along(value, param=param):
      return expected({**params, param: value})

    slope = oracle.central_difference(along, params[param], direction)
    got = np.sum(np.asarray(gradient[param]) * direction, axis=(1, 2))
    np.testing.assert_allclose(got, slope, rtol=rtol, atol=2e-5, err_msg=param)
    yield param, slope


def objective_values(made, valid, loss):
  """Returns the oracle's three objectives as one array."""
  weight = cotangent(made['gates'].shape)
  return np.array(
    [
      np.sum(made['gates'][valid] * weight[valid]),
      np.sum(made['probs'][valid] ** 2),
      loss,
    ]
  )


def check_finite(name, options, params, tokens, valid):
  """Checks values and gradients; returns the values."""
  values = objectives(name, options, params, tokens, valid)
  assert np.isfinite(values).all()
  for gradient in objectives(name, options, params, tokens, valid, jacobian=True).values():
    assert np.isfinite(gradient).all()
  return np.asarray(values)


def check_degenerate(name, options, params, embed_dim):
  """All logits equal, one expert far ahead (both ways), one token, nothing but padding."""
  ones, some = np.ones((2, 3), bool), np.array([[True, False, False], [False, False, False]])
  tokens = np.random.default_rng(5).normal(size=(2, 3, embed_dim))
  zeros = {param: np.zeros_like(value) for param, value in params.items()}
  check_finite(name, options, zeros, tokens, ones)
  huge = {
    param: np.where(np.arange(v.shape[1]) == 1, 300.0, 0) + 0 * v for param, v in params.items()
  }
  check_finite(name, options, huge, np.abs(tokens), ones)
  check_finite(name, options, huge, -np.abs(tokens), ones)
  check_finite(name, options, params, tokens, some)
  values = check_finite(name, options, params, tokens, ~ones)
  np.testing.assert_array_equal(values, 0)
  choice = choose(name, options, params, tokens * np.nan, ones)
  assert (choice.expert_index >= 0).all()
  assert (choice.expert_index < options.num_experts).all()


def check_padding(name, options, params, tokens):
  """Other tokens in the places of padding change nothing."""
  valid = np.ones(tokens.shape[:2], bool)
  valid[0, 1::2] = False
  valid[-1, 0] = False
  other = np.where(valid[..., None], tokens, 100 - 7 * tokens)
  one = choose(name, options, params, tokens, valid)
  two = choose(name, options, params, other, valid)
  for field in ('expert_index', 'gates', 'chosen', 'router_probs', 'router_logits'):
    first, second = np.asarray(getattr(one, field)), np.asarray(getattr(two, field))
    np.testing.assert_array_equal(first[valid], second[valid])
  # Something did change, so that the test can fail.
  assert not np.array_equal(one.router_logits, two.router_logits)
  for sums in one.sums:
    np.testing.assert_array_equal(one.sums[sums], two.sums[sums])
  np.testing.assert_array_equal(
    objectives(name, options, params, tokens, valid),
    objectives(name, options, params, other, valid),
  )


def check_causal(name, options, params, tokens):
  """Later tokens change nothing for earlier ones, and each group is by itself."""
  one = choose(name, options, params, tokens)
  for place in range(1, tokens.shape[1]):
    other = tokens.copy()
    other[:, place:] = 3 - 2 * other[:, place:]
    two = choose(name, options, params, other)
    for field in ('expert_index', 'gates', 'chosen', 'router_probs'):
      first, second = getattr(one, field), getattr(two, field)
      what = f'{name}: {field} before position {place}, with other tokens from there on'
      np.testing.assert_array_equal(first[:, :place], second[:, :place], err_msg=what)
    assert not np.array_equal(one.router_probs, two.router_probs)
  alone = _choose(
    name,
    options,
    {param: jnp.asarray(value, jnp.float32) for param, value in params.items()},
    jnp.asarray(tokens[1:], jnp.float32),
    jnp.ones((len(tokens) - 1, tokens.shape[1]), bool),
    keys(len(tokens))[1:],
  )
  np.testing.assert_array_equal(alone.expert_index, one.expert_index[1:])
  np.testing.assert_array_equal(alone.chosen, one.chosen[1:])


@st.composite
def cases(draw, shapes, width):
  """Tokens from a coarse grid, so that ties are the rule, with padding; and (E, K).

  Args:
    draw: of Hypothesis.
    shapes: (G, S, E, K) to take one of; few, as each is compiled.
    width: E -> width of a token.
  """
  num_groups, size, num_experts, num_selected = draw(st.sampled_from(shapes))
  values = st.integers(-3, 3) if draw(st.booleans()) else st.integers(0, 1)
  count = num_groups * size * width(num_experts)
  tokens = np.array(draw(st.lists(values, min_size=count, max_size=count)), np.float64) / 2
  valid = draw(st.lists(st.booleans(), min_size=num_groups * size, max_size=num_groups * size))
  return (
    tokens.reshape(num_groups, size, -1),
    np.array(valid).reshape(num_groups, size),
    num_experts,
    num_selected,
  )


def compare(choice, made, valid, rtol=5e-6):
  """Compares the choice with the oracle's on valid tokens, and the sums."""
  for field, name in (('expert_index', 'index'), ('chosen', 'chosen')):
    np.testing.assert_array_equal(np.asarray(getattr(choice, field))[valid], made[name][valid])
  for field, name in (('gates', 'gates'), ('router_probs', 'probs'), ('router_logits', 'logits')):
    got = np.asarray(getattr(choice, field))[valid]
    np.testing.assert_allclose(got, made[name][valid], rtol=rtol, atol=1e-7, err_msg=field)
  assert set(choice.sums) == set(made['sums'])
  for name, value in made['sums'].items():
    np.testing.assert_allclose(choice.sums[name], value, rtol=rtol, atol=1e-5, err_msg=name)


def empty(tokens, num_experts, num_assignments):
  """Returns arrays for an oracle to fill."""
  shape = tokens.shape[:2]
  return {
    'index': np.zeros((*shape, num_assignments), int),
    'gates': np.zeros((*shape, num_assignments)),
    'chosen': np.ones((*shape, num_assignments), bool),
    'probs': np.zeros((*shape, num_experts)),
    'logits': np.zeros((*shape, num_experts)),
    'sums': {},
  }


def squared_variation(values):
  """Population variance over squared mean, the latter at least 1e-10."""
  mean = sum(values) / len(values)
  variance = sum((v - mean) ** 2 for v in values) / len(values)
  return variance / max(mean**2, 1e-10)
