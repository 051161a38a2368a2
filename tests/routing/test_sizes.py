"""Choosing and planning never make an array of tokens x experts x slots; the oracle does."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from moe_jax import config as schema
from moe_jax import dispatch, routing

TOKENS, WIDTH, VOCAB_SIZE = 4096, 8, 11
# Slots for each of 8 experts: many times K, E and D.
CAPACITY = 512


def largest_array(function, *arguments):
  """Returns the number of elements of the largest array anywhere in a function."""
  largest = 0
  waiting = [jax.make_jaxpr(function)(*arguments).jaxpr]
  while waiting:
    jaxpr = waiting.pop()
    for equation in jaxpr.eqns:
      sizes = [math.prod(getattr(out.aval, 'shape', ())) for out in equation.outvars]
      largest = max(largest, *sizes, 0)
      for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
          if isinstance(inner, core.ClosedJaxpr):
            waiting.append(inner.jaxpr)
          elif isinstance(inner, core.Jaxpr):
            waiting.append(inner)
  return largest


def inputs_of():
  places = jnp.zeros((1, TOKENS), jnp.int32)
  keys = jax.random.split(jax.random.key(0), 1)
  valid = jnp.ones((1, TOKENS), bool)
  return routing.RouterInputs(jnp.zeros((1, TOKENS, WIDTH)), valid, places, places, keys)


def planned(name, training):
  """Returns (function, arguments): choice, plan and sums of all tokens in one group."""
  router = routing.ROUTERS[name]
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  options = dataclasses.replace(schema.router_options(config), capacity=CAPACITY, training=training)
  capacity = TOKENS if router.keeps_all else CAPACITY
  weights = router.params(options, WIDTH)
  params = {key: jnp.zeros(weight.shape) for key, weight in weights.items()}
  state = router.state(options, WIDTH, VOCAB_SIZE)

  def run(params, state, inputs):
    choice = router.choose(params, state, inputs, options)
    plan = routing.make_plan(choice, inputs.valid, inputs.keys, capacity=capacity)
    scope = jnp.zeros((1, 1), jnp.int32)
    return choice, plan, routing.router_sums(choice, plan, inputs.valid, scope, 1)

  return run, (params, state, inputs_of())


@pytest.mark.parametrize('name', routing.ROUTERS)
@pytest.mark.parametrize('training', [True, False])
def test_no_array_of_tokens_by_experts_by_slots(name, training):
  function, arguments = planned(name, training)
  # At most tokens x experts x 8, with K, D and E of at most 8 each: 64 times fewer than with slots.
  assert largest_array(function, *arguments) <= TOKENS * 8 * 8


def test_control_the_oracle_of_dispatch_is_noticed():
  function, arguments = planned('top_k', True)
  inputs = arguments[-1]

  def run(*arguments):
    return dispatch.einsum.dispatch(inputs.tokens, function(*arguments)[1])

  assert largest_array(run, *arguments) >= TOKENS * 8 * CAPACITY
