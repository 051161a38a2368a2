"""Evaluation on a whole split, domain by domain."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from moe_jax import routing
from moe_jax.data import Dataset, eval_batches
from moe_jax.models.decoder import Decoder, forward
from moe_jax.parallel.mesh import EXPERT_AXIS, batch_sharding, replicated
from moe_jax.train import metrics
from moe_jax.train.cross_entropy import cross_entropy_sum
from moe_jax.train.state import params_shardings
from moe_jax.train.step import BATCH_FIELDS, Batch, over_scopes, put_batch

EvalStep = Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, jax.Array, Any]]


def make_eval_step(model: Decoder) -> EvalStep:
  """Returns the compiled (params, router_state, batch) -> (nats, tokens, router sums), summed."""

  def step(params, router_state, batch):
    out = forward(
      model,
      params,
      batch['inputs'],
      batch['segment_ids'],
      batch['positions'],
      router_state=router_state,
    )
    nats = cross_entropy_sum(
      out.hidden, out.output, batch['targets'], batch['segment_ids'], model.mesh
    )
    sums = None if out.router_sums is None else over_scopes(out.router_sums)
    return nats, (batch['segment_ids'] > 0).sum(), sums

  by_sequence = {name: batch_sharding(model.mesh) for name in BATCH_FIELDS}
  return jax.jit(
    step,
    in_shardings=(params_shardings(model), replicated(model.mesh), by_sequence),
    out_shardings=replicated(model.mesh),
  )


def evaluate(
  eval_step: EvalStep,
  model: Decoder,
  params: Any,
  router_state: Any,
  dataset: Dataset,
  *,
  split: str,
  sequence_length: int,
  batch_size: int,
  max_batches: int = 0,
  on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Evaluates on every document of a split.

  Args:
    eval_step: from `make_eval_step(model)`.
    model: in mode `eval`.
    params: on the mesh of the model.
    router_state: of the same checkpoint; {} where the routers have none.
    dataset: whose tokenizer the model was trained with.
    split: train, valid or test.
    sequence_length: T; a longer document is cut into windows of T tokens that don't see each other.
    batch_size: sequences in a batch.
    max_batches: batches of each domain; 0 is all of them.
    on_batch: called after each batch.

  Returns:
    `loss` (nats per token), `tokens`, router metrics and, over a whole split, `bits_per_byte` and
    `bytes`; and `domains`, the same for each domain.

  Raises:
    UserError: for an unknown or empty split.
  """
  dataset.windows(split, sequence_length)
  totals = []
  result: dict[str, Any] = {'split': split, 'domains': {}}
  for domain in dataset.domains:
    if not dataset.num_documents(split, domain):
      continue
    total: Any = None
    running: Any = None
    batches = domain_batches(dataset, model, split, domain, sequence_length, batch_size)
    for batch in itertools.islice(batches, max_batches or None):
      # Fetched while the next batch is made and runs.
      before, running = running, eval_step(params, router_state, batch)
      total = _with(total, before)
      on_batch()
    total = _with(total, running)
    num_bytes = 0 if max_batches else dataset.num_bytes(split, domain)
    result['domains'][domain] = _summary(total, num_bytes, model)
    totals.append((total, num_bytes))
  pooled = functools.reduce(_add, (total for total, _ in totals))
  return result | _summary(pooled, sum(count for _, count in totals), model)


def domain_batches(
  dataset: Dataset,
  model: Decoder,
  split: str,
  domain: str,
  sequence_length: int,
  batch_size: int,
) -> Iterator[Batch]:
  """Yields every document of a domain in batches on the model's devices; none if it is empty."""
  if not dataset.num_documents(split, domain):
    return
  windows = dataset.windows(split, sequence_length, domain)
  for batch in eval_batches(
    windows,
    batch_size=batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ):
    yield put_batch(batch, model)


def _with(total: Any, out: Any) -> Any:
  """Returns the total with what a step gave, in float64; either may be None."""
  if out is None:
    return total
  out = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(out))
  return out if total is None else _add(total, out)


def _add(one: Any, other: Any) -> Any:
  """Adds (nats, tokens, router sums) of two parts."""
  sums = None if one[2] is None else jax.tree.map(np.asarray, routing.add_sums(one[2], other[2]))
  return one[0] + other[0], one[1] + other[1], sums


def batch_size_of(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """Returns the micro-batch of a config, filled up to what the mesh and the routing groups divide.

  Rows that fill up are padding: the size of a batch changes no number.
  """
  microbatch = config.data.batch_size // config.train.accumulation_steps
  unit = mesh.size * (config.moe.group_size if config.moe.num_experts else 1)
  return -(-microbatch // unit) * unit


def num_batches(dataset: Dataset, split: str, sequence_length: int, batch_size: int) -> int:
  """Returns the batches of an evaluation on a whole split."""
  return sum(
    math.ceil(len(dataset.windows(split, sequence_length, domain)) / batch_size)
    for domain in dataset.domains
    if dataset.num_documents(split, domain)
  )


def _summary(total: Any, num_bytes: int, model: Decoder) -> dict[str, Any]:
  nats, tokens, sums = total
  summary: dict[str, Any] = {'loss': float(nats / max(tokens, 1)), 'tokens': int(tokens)}
  if num_bytes:
    summary['bytes'] = num_bytes
    summary['bits_per_byte'] = float(nats / math.log(2) / num_bytes)
  if sums is not None and model.options.moe is not None:
    summary |= metrics.router_metrics(sums, model.mesh.shape[EXPERT_AXIS])
  return summary
