"""Normalisation and weights of the losses, all in this file.

Cross-entropy is a sum over valid tokens divided by the valid tokens of the WHOLE batch, whatever
part of it is given; auxiliary losses are formed from the router's sums. So the parts of a batch add
up, over devices and micro-batches, and every metric is reported without its weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from moe_jax import routing
from moe_jax.layers.moe_options import MoeOptions


class LossWeights(NamedTuple):
  """Weights of the auxiliary losses: arguments of the compiled step, never constants of it."""

  load_balancing: Float[Array, '']
  router_z: Float[Array, '']
  importance: Float[Array, '']
  entropy: Float[Array, '']
  device_balance: Float[Array, '']
  router: Float[Array, '']


class AuxiliaryLosses(NamedTuple):
  """Unweighted auxiliary losses, one number for each MoE layer.

  `router` is the loss that the router itself defines, 0 for most.
  """

  load_balancing: Float[Array, 'L']
  router_z: Float[Array, 'L']
  importance: Float[Array, 'L']
  entropy: Float[Array, 'L']
  device_balance: Float[Array, 'L']
  router: Float[Array, 'L']


def loss_weights(config: ml_collections.ConfigDict) -> LossWeights:
  """Returns the weights of a config as arrays."""
  moe = config.moe
  return LossWeights(
    *(
      jnp.asarray(weight, jnp.float32)
      for weight in (
        moe.load_balancing_weight,
        moe.router_z_weight,
        moe.importance_weight,
        moe.entropy_weight,
        moe.device_balance_weight,
        moe.router_loss_weight,
      )
    )
  )


def auxiliary_losses(
  sums: routing.RouterSums, moe: MoeOptions, router_state: dict[str, Array]
) -> AuxiliaryLosses:
  """Returns the losses of each layer from its sums and the state of its router.

  They are formed per layer and never from sums pooled over layers: two layers that collapse onto
  different experts would balance each other.
  """
  own_loss = routing.ROUTERS[moe.router].loss
  own = jnp.zeros(sums.logsumexp_squared.shape)
  if own_loss is not None:
    own = jax.vmap(lambda sums, state: own_loss(sums, state, moe.choice))(sums, router_state)
  return AuxiliaryLosses(
    load_balancing=routing.load_balancing_value(
      sums, moe.num_selected_experts, moe.balance_normalization
    ),
    router_z=routing.router_z_loss(sums),
    importance=routing.importance_loss(sums),
    entropy=routing.entropy_loss(sums),
    device_balance=routing.device_balance_loss(
      sums, moe.num_selected_experts, moe.device_balance_parts
    ),
    router=own,
  )


def weighted_sum(
  losses: AuxiliaryLosses, weights: LossWeights, layer_reduction: str
) -> Float[Array, '']:
  """Returns the weighted auxiliary losses, mean or sum over layers, to add to the cross-entropy."""
  reduce = {'mean': jnp.mean, 'sum': jnp.sum}[layer_reduction]
  return sum(
    (weight * reduce(loss) for weight, loss in zip(weights, losses, strict=True)),
    jnp.zeros((), jnp.float32),
  )
