"""The batches of an evaluation: every document of a split, domain by domain."""

import math
from collections.abc import Iterator

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax.data import Dataset, eval_batches
from moe_jax.models.task import Batch, Task
from moe_jax.train.step import put_batch


def domain_batches(
  dataset: Dataset,
  task: Task,
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
    yield put_batch(batch, task)


def batch_size_of(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """Returns the micro-batch of a config, filled up to a size that mesh and routing groups divide.

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
