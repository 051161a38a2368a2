"""From router sums to metrics, and metrics to files: metrics.jsonl and TensorBoard."""

import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from moe_jax import routing
from moe_jax.train.metrics_file import FILE, is_number, keep_until, print_line
from moe_jax.train.metrics_file import read_metrics as read_metrics
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
        experts, or none was asked for (expert choice, ReMoE, null experts).
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
  # Over what was asked for, not K tokens: some routers let a token ask for more or fewer.
  asked = np.maximum(np.sum(selected, -1, keepdims=True), 1)
  load, load_kept = selected / asked, kept / asked
  drop = 1 - np.sum(kept, -1) / asked[:, 0]
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
    seconds_saving: what training waited for a checkpoint; the rest is written while it goes on.
    data_wait: seconds the devices waited for the batch of this one step, at most.
  A line of validation has its own `seconds_evaluating`; the first compiles the evaluation, too.
  Fields of what took no time are left out; a member of a pack has tokens_per_second alone.
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


class MetricsWriter:
  """Appends records to metrics.jsonl, one line each, and scalars to TensorBoard files.

  Only the first process writes. A line is written whole and flushed, so a killed run leaves at most
  one cut line, which the next start removes along with lines past the step it resumes from. A file
  of which anything else would be lost is kept under another name.
  """

  def __init__(
    self,
    workdir: str,
    resume_step: int,
    enabled: bool = True,
    drop_last_valid: bool = False,
    say: Callable[[str], None] = print_line,
  ):
    """Opens both files.

    Args:
      workdir: of the run.
      resume_step: the last step of which lines stay.
      enabled: whether this process writes.
      drop_last_valid: whether the evaluation at that step is done again, too.
      say: takes a line for each loss of lines.
    """
    self._enabled = enabled
    if not enabled:
      return
    # Imported here: TensorBoard's protobufs cost half a second that no other command needs.
    import tensorboardX

    path = pathlib.Path(workdir) / FILE
    keep_until(path, resume_step, drop_last_valid, say)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115
    # By time in seconds alone, the file of a quick restart would take the place of the last one.
    self._events = tensorboardX.SummaryWriter(
      str(pathlib.Path(workdir) / 'tensorboard'),
      purge_step=resume_step + 1,
      filename_suffix=f'.{time.time_ns()}',
    )

  def write(self, step: int, split: str, record: dict[str, Any]) -> None:
    """Writes one record; what `scalars_of` finds in it goes to TensorBoard, too."""
    if not self._enabled:
      return
    from tensorboardX.proto.summary_pb2 import Summary

    self._file.write(json.dumps({'step': step, 'split': split} | record) + '\n')
    self._file.flush()
    # One event for all: an event each would cost more than a small step.
    values = [
      Summary.Value(tag=f'{split}/{name}', simple_value=value)
      for name, value in scalars_of(record).items()
    ]
    self._events.file_writer.add_summary(Summary(value=values), step)

  def close(self) -> None:
    """Closes both files."""
    if self._enabled:
      self._file.close()
      self._events.close()


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a record that TensorBoard draws, by name.

  A number keeps its name. A list of numbers is one over MoE layers: `NAME/layer_0` and so on. Of a
  dictionary of records (by domain) only the numbers: `domains/DOMAIN/NAME`. Tables (the load of
  each expert) and text stand in metrics.jsonl alone.
  """
  found: dict[str, float] = {}
  for name, value in record.items():
    if is_number(value):
      found[name] = float(value)
    elif isinstance(value, list) and all(map(is_number, value)):
      found |= {f'{name}/layer_{layer}': float(x) for layer, x in enumerate(value)}
    elif isinstance(value, dict):
      inner = ((f'{name}/{key}', within) for key, within in value.items())
      found |= {
        f'{prefix}/{key}': float(x)
        for prefix, within in inner
        if isinstance(within, dict)
        for key, x in within.items()
        if is_number(x)
      }
  return found
