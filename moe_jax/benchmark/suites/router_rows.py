"""The cost of selecting experts and planning, as a share of the experts' matmuls."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.benchmark.harness.cases import load_statistics
from moe_jax.benchmark.harness.timing import Compiled, compile_arm, is_invalid, measure, ratio
from moe_jax.experts import activate, hidden_dim
from moe_jax.routing.router import Mixture

VOCAB_SIZE = 32_768


def options_of(
  name: str, num_experts: int, num_selected: int, capacity: int, router_dtype: str = 'float32'
):
  """Returns the options of a router, with what its file gives as an example.

  Raises:
    ValueError: where it cannot have these.
  """
  router = routing.ROUTERS[name]
  own = {'router_dtype': router_dtype} if 'router_dtype' in router.reads else {}
  options = router.options(
    **{
      'num_experts': num_experts,
      'num_selected_experts': num_selected,
      'capacity': capacity,
      'renormalize': 'none',
      **own,
      **router.options.example(num_experts, num_selected),
    }
  )
  if router.allowed(options):
    raise ValueError(f'{name}: {router.allowed(options)}')
  return options


def rows(
  *,
  num_experts: list[int],
  num_tokens: int,
  embed_dim: int,
  mlp_dim: int,
  num_selected_experts: int,
  capacity_factor: float,
  dtype: str,
  routers: list[str],
  router_dtype: str,
  rounds: int,
  seed: int,
) -> Iterator[dict[str, Any]]:
  """Measures each router, forward, on one device; all tokens are one routing group.

  Choice and plan are timed. The reference is the dense layer of the same active
  FLOPs (K * F hidden units, SwiGLU, of `dtype`, forward), the least that the experts' matmuls cost
  at any E.

  Yields:
    num_experts, router, router_dtype, and either disagreement (with another `router_dtype` than
    float32: the share of assignments that differ), share (time of choice and plan / time of the
    matmuls), null, void, the load (`cases.load_statistics`; None where slots are mixtures of
    tokens), compile_seconds and temporary_bytes; or not_measured, the reason.
  """
  key = jax.random.key(seed)
  tokens = jax.random.normal(key, (1, num_tokens, embed_dim), jnp.float32)
  reference = _reference(tokens, num_selected_experts, mlp_dim, dtype=dtype, key=key)
  for experts in num_experts:
    capacity = routing.expert_capacity(num_tokens, experts, num_selected_experts, capacity_factor)
    arms, reasons = {}, {}
    disagreement: dict[str, float | None] = {}
    for name in routers:
      try:
        options = options_of(name, experts, num_selected_experts, capacity, router_dtype)
        arms[name] = _arm(name, options, tokens, seed)
        if router_dtype != 'float32':
          # Without a matrix there is nothing to round.
          reads = 'router_dtype' in routing.ROUTERS[name].reads
          exact = dataclasses.replace(options, router_dtype='float32') if reads else options
          disagreement[name] = _disagreement(arms[name], _arm(name, exact, tokens, seed))
      except ValueError as error:
        reasons[name] = str(error)
    seconds = measure(reference | {name: arm.call for name, arm in arms.items()}, rounds, seed)
    null = ratio(seconds['matmuls'], seconds['copy'])
    for name in routers:
      row: dict[str, Any] = {'num_experts': experts, 'router': name, 'router_dtype': router_dtype}
      if name in reasons:
        yield row | {'not_measured': reasons[name]}
        continue
      share = ratio(seconds[name], seconds['matmuls'])
      row |= {'share': share._asdict(), 'null': null._asdict(), 'void': is_invalid(null)}
      yield row | {
        **_load(arms[name].call()),
        'disagreement': disagreement.get(name),
        'compile_seconds': arms[name].compile_seconds,
        'temporary_bytes': arms[name].temporary_bytes,
      }


def _reference(
  tokens: jax.Array, num_selected_experts: int, mlp_dim: int, *, dtype: str, key: jax.Array
) -> dict[str, Callable[[], Any]]:
  """Returns calls of a dense layer of K * F hidden units, and of its copy, the A/A control."""
  embed_dim = tokens.shape[-1]
  columns = hidden_dim(num_selected_experts * mlp_dim, 'swiglu')
  w_in = jax.random.normal(key, (embed_dim, columns)) * embed_dim**-0.5
  w_out = jax.random.normal(key, (num_selected_experts * mlp_dim, embed_dim)) * mlp_dim**-0.5

  def matmuls(tokens, w_in, w_out):
    return activate(tokens @ w_in, 'swiglu') @ w_out

  return {
    name: compile_arm(matmuls, *(a.astype(dtype) for a in (tokens, w_in, w_out))).call
    for name in ('matmuls', 'copy')
  }


def _load(result: Any) -> dict[str, float | None]:
  """Returns the load that follows from a router's choice and plan."""
  if isinstance(result, Mixture):
    return dict.fromkeys(('tokens_per_expert', 'max_load', 'drop_share', 'padding'))
  _, plan = result
  num_experts = plan.source_index.shape[1]
  selected = np.asarray(plan.expert_index)[np.asarray(plan.requested)]
  load = np.bincount(selected, minlength=num_experts)
  return load_statistics(load, int(np.sum(plan.keep)), plan.source_index.size)


def _disagreement(one: Compiled, other: Compiled) -> float | None:
  """Returns the share of assignments that only one of two makes; None for mixtures of tokens."""
  results = one.call(), other.call()
  if isinstance(results[0], Mixture):
    return None
  selected = []
  for choice, plan in results:
    num_experts = plan.source_index.shape[1]
    index = np.where(np.asarray(plan.requested), np.asarray(choice.expert_index), num_experts)
    rows = np.zeros((*index.shape[:2], num_experts + 1), bool)
    np.put_along_axis(rows, index, True, axis=-1)
    selected.append(rows[..., :-1])
  shared = np.sum(selected[0] & selected[1])
  return float(1 - 2 * shared / max(np.sum(selected[0]) + np.sum(selected[1]), 1))


def _arm(name: str, options: routing.RouterOptions, tokens: jax.Array, seed: int) -> Compiled:
  """Returns a call that selects and plans once."""
  router = routing.ROUTERS[name]
  _, num_tokens, embed_dim = tokens.shape
  rng = np.random.default_rng(seed)
  params = {
    key: jnp.asarray(rng.normal(size=weight.shape) * (0.1 / embed_dim) ** 0.5, jnp.float32)
    for key, weight in router.params(options, embed_dim).items()
  }
  state = router.state(options, embed_dim, VOCAB_SIZE)
  ids = jnp.asarray(rng.integers(0, VOCAB_SIZE, (1, num_tokens)), jnp.int32)
  positions = jnp.arange(num_tokens, dtype=jnp.int32)[None]
  valid = jnp.ones((1, num_tokens), bool)
  capacity = num_tokens if router.keeps_all else options.capacity

  def plan(params, state, tokens, ids, keys):
    inputs = routing.RouterInputs(tokens, valid, ids, positions, keys)
    if router.mix is not None:
      return router.mix(params, state, inputs, options)
    choice = router.choose(params, state, inputs, options)
    return choice, routing.make_plan(choice, valid, keys, capacity=capacity)

  keys = jax.random.split(jax.random.key(seed), 1)
  return compile_arm(plan, params, state, tokens, ids, keys)
