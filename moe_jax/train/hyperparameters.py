"""The hyperparameters that are arguments of the compiled step, never constants of it.

Runs that differ in nothing else share one program, and can be trained as one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from moe_jax.train.objective import LossWeights, loss_weights

# The seed is one too: it is part of the state.
HYPERPARAMETER_FIELDS = (
  'train.seed',
  'optim.learning_rate',
  'moe.bias_rate',
  'moe.load_balancing_weight',
  'moe.router_z_weight',
  'moe.importance_weight',
  'moe.entropy_weight',
  'moe.device_balance_weight',
  'moe.router_loss_weight',
)


class Hyperparameters(NamedTuple):
  """Hyperparameters that a step receives besides state and batch.

  Attributes:
    learning_rate: the peak of the schedule.
    bias_rate: of routers with a bias.
    weights: of the auxiliary losses.
  """

  learning_rate: Float[Array, '']
  bias_rate: Float[Array, '']
  weights: LossWeights


def hyperparameter_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the fields of a config that may differ between runs of one program."""
  if config.optim.name == 'muon' and config.optim.adam_learning_rate:
    # The ratio of the two rates is a constant of the program.
    return tuple(field for field in HYPERPARAMETER_FIELDS if field != 'optim.learning_rate')
  return HYPERPARAMETER_FIELDS


def hyperparameters_of(config: ml_collections.ConfigDict) -> Hyperparameters:
  """Returns the hyperparameters of a config as arrays."""
  learning_rate, bias_rate = config.optim.learning_rate, config.moe.bias_rate
  return Hyperparameters(
    jnp.asarray(learning_rate, jnp.float32),
    jnp.asarray(bias_rate, jnp.float32),
    loss_weights(config),
  )
