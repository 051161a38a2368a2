"""The state of training: its arrays, where each lies on the mesh, and updates without gradient."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int64

from moe_jax import routing
from moe_jax.models.task import Task
from moe_jax.parallel.sharding import leading_dims_sharding, named_shardings, replicated

# Tracing a model takes a second or more. What follows from task and optimizer is remembered for the
# trials of a sweep, and for a run that is restored, evaluated and trained on in one process.
_REMEMBERED = 8


class TrainState(NamedTuple):
  """Everything that a step changes. Random numbers are drawn only from (seed, step).

  Attributes:
    step: optimizer steps done.
    params: float32.
    opt_state: of the Optax chain.
    router_state: what routers carry from step to step without a gradient; {} for most.
    average_load: `experts` [L, E]: the moving average over steps, from 0, of each expert's share of
      the assignments before any drop; only for metrics. {} for a dense task.
    seed: what every random number of the run is drawn from.
  """

  step: Int[Array, '']
  params: Any
  opt_state: Any
  router_state: Any
  average_load: Any
  seed: Int[Array, '']


def init_params(task: Task, seed: Int[Array, '']) -> Any:
  """Returns new parameters; the same numbers on any mesh."""
  return nn.unbox(task.init(jax.random.key(seed)))


@functools.lru_cache(maxsize=_REMEMBERED)
def params_shardings(task: Task) -> Any:
  """Returns a sharding for each parameter, from its logical dimensions and the table of rules."""
  boxed = jax.eval_shape(lambda: task.init(jax.random.key(0)))
  return named_shardings(task.mesh, nn.get_partition_spec(boxed))


@functools.lru_cache(maxsize=_REMEMBERED)
def state_shardings(task: Task, optimizer: optax.GradientTransformation) -> Any:
  """Returns a sharding for each array of the state.

  Optimizer statistics lie where their parameter lies, Adafactor's factors by the dimensions that
  they share with it: those of layers and experts. Counters are copied to every device.
  """
  everywhere = replicated(task.mesh)
  param_shardings = params_shardings(task)
  params = jax.eval_shape(lambda: init_params(task, jnp.zeros((), jnp.int32)))
  opt_state = jax.eval_shape(optimizer.init, params)

  def statistic_sharding(statistic, param, sharding):
    if isinstance(statistic, optax.MaskedNode):
      return statistic
    if statistic.shape == param.shape:
      return sharding
    # The dimensions in front that both have; where none is split, this is `everywhere`.
    pairs = zip(statistic.shape[:-1], param.shape[:-2], strict=False)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return leading_dims_sharding(sharding, shared)

  opt_shardings = optax.tree_utils.tree_map_params(
    optimizer,
    statistic_sharding,
    opt_state,
    params,
    param_shardings,
    transform_non_params=lambda _: everywhere,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  router_shardings = jax.tree.map(
    lambda _: everywhere, jax.eval_shape(lambda: task.init_router_state())
  )
  shardings: tuple[Any, ...] = (
    everywhere,
    param_shardings,
    opt_shardings,
    router_shardings,
    jax.tree.map(lambda _: everywhere, jax.eval_shape(lambda: init_average_load(task))),
    everywhere,
  )
  return TrainState(*shardings)


def init_state(task: Task, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """Returns the state before the first step, each array made on the devices that hold it."""
  return make_init(task, optimizer)(jnp.asarray(seed, jnp.int32))


@functools.lru_cache(maxsize=_REMEMBERED)
def make_init(
  task: Task, optimizer: optax.GradientTransformation
) -> Callable[[Int[Array, '']], TrainState]:
  """Returns the compiled seed -> state before the first step, for several seeds."""
  make = functools.partial(_new_state, task, optimizer)
  return jax.jit(make, out_shardings=state_shardings(task, optimizer))


def _new_state(
  task: Task, optimizer: optax.GradientTransformation, seed: Int[Array, '']
) -> TrainState:
  params = init_params(task, seed)
  state = task.init_router_state()
  opt_state, average_load = optimizer.init(params), init_average_load(task)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, state, average_load, seed)


def init_average_load(task: Task) -> dict[str, Float[Array, 'L E']]:
  """Returns the average load before the first step, of no experts yet."""
  moe = task.moe
  if moe is None:
    return {}
  return {'experts': jnp.zeros((task.num_moe_layers, moe.num_experts))}


def with_token_counts(
  state: TrainState, task: Task, token_counts: Callable[[], Int64[np.ndarray, 'V']]
) -> TrainState:
  """Returns a new state whose routers have the count of each token in the training text.

  Args:
    state: before the first step.
    task: of the state.
    token_counts: called if the router needs them.
  """
  moe = task.moe
  from_counts = routing.ROUTERS[moe.router].from_counts if moe else None
  if moe is None or from_counts is None:
    return state
  first = {
    name: jnp.asarray(value[0]) for name, value in jax.device_get(state.router_state).items()
  }
  new = from_counts(first, token_counts(), moe.choice)
  layers = jax.tree.leaves(state.router_state)[0].shape[0]
  router_state = {
    name: jax.device_put(np.repeat(np.asarray(value)[None], layers, axis=0), replicated(task.mesh))
    for name, value in new.items()
  }
  return state._replace(router_state=router_state)


@functools.lru_cache(maxsize=_REMEMBERED)
def abstract_state(task: Task, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
  make = functools.partial(_new_state, task, optimizer)
  shapes = jax.eval_shape(make, jax.ShapeDtypeStruct((), jnp.int32))
  return with_shardings(shapes, state_shardings(task, optimizer))


def with_shardings(shapes: Any, shardings: Any) -> Any:
  """Returns the shapes, each with its sharding."""
  return jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def update_routers(
  task: Task,
  router_state: dict[str, Array],
  sums: routing.RouterSums | None,
  bias_rate: Float[Array, ''],
) -> dict[str, Array]:
  """Returns the routers' state after a step, from the sums over the whole batch."""
  moe = task.moe
  if sums is None or moe is None:
    return router_state
  update = routing.ROUTERS[moe.router].update
  if update is None:
    return router_state
  options = moe.choice
  if isinstance(options, routing.BiasRateOptions):
    options = dataclasses.replace(options, bias_rate=bias_rate)
  return jax.vmap(lambda state, sums: update(state, sums, options))(
    router_state, jax.lax.stop_gradient(sums)
  )


def update_average_load(
  average: dict[str, Float[Array, 'L E']], sums: routing.RouterSums | None, decay: float
) -> dict[str, Float[Array, 'L E']]:
  """Returns the moving average of the load after a step, as in `TrainState`."""
  if sums is None:
    return average
  counts = sums.tokens_per_expert
  load = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
  return {'experts': decay * average['experts'] + (1 - decay) * load}


def over_scopes(sums: routing.RouterSums) -> routing.RouterSums:
  """Adds up the balance scopes; leaves keep their leading dimension of layers."""
  return sums._replace(
    tokens=jnp.sum(sums.tokens, axis=1),
    tokens_per_expert=jnp.sum(sums.tokens_per_expert, axis=1),
    prob_sum=jnp.sum(sums.prob_sum, axis=1),
  )
