"""Batches: endless and shuffled for training, once and in order for evaluation.

Both give every process its share of one and the same global batch: with P processes, process p
holds rows p * B/P to (p + 1) * B/P. So what is trained on does not depend on the number of
processes, and each process reads its share only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moe_jax import errors
from moe_jax.data import windows as windows_lib

if TYPE_CHECKING:
  import grain


def train_iterator(
  windows: windows_lib.PackedWindows,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int = 2,
  num_prefetch: int = 8,
) -> 'grain.DatasetIterator[windows_lib.Example]':
  """Returns an endless iterator over shuffled batches.

  Every epoch holds each row once, in a fresh order; a batch may reach over the end of an epoch.
  `get_state()` returns a small JSON-able dict, and `set_state()` continues exactly from there, also
  on another number of processes.

  Args:
    windows: the rows.
    batch_size: B, rows in the global batch.
    seed: of the shuffles, in [0, 2**32).
    process_index: p, of this process.
    process_count: P.
    num_threads: threads that read ahead.
    num_prefetch: batches that they keep ready.

  Returns:
    An iterator of `Example` with arrays of shape [B/P, T].

  Raises:
    errors.UserError: if P does not divide B, or the seed is out of range.
  """
  # Grain brings JAX along; who only prepares data does not need it.
  import grain

  share = _share(batch_size, process_index, process_count)
  if not 0 <= seed < 2**32:
    raise errors.UserError('train.seed', seed, 'must be a number in [0, 2**32)')
  rows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
  # Shares are batches of their own, dealt round robin: batch t * P + p is process p's part of step
  # t. drop_remainder: Grain else divides the endless length as a float, which overflows.
  shares = rows.batch(share, drop_remainder=True)
  if process_count > 1:
    shares = shares[process_index::process_count]
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_prefetch)
  return iter(shares.to_iter_dataset(options))


def eval_batches(
  windows: windows_lib.PackedWindows,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[windows_lib.Example]:
  """Yields every row once, in order; the last batch is filled up with rows of padding.

  Args:
    windows: the rows.
    batch_size: B, rows in the global batch.
    process_index: p, of this process.
    process_count: P.

  Yields:
    `Example` with arrays of shape [B/P, T]; every process yields the same number.

  Raises:
    errors.UserError: if P does not divide B.
  """
  share = _share(batch_size, process_index, process_count)
  return _eval_batches(windows, batch_size, share, process_index * share)


def _eval_batches(
  windows: windows_lib.PackedWindows, batch_size: int, share: int, offset: int
) -> Iterator[windows_lib.Example]:
  for start in range(offset, offset + len(windows), batch_size):
    batch = windows_lib.padding((share, windows.sequence_length))
    for i in range(min(share, max(len(windows) - start, 0))):
      for key, value in windows[start + i].items():
        batch[key][i] = value  # type: ignore[literal-required]
    yield batch


def _share(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
      'data.batch_size', batch_size, f'must be a positive multiple of the {process_count} processes'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(f'process {process_index} of {process_count}')
  return batch_size // process_count
