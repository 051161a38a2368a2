"""Cuts documents into rows of a fixed length, every token pair exactly once.

A document d[0..n), BOS and EOS included, holds the pairs (d[i], d[i + 1]). Each run of T pairs is a
row of its own. The tail of fewer than T pairs shares a row with other tails, each as a segment, so
that attention and loss never cross a document.
"""

from typing import TypedDict

import numpy as np
from jaxtyping import Int32, Int64

from moe_jax import errors
from moe_jax.data import token_store


class Example(TypedDict):
  """One row, or stacked to a batch with a leading axis.

  Keys:
    inputs: tokens; 0 at padding.
    targets: the token after each input; 0 at padding.
    segment_ids: 1, 2, ... per piece of a document; 0 is padding.
    positions: 0, 1, ... within each segment; 0 at padding.
    domain_ids: index into `Dataset.domains`; -1 at padding.
  """

  inputs: Int32[np.ndarray, '*B T']
  targets: Int32[np.ndarray, '*B T']
  segment_ids: Int32[np.ndarray, '*B T']
  positions: Int32[np.ndarray, '*B T']
  domain_ids: Int32[np.ndarray, '*B T']


def padding(shape: tuple[int, ...]) -> Example:
  """Returns rows that hold nothing."""
  return Example(
    inputs=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros(shape, np.int32),
    domain_ids=np.full(shape, -1, np.int32),
  )


class PackedWindows:
  """The rows of one split: a Grain RandomAccessDataSource of `Example`.

  Only the plan is held in memory, some 20 bytes per row; tokens are read from the mapped file.

  Attributes:
    sequence_length: T.
    num_pairs: (input, target) pairs over all rows; the rest is padding.
  """

  def __init__(
    self,
    tokens: token_store.SplitTokens,
    documents: Int64[np.ndarray, 'N'],
    sequence_length: int,
    description: str,
  ):
    """Plans the rows.

    Args:
      tokens: the split.
      documents: which of its documents, in order.
      sequence_length: T.
      description: equal for equal rows; Grain may compare it when it restores a position.

    Raises:
      errors.UserError: if the sequence length is below 1.
    """
    if sequence_length < 1:
      raise errors.UserError('data.sequence_length', sequence_length, 'must be at least 1')
    self.sequence_length = sequence_length
    self._tokens = tokens
    self._description = description
    length = sequence_length
    starts, pairs = tokens.offsets[documents], np.diff(tokens.offsets)[documents] - 1
    self.num_pairs = int(pairs.sum())

    num_full = pairs // length
    owner = np.repeat(np.arange(len(documents)), num_full)
    number_in_document = np.arange(len(owner)) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    tails = np.flatnonzero(pairs % length)
    rows = pack(pairs[tails] % length, length)
    order = np.argsort(rows, kind='stable')
    tails, rows = tails[order], rows[order]

    # Row r holds the pieces _row_starts[r] to _row_starts[r + 1]: full rows first, one piece each.
    self._piece_starts = np.concatenate(
      [starts[owner] + number_in_document * length, starts[tails] + num_full[tails] * length]
    )
    self._piece_lengths = np.concatenate(
      [np.full(len(owner), length, np.int32), (pairs[tails] % length).astype(np.int32)]
    )
    domains = tokens.domain_ids[documents]
    self._piece_domains = np.concatenate([domains[owner], domains[tails]])
    pieces_in_row = np.bincount(rows) if len(rows) else np.zeros(0, np.int64)
    self._row_starts = np.concatenate(
      [np.arange(len(owner) + 1), len(owner) + np.cumsum(pieces_in_row)]
    )

  def __len__(self) -> int:
    return len(self._row_starts) - 1

  def __repr__(self) -> str:
    return f'PackedWindows({self._description}, sequence_length={self.sequence_length})'

  def __getitem__(self, index: int) -> Example:
    """Returns a row; arrays of shape [T].

    Raises:
      IndexError: if there is no such row.
    """
    if not -len(self) <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    index = int(index) % len(self)
    row = padding((self.sequence_length,))
    at = 0
    first = int(self._row_starts[index])
    for segment, piece in enumerate(range(first, int(self._row_starts[index + 1])), start=1):
      start, length = int(self._piece_starts[piece]), int(self._piece_lengths[piece])
      place = slice(at, at + length)
      row['inputs'][place] = self._tokens.tokens[start : start + length]
      row['targets'][place] = self._tokens.tokens[start + 1 : start + 1 + length]
      row['segment_ids'][place] = segment
      row['positions'][place] = np.arange(length)
      row['domain_ids'][place] = self._piece_domains[piece]
      at += length
    return row


def pack(lengths: Int64[np.ndarray, 'N'], capacity: int) -> Int64[np.ndarray, 'N']:
  """Packs pieces into rows, longest first, each into the fullest row that still has space.

  Works on all pieces of one length and all rows of one remaining space at once, so a million short
  documents take a moment.

  Args:
    lengths: of the pieces, in [1, capacity].
    capacity: of a row.

  Returns:
    Per piece its row; rows are numbered from 0 without gaps.
  """
  rows = np.zeros(len(lengths), np.int64)
  order = np.argsort(-lengths, kind='stable')
  distinct, first = np.unique(-lengths[order], return_index=True)
  # Rows by the space that they have left.
  free: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
  num_free = np.zeros(capacity + 1, np.int64)
  num_rows = 0

  def put(pieces: np.ndarray, bins: np.ndarray, space: int, length: int) -> None:
    """Puts the pieces into rows of equal space, as many as fit into each before the next."""
    per_row = space // length
    rows[pieces] = np.repeat(bins, per_row)[: len(pieces)]
    counts = np.full(len(bins), per_row)
    counts[-1] = len(pieces) - per_row * (len(bins) - 1)
    for count in np.unique(counts):
      left = space - int(count) * length
      free[left].append(bins[counts == count])
      num_free[left] += int((counts == count).sum())

  for length, pieces in zip((-distinct).tolist(), np.split(order, first[1:]), strict=False):
    for space in (length + np.flatnonzero(num_free[length:])).tolist():
      if not len(pieces):
        break
      bins = np.concatenate(free[space])
      num_used = min(len(bins), -(-len(pieces) // (space // length)))
      free[space], num_free[space] = [bins[num_used:]], len(bins) - num_used
      num_taken = min(len(pieces), num_used * (space // length))
      put(pieces[:num_taken], bins[:num_used], space, length)
      pieces = pieces[num_taken:]
    if len(pieces):
      num_new = -(-len(pieces) // (capacity // length))
      put(pieces, np.arange(num_rows, num_rows + num_new), capacity, length)
      num_rows += num_new
  return rows
