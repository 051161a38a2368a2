"""Routing change: how many selected experts differ between two checkpoints of a run.

Or between two computations of the same one, as with another router dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from moe_jax.data import Dataset
from moe_jax.models.task import Batch, Task
from moe_jax.parallel.sharding import batch_sharding, replicated
from moe_jax.train.evaluation_batches import domain_batches
from moe_jax.train.routing_counts import membership
from moe_jax.train.state import params_shardings


class Weights(NamedTuple):
  """Weights of a checkpoint that routing reads: parameters, and the state of the routers."""

  params: Any
  router_state: Any


class Overlap(NamedTuple):
  """Counts over valid tokens, for each MoE layer: selected assignments, and those in both."""

  before: Float[Array, 'L']
  after: Float[Array, 'L']
  shared: Float[Array, 'L']


def make_overlap_step(
  task: Task, task_before: Task | None = None
) -> Callable[[Weights, Weights, Batch], Overlap]:
  """Returns the compiled (before, after, batch) -> Overlap.

  Args:
    task: in mode `eval`.
    task_before: another one of the same parameters, for `before`; the same by default.
  """
  assert task.moe is not None
  num_experts = task.moe.num_experts

  def selected(task: Task, weights: Weights, batch: Batch) -> Bool[Array, 'L B T E']:
    out = task.with_selected().loss(weights.params, weights.router_state, batch)
    assert out.selected is not None
    return membership(out.selected.experts, num_experts)

  def step(before, after, batch):
    one, other = selected(task_before or task, before, batch), selected(task, after, batch)
    sets = Overlap(one, other, one & other)
    return jax.tree.map(lambda x: jnp.sum(x, axis=(1, 2, 3), dtype=jnp.float32), sets)

  everywhere = replicated(task.mesh)
  weights = Weights(params_shardings(task), everywhere)
  batch = {name: batch_sharding(task.mesh) for name in task.batch_fields}
  return jax.jit(step, in_shardings=(weights, weights, batch), out_shardings=everywhere)


def churn(
  overlap_step: Callable[[Weights, Weights, Batch], Overlap],
  task: Task,
  before: Weights,
  after: Weights,
  dataset: Dataset,
  *,
  split: str,
  sequence_length: int,
  batch_size: int,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Compares the experts that two checkpoints select, on every token of a split, before any drop.

  Args:
    overlap_step: from `make_overlap_step(task, ...)`.
    task: as there.
    before: the earlier checkpoint, on the mesh of the task.
    after: the later one.
    dataset: whose tokenizer the model was trained with.
    split: train, valid or test.
    sequence_length: T.
    batch_size: sequences in a batch.
    on_batch: called after each batch.

  Returns:
    `router/churn`, one number for each MoE layer: 1 - 2 |A and B| / (|A| + |B|), A and B the
    assignments of all tokens at either checkpoint. With K experts for each token that is the share
    of assignments that changed: 0 if none did, 1 - K / E between two random choices. And
    `domains`, the same for each domain.

  Source: 1 minus the router saturation of Muennighoff et al. 2024 (OLMoE), arXiv:2409.02060, eq. 5,
  there between a checkpoint and the last one.
  """
  result: dict[str, Any] = {'domains': {}}
  whole: Any = None
  for domain in dataset.domains:
    total: Any = None
    for batch in domain_batches(dataset, task, split, domain, sequence_length, batch_size):
      out = jax.tree.map(lambda x: np.asarray(x, np.float64), overlap_step(before, after, batch))
      total = out if total is None else jax.tree.map(np.add, total, out)
      on_batch()
    if total is not None:
      result['domains'][domain] = _summary(total)
      whole = total if whole is None else jax.tree.map(np.add, whole, total)
  return result | _summary(whole)


def _summary(overlap: Overlap) -> dict[str, Any]:
  total = np.maximum(overlap.before + overlap.after, 1)
  return {'router/churn': (1 - 2 * overlap.shared / total).tolist()}
