"""From the sums of a step to metrics: numbers, and lists over MoE layers."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_jax import routing
from moe_jax.train.step import StepMetrics


def router_metrics(sums: routing.RouterSums, num_ranks: int = 1) -> dict[str, Any]:
  """Returns the router's metrics from sums over any number of batches.

  Args:
    sums: NumPy arrays, each with a leading dimension of MoE layers, summed over balance scopes.
    num_ranks: devices that the experts are split over.

  Returns:
    Lists over layers, except `router/drop_share`, the mean over layers:
      router/load: share of assignments of each expert before any drop [L][E].
      router/load_kept: share of assignments each expert kept, of all assignments [L][E].
      router/drop_share_per_layer: share of assignments that got no slot.
      router/token_drop_share: share of tokens that no expert works on: they lost all their K
        experts, or selected none (expert choice, ReMoE, null experts).
      router/max_violation: largest load over mean load, minus 1 (0 at balance): MaxVio of the batch
        in training, of all batches together in evaluation.
      router/load_cv: deviation of the load over its mean (0 at balance).
      router/rank_imbalance: the same as max_violation, of devices of the expert axis; the one
        metric that is about the mesh.
      router/padding_waste: share of slots that stayed empty.
      router/largest_logsumexp: of any token.
      router/load_entropy: entropy of the load over log E (1 at balance).
      router/dead_experts: experts without any assignment.
      router/entropy: mean entropy of a token's router probabilities, in nats.
      router/top_prob: mean of the largest router probability.
  """
  tokens = np.maximum(np.asarray(sums.tokens, np.float64), 1)[:, None]
  selected = np.asarray(sums.tokens_per_expert, np.float64)
  kept = np.asarray(sums.kept_per_expert, np.float64)
  num_experts = selected.shape[-1]
  # Over the assignments requested, not K tokens: some routers let a token select more or fewer.
  requests = np.maximum(np.sum(selected, -1, keepdims=True), 1)
  load, load_kept = selected / requests, kept / requests
  drop = 1 - np.sum(kept, -1) / requests[:, 0]
  entropy = -np.sum(load * np.log(np.maximum(load, 1e-300)), -1)
  per_token = tokens[:, 0]
  by_rank = np.sum(load.reshape(len(load), num_ranks, -1), -1)
  return {
    'router/drop_share': float(np.mean(drop)),
    'router/load': load.tolist(),
    'router/load_kept': load_kept.tolist(),
    'router/drop_share_per_layer': drop.tolist(),
    'router/token_drop_share': (np.asarray(sums.tokens_all_dropped) / per_token).tolist(),
    'router/max_violation': (np.max(load, -1) * num_experts - 1).tolist(),
    'router/load_cv': np.sqrt(np.mean(np.square(load * num_experts - 1), -1)).tolist(),
    'router/rank_imbalance': (np.max(by_rank, -1) * num_ranks - 1).tolist(),
    'router/padding_waste': (1 - np.sum(kept, -1) / np.asarray(sums.slots)).tolist(),
    'router/largest_logsumexp': np.asarray(sums.logsumexp_max, np.float64).tolist(),
    'router/load_entropy': (
      (entropy / math.log(num_experts)).tolist()
      if num_experts > 1
      else np.ones_like(entropy).tolist()
    ),
    'router/dead_experts': np.sum(selected == 0, -1).tolist(),
    'router/entropy': (np.asarray(sums.entropy) / per_token).tolist(),
    'router/top_prob': (np.asarray(sums.top_prob) / per_token).tolist(),
  }


def step_metrics(metrics: StepMetrics, num_ranks: int = 1) -> dict[str, Any]:
  """Returns the metrics of one training step as numbers and lists; waits for the step to finish.

  A line of training has also, of the time since the line before:
    tokens_per_second: tokens of its steps over the seconds they took; in a pack its own tokens over
      the seconds of the pack, in which all members trained. Not in these seconds are:
    seconds_preparing: until the first step: data, model, state or checkpoint.
    seconds_compiling: the training step.
    seconds_tracing: beginning, ending and reading a trace of --profile; traced steps are training.
    seconds_saving: what training waited for a checkpoint; the rest is written during training.
    data_wait: seconds the devices waited for the batch of this one step, at most.
  A line of validation has its own `seconds_evaluating`; the first compiles the evaluation, too.
  Fields of phases that took no time are left out; a member of a pack has only tokens_per_second.
  `seconds` of the manifest adds up each of a call.
  """
  record: dict[str, Any] = {
    'loss': float(metrics.cross_entropy),
    'objective': float(metrics.objective),
    'grad_norm': float(metrics.grad_norm),
    'learning_rate': float(metrics.learning_rate),
    'tokens': int(metrics.tokens),
  }
  if metrics.router_sums is not None and metrics.auxiliary is not None:
    record['router/load_balancing_loss'] = np.asarray(metrics.auxiliary.load_balancing).tolist()
    record['router/z_loss'] = np.asarray(metrics.auxiliary.router_z).tolist()
    record['router/importance_loss'] = np.asarray(metrics.auxiliary.importance).tolist()
    record['router/device_balance_loss'] = np.asarray(metrics.auxiliary.device_balance).tolist()
    record['router/own_loss'] = np.asarray(metrics.auxiliary.router).tolist()
    record |= router_metrics(metrics.router_sums, num_ranks)
    record |= running_metrics(np.asarray(metrics.average_load))
  return record


def running_metrics(average_load: Float[np.ndarray, 'L E']) -> dict[str, Any]:
  """Returns lists over layers from the moving average of the load, whatever its sum.

  router/running_max_violation is its largest share over the mean share, minus 1;
  router/running_dead_experts the experts below 1% of the mean share.
  """
  load = np.asarray(average_load, np.float64)
  relative = load / np.maximum(np.mean(load, -1, keepdims=True), 1e-300)
  return {
    'router/running_max_violation': (np.max(relative, -1) - 1).tolist(),
    'router/running_dead_experts': np.sum(relative < 0.01, -1).tolist(),
  }
