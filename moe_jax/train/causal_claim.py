"""A router's claim that it is causal, checked once before a run: a redrawn future moves no past.

Only router and plan are run, on a routing group of random tokens, in training: selection and drops
are all of a MoE layer that could depend on other tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from moe_jax import config as config_lib
from moe_jax import routing
from moe_jax.errors import UserError

# Positions of each sequence, and from which on the tokens are drawn again, four times each.
LENGTH = 16
REDRAWN_FROM = (1, 8, 15)
# Of a gate, as a share of the largest: the rounding of sums in another order.
TOLERANCE = 1e-5


def check_causal_claim(config: ml_collections.ConfigDict, vocab_size: int) -> str:
  """Checks a config of which `config.is_causal`, and so the manifest, says that it is causal.

  That is every causal router under `moe.priority=token`, and under any priority where no slot is
  limited, as with `moe.dispatch=dropless`: the order matters only where tokens are dropped.
  Elsewhere another priority drops earlier tokens for later ones whatever the router does; nothing
  is claimed then, and there is nothing to check. Draws from keys of its own and changes nothing of
  the run. `train.check_causal=False` leaves it out.

  Args:
    config: validated.
    vocab_size: of the tokenizer.

  Returns:
    A line on whether it was checked, or why not.

  Raises:
    UserError: if later tokens decide where an earlier one goes, or with what weight.
  """
  reason = _why_not_checked(config)
  if reason:
    return f'causality: not checked: {reason}'
  moe = config.moe
  router = routing.ROUTERS[moe.router]
  size = min(moe.group_size, 4)
  tokens = LENGTH * size
  options = dataclasses.replace(
    config_lib.router_options(config), training=True, group_size=size, capacity=tokens
  )
  if config_lib.limits_slots(moe) and not router.keeps_all:
    numbers = moe.num_experts, moe.num_selected_experts, moe.capacity_factor
    capacity = min(tokens, routing.expert_capacity(tokens, *numbers))
    options = dataclasses.replace(options, capacity=capacity)
  how = config.model.embed_dim, vocab_size, moe.priority
  moved = _what_moved(router.name, router.choose, options, *how)
  if moved:
    raise UserError(
      'moe.router',
      moe.router,
      f'says that it is causal, but {moved}; set causal=False in its file, or '
      'train.check_causal=False',
    )
  return f'causality: checked: a redrawn future moves no past with moe.router={router.name}'


def _why_not_checked(config: ml_collections.ConfigDict) -> str:
  """Returns why there is nothing to check, '' if there is."""
  if not config.moe.num_experts:
    return 'a model without experts has no router'
  if not config.train.check_causal:
    return 'train.check_causal=False'
  field = config_lib.why_not_causal(config)
  return f'{field} is not causal, and nothing claims that it is' if field else ''


@functools.lru_cache(maxsize=8)
def _what_moved(
  name: str,
  choose: Any,
  options: routing.RouterOptions,
  embed_dim: int,
  vocab_size: int,
  priority: str,
) -> str:
  """Returns the part of the past that a redrawn future moves, '' if none."""
  router = dataclasses.replace(routing.ROUTERS[name], choose=choose)
  size = options.group_size
  keys = jax.random.split(jax.random.key(0), 5)
  weights = {
    key: jax.random.normal(jax.random.fold_in(keys[0], number), weight.shape)
    for number, (key, weight) in enumerate(router.params(options, embed_dim).items())
  }
  state = router.state(options, embed_dim, vocab_size)
  if router.from_counts is not None:
    state = router.from_counts(state, np.arange(vocab_size), options)
  shape = (1, LENGTH * size)

  @jax.jit
  def past(tokens, ids):
    valid = jnp.ones(shape, bool)
    positions = jnp.arange(shape[1], dtype=jnp.int32)[None] // size
    inputs = routing.RouterInputs(tokens, valid, ids, positions, keys[1:2])
    choice = router.choose(weights, state, inputs, options)
    plan = routing.make_plan(
      choice,
      valid,
      keys[2:3],
      capacity=options.capacity,
      priority=priority,
      renormalize=options.renormalize,
    )
    return (
      jnp.where(plan.requested, plan.expert_index, -1)[0],
      plan.keep[0],
      plan.combine_weights[0],
    )

  def draw(number):
    key = jax.random.fold_in(keys[3], number)
    tokens = jax.random.normal(key, (*shape, embed_dim))
    return tokens, jax.random.randint(key, shape, 0, vocab_size, jnp.int32)

  tokens, ids = draw(0)
  before = jax.device_get(past(tokens, ids))
  for number, start in enumerate(REDRAWN_FROM * 4, 1):
    other, other_ids = draw(number)
    kept = start * size
    after = jax.device_get(
      past(tokens.at[:, kept:].set(other[:, kept:]), ids.at[:, kept:].set(other_ids[:, kept:]))
    )
    for what, old, new in zip(('expert', 'slot', 'gate'), before, after, strict=True):
      change = np.abs(new[:kept].astype(np.float64) - old[:kept])
      bound = TOLERANCE * max(1.0, float(np.abs(old).max())) if what == 'gate' else 0.0
      if not change.max() <= bound:
        moved = int(np.argmax(change.max(axis=1))) // size
        by = f' by {change.max():.2g}' if what == 'gate' else ''
        return (
          f'with other tokens from position {start} on, the {what} of position {moved} changed{by}'
        )
  return ''
