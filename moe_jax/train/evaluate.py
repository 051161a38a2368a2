"""Evaluation on a whole split, domain by domain."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.data import Dataset
from moe_jax.models.task import Batch, Task
from moe_jax.parallel.mesh import EXPERT_AXIS
from moe_jax.parallel.sharding import batch_sharding, replicated
from moe_jax.train import metrics, routing_counts, specialization
from moe_jax.train.evaluation_batches import domain_batches
from moe_jax.train.expert_similarity import expert_similarity
from moe_jax.train.state import over_scopes, params_shardings
from moe_jax.train.step import packed_shardings

EvalStep = Callable[[Any, Any, dict[str, jax.Array], Any], tuple[jax.Array, jax.Array, Any, Any]]


@functools.lru_cache(maxsize=4)
def make_eval_step(task: Task, packed: bool = False) -> EvalStep:
  """Returns the compiled (params, router_state, batch, counts) -> sums over the batch, counts.

  Remembered: runs of one process that share a task trace and compile it once.

  The sums are nats, tokens and those of the routers. The counts are those of `new_counts(task)` to
  begin with, and of the batches so far; None where there is nothing to count.

  Args:
    task: in mode `eval`.
    packed: True if all but the batch has a leading dimension of trials, each of which is evaluated
      as if by itself.
  """
  counted = task if routing_counts.why_not(task) else task.with_selected()

  def step(params, router_state, batch, counts):
    out = counted.loss(params, router_state, batch)
    sums = None if out.router_sums is None else over_scopes(out.router_sums)
    if counts is not None:
      assert out.selected is not None
      counts = routing_counts.add_batch(counts, out.selected, task.mesh)
    return out.total, task.weight(batch), sums, counts

  by_sequence = {name: batch_sharding(task.mesh) for name in task.batch_fields}
  everywhere, own = replicated(task.mesh), batch_sharding(task.mesh)
  param_shardings = params_shardings(task)
  if packed:
    param_shardings, own = packed_shardings((param_shardings, own))
  return jax.jit(
    jax.vmap(step, (0, 0, None, 0)) if packed else step,
    in_shardings=(param_shardings, everywhere, by_sequence, own),
    out_shardings=(everywhere, everywhere, everywhere, own),
    donate_argnums=3,
  )


def evaluate(
  eval_step: EvalStep,
  task: Task,
  params: Any,
  router_state: Any,
  dataset: Dataset,
  *,
  split: str,
  sequence_length: int,
  batch_size: int,
  max_batches: int = 0,
  with_matrices: bool = False,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Evaluates on every document of a split.

  Args:
    eval_step: from `make_eval_step(task)`.
    task: in mode `eval`.
    params: on the mesh of the task.
    router_state: of the same checkpoint; {} where the routers have none.
    dataset: whose tokenizer the model was trained with.
    split: train, valid or test.
    sequence_length: T; a longer document is cut into windows of T tokens that don't see each other.
    batch_size: sequences in a batch.
    max_batches: batches of each domain; 0 is all of them.
    with_matrices: whether `router/coactivation_matrix`, E x E numbers for each layer, is given.
    on_batch: called after each batch.

  Returns:
    `loss` (nats per token), `tokens`, router metrics and, over a whole split, `bits_per_byte` and
    `bytes`; and `domains`, the same for each domain. And, of all domains together, the values of
    `expert_similarity` and, unless every token goes to every expert, of `specialization.measures`.

  Raises:
    UserError: for an unknown or empty split.
  """
  totals, counts = _run(
    functools.partial(eval_step, params, router_state),
    task,
    routing_counts.new_counts(task),
    dataset,
    Rows(split, sequence_length, batch_size, max_batches),
    on_batch,
  )
  return _result(split, totals, counts, params, task, with_matrices)


def evaluate_packed(
  eval_step: EvalStep,
  task: Task,
  weights: Sequence[tuple[Any, Any]],
  dataset: Dataset,
  *,
  split: str,
  sequence_length: int,
  batch_size: int,
  on_batch: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
  """Evaluates several trials of one program together; each gets the result of `evaluate`.

  That is, except for rounding. The devices hold all of them at a time, and their counts.

  Args:
    eval_step: from `make_eval_step(task, packed=True)`.
    task: in mode `eval`, of each of them.
    weights: (params, router_state) of each.
    dataset: as in `evaluate`, and so are the others.
    split: evaluated.
    sequence_length: T.
    batch_size: sequences in a batch.
    on_batch: called after each batch.

  Raises:
    UserError: for an unknown or empty split.
  """
  param_shardings, own = packed_shardings((params_shardings(task), batch_sharding(task.mesh)))
  stack = jax.jit(
    lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees),
    out_shardings=(param_shardings, replicated(task.mesh)),
  )
  counts = jax.tree.map(
    lambda x: jnp.zeros((len(weights), *x.shape), x.dtype, device=own),
    routing_counts.new_counts(task),
  )
  totals, counts = _run(
    functools.partial(eval_step, *stack(*weights)),
    task,
    counts,
    dataset,
    Rows(split, sequence_length, batch_size),
    on_batch,
  )
  results = []
  for i, (params, _) in enumerate(weights):
    own_totals = {
      domain: (jax.tree.map(lambda x, i=i: x[i], total), num_bytes)
      for domain, (total, num_bytes) in totals.items()
    }
    own_counts = jax.tree.map(lambda x, i=i: x[i], counts)
    results.append(_result(split, own_totals, own_counts, params, task, with_matrices=False))
  return results


class Rows(NamedTuple):
  """Rows of tokens to evaluate on, as the arguments of `evaluate` describe them."""

  split: str
  sequence_length: int
  batch_size: int
  max_batches: int = 0


# {domain: ((nats, tokens, router sums) in float64, bytes of its documents)}.
_Totals = dict[str, tuple[Any, int]]


def _run(
  eval_step: Callable[[Batch, Any], Any],
  task: Task,
  counts: Any,
  dataset: Dataset,
  rows: Rows,
  on_batch: Callable[[], None],
) -> tuple[_Totals, Any]:
  """Returns the sums over each domain that has documents, and the counts of all of them."""
  split, sequence_length, batch_size, max_batches = rows
  dataset.windows(split, sequence_length)
  totals: _Totals = {}
  for domain in dataset.domains:
    if not dataset.num_documents(split, domain):
      continue
    total: Any = None
    running: Any = None
    batches = domain_batches(dataset, task, split, domain, sequence_length, batch_size)
    for batch in itertools.islice(batches, max_batches or None):
      # Fetched while the next batch is made and runs.
      before = running
      *sums, counts = eval_step(batch, counts)
      running = tuple(sums)
      total = _with(total, before)
      on_batch()
    total = _with(total, running)
    totals[domain] = total, 0 if max_batches else dataset.num_bytes(split, domain)
  return totals, counts


def _result(
  split: str, totals: _Totals, counts: Any, params: Any, task: Task, with_matrices: bool
) -> dict[str, Any]:
  """Returns the result of `evaluate`, from the sums and counts of one trial."""
  domains = {domain: _summary(*total, task) for domain, total in totals.items()}
  pooled = functools.reduce(_add, (total for total, _ in totals.values()))
  result: dict[str, Any] = {'split': split, 'domains': domains}
  result |= _summary(pooled, sum(count for _, count in totals.values()), task)
  result |= expert_similarity(task, params)
  if counts is not None:
    domain_totals = [total for total, _ in totals.values()]
    result |= _specialization(counts, domain_totals, task, with_matrices)
  return result


def _specialization(
  counts: routing_counts.RoutingCounts, totals: list[Any], task: Task, with_matrices: bool
) -> dict[str, Any]:
  """Returns the specialization of experts, from counts of a split and totals of its domains."""
  result = specialization.measures(
    routing_counts.fetch(counts, task.mesh),
    [sums.tokens_per_expert.astype(np.int64) for _, _, sums in totals],
    [int(tokens) for _, tokens, _ in totals],
  )
  if not with_matrices:
    del result['router/coactivation_matrix']
  return result


def _with(total: Any, out: Any) -> Any:
  """Returns the total plus the sums of a step, in float64; either may be None."""
  if out is None:
    return total
  out = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(out))
  return out if total is None else _add(total, out)


def _add(one: Any, other: Any) -> Any:
  """Adds (nats, tokens, router sums) of two parts."""
  sums = None if one[2] is None else jax.tree.map(np.asarray, routing.add_sums(one[2], other[2]))
  return one[0] + other[0], one[1] + other[1], sums


def _summary(total: Any, num_bytes: int, task: Task) -> dict[str, Any]:
  nats, tokens, sums = total
  summary: dict[str, Any] = {'loss': float(nats / max(tokens, 1)), 'tokens': int(tokens)}
  if num_bytes:
    summary['bytes'] = num_bytes
    summary['bits_per_byte'] = float(nats / math.log(2) / num_bytes)
  if sums is not None and task.moe is not None:
    summary |= metrics.router_metrics(sums, task.mesh.shape[EXPERT_AXIS])
  return summary
