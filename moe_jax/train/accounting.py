"""Parameters and floating-point operations of a config, from the shapes of its parameters."""

import copy
import math

import ml_collections

from moe_jax import config as config_lib
from moe_jax.models import task as task_lib
from moe_jax.models.build import build_task
from moe_jax.models.task import Task
from moe_jax.parallel.mesh import make_mesh


def parameter_counts(config: ml_collections.ConfigDict, vocab_size: int) -> dict[str, int]:
  """Returns the parameters of the model: in `total`, and those one token passes, in `active`."""
  return task_lib.parameter_counts(_task(config, vocab_size))


def training_flops_per_token(config: ml_collections.ConfigDict, vocab_size: int) -> int:
  """Returns multiply-adds x 2 of a token's forward and backward pass; see `Task`."""
  return _task(config, vocab_size).flops_per_token(config.data.sequence_length)


def _task(config: ml_collections.ConfigDict, vocab_size: int) -> Task:
  """Returns the task on one device: shapes depend neither on the mesh nor on the exchange."""
  config = copy.deepcopy(config)
  config.moe.exchange = 'padded'
  return build_task(config, make_mesh(1, 1), vocab_size, 'eval')


def computed_flops_per_token(config: ml_collections.ConfigDict, vocab_size: int) -> float:
  """Returns multiply-adds x 2 of a token's forward pass as experts compute it, empty slots too.

  A third of `training_flops_per_token`, and the slots of all experts, E * C for a routing group of
  S tokens, where they are more than the S * K that tokens select. Time is in proportion to this:
  without drops (C = S) 64 experts compute 64 slots for each token. The dropless dispatcher computes
  only what tokens select.
  """
  moe = config.moe
  flops = training_flops_per_token(config, vocab_size) / 3
  if not moe.num_experts or not config_lib.limits_slots(moe):
    return flops
  tokens = config.data.sequence_length * moe.group_size
  slots = moe.num_experts * config_lib.training_capacity(config) / tokens
  task = _task(config, vocab_size)
  empty = max(0.0, slots - task_lib.num_passed_experts(task))
  one_expert = task_lib.expert_params(task) // moe.num_experts
  return flops + 2 * empty * one_expert


def tokens_per_expert(config: ml_collections.ConfigDict) -> float:
  """Returns the tokens an expert gets from one routing group under perfect balance."""
  moe = config.moe
  tokens = config.data.sequence_length * moe.group_size
  return tokens * moe.num_selected_experts / moe.num_experts


def random_drop_share(config: ml_collections.ConfigDict, capacity: int) -> float:
  """Returns the drop share of uniformly random routing: the floor to compare drops with.

  With S tokens that each select K of E experts, an expert's count is binomial(S, K/E); the drop
  share is E[max(0, count - C)] / (S K / E).
  """
  moe = config.moe
  tokens = config.data.sequence_length * moe.group_size
  return _mean_excess(tokens, moe.num_selected_experts / moe.num_experts, capacity) / (
    tokens * moe.num_selected_experts / moe.num_experts
  )


def _mean_excess(trials: int, probability: float, capacity: int) -> float:
  """E[max(0, X - capacity)] for X binomial, by the ratio of neighbouring terms in logs."""
  if probability >= 1:
    return float(max(0, trials - capacity))
  log_p, log_q = math.log(probability), math.log1p(-probability)
  excess = 0.0
  for count in range(capacity + 1, trials + 1):
    log_choose = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    excess += (count - capacity) * math.exp(log_choose + count * log_p + (trials - count) * log_q)
  return excess
