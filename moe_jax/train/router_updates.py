"""What a step changes without a gradient: the routers' state, and the average load."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import routing
from moe_jax.models.task import Task


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


def average_load(
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
