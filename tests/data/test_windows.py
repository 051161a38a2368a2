"""Windowing: every token pair once, nothing across documents, whatever the lengths."""

import collections

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import errors
from moe_jax.data import token_store, windows


def make_split(lengths, domains=None):
  """Documents whose tokens are all different, so that a pair tells where it comes from."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  return token_store.SplitTokens(
    tokens=np.arange(offsets[-1]).astype(np.uint32),
    offsets=offsets,
    domain_ids=np.array(domains or [0] * len(lengths), np.int32),
    num_bytes=np.array(lengths, np.int64),
  )


def make_windows(lengths, length, documents=None, domains=None):
  documents = np.arange(len(lengths)) if documents is None else np.array(documents)
  return windows.PackedWindows(make_split(lengths, domains), documents, length, 'test')


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 24), st.randoms()
)
def test_every_pair_once_and_no_segment_crosses_a_document(lengths, length, rng):
  documents = sorted(rng.sample(range(len(lengths)), rng.randint(1, len(lengths))))
  domains = [i % 3 for i in range(len(lengths))]
  packed = make_windows(lengths, length, documents, domains)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  seen = collections.Counter()
  for i in range(len(packed)):
    row = packed[i]
    assert all(array.shape == (length,) and array.dtype == np.int32 for array in row.values())
    segments = row['segment_ids']
    real = segments > 0
    # Padding comes last, segments are numbered 1, 2, ... from left to right.
    np.testing.assert_array_equal(np.sort(~real), ~real)
    np.testing.assert_array_equal(np.unique(segments[real]), np.arange(1, segments.max() + 1))
    for key, value in (('inputs', 0), ('targets', 0), ('positions', 0), ('domain_ids', -1)):
      assert (row[key][~real] == value).all()
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      inputs, targets = row['inputs'][inside], row['targets'][inside]
      owners = np.searchsorted(offsets, np.concatenate([inputs, targets]), side='right') - 1
      assert len(set(owners)) == 1
      assert (row['domain_ids'][inside] == domains[owners[0]]).all()
      np.testing.assert_array_equal(row['positions'][inside], np.arange(len(inputs)))
      np.testing.assert_array_equal(inputs, inputs[0] + np.arange(len(inputs)))
      seen.update(zip(inputs.tolist(), targets.tolist(), strict=True))
  expected = [(t, t + 1) for d in documents for t in range(offsets[d], offsets[d + 1] - 1)]
  assert seen == collections.Counter(expected)
  assert packed.num_pairs == len(expected)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 40))
def test_pack_fills_rows_well(lengths, capacity):
  rows = windows.pack(np.array(lengths, np.int64), capacity)
  fill = np.bincount(rows, weights=lengths) if lengths else np.zeros(0)
  assert (fill <= capacity).all()
  assert (fill > 0).all()
  # No two rows could have been one: else a later piece would have gone into the earlier row.
  assert len(fill) < 2 or np.sort(fill)[:2].sum() > capacity


def test_full_rows_stand_alone_and_in_order():
  packed = make_windows([11, 4, 21], 5)
  assert packed[0]['inputs'].tolist() == [0, 1, 2, 3, 4]
  assert packed[1]['inputs'].tolist() == [5, 6, 7, 8, 9]
  assert packed[2]['inputs'].tolist() == [15, 16, 17, 18, 19]
  assert len(packed) == 2 + 4 + 1
  np.testing.assert_array_equal(packed[-1]['inputs'], packed[len(packed) - 1]['inputs'])


def test_many_short_documents_leave_little_padding():
  lengths = np.random.default_rng(0).integers(2, 300, 50_000)
  packed = make_windows(lengths, 256)
  assert packed.num_pairs / (256 * len(packed)) > 0.98


def test_bad_length_and_index():
  with pytest.raises(errors.UserError, match='data.sequence_length=0'):
    make_windows([5], 0)
  with pytest.raises(IndexError):
    make_windows([5], 4)[1]
