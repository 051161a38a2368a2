"""Batches: the same global batch on any number of processes, and exact positions."""

import json

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.data import iterators, token_store, windows

NUM_ROWS = 23


@pytest.fixture(scope='module')
def rows():
  """Windows of one pair each: the input token is the row's number."""
  tokens = token_store.SplitTokens(
    tokens=np.arange(NUM_ROWS + 1).astype(np.uint16),
    offsets=np.array([0, NUM_ROWS + 1]),
    domain_ids=np.zeros(1, np.int32),
    num_bytes=np.array([NUM_ROWS - 1]),
  )
  return windows.PackedWindows(tokens, np.arange(1), 1, 'test')


def take(iterator, num_steps):
  return [next(iterator)['inputs'][:, 0].tolist() for _ in range(num_steps)]


def test_every_epoch_holds_every_row_once_in_a_fresh_order(rows):
  order = sum(take(iterators.train_iterator(rows, batch_size=4, seed=1), NUM_ROWS), [])
  epochs = [order[i : i + NUM_ROWS] for i in range(0, 4 * NUM_ROWS, NUM_ROWS)]
  assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert epochs[0] != list(range(NUM_ROWS))


@pytest.mark.parametrize('batch_size', [4, 28])
def test_global_batch_does_not_depend_on_the_processes(rows, batch_size):
  whole = take(iterators.train_iterator(rows, batch_size=batch_size, seed=5), 13)
  for count in (2, 4):
    shares = [
      take(
        iterators.train_iterator(
          rows, batch_size=batch_size, seed=5, process_index=p, process_count=count
        ),
        13,
      )
      for p in range(count)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_each_process_reads_only_its_share(rows):
  class Counting(windows.PackedWindows):
    read = set()

    def __getitem__(self, i):
      self.read.add(int(i))
      return super().__getitem__(i)

  counting = Counting(rows._tokens, np.arange(1), 1, 'test')
  iterator = iterators.train_iterator(
    counting, batch_size=8, seed=0, process_index=1, process_count=4, num_threads=0
  )
  taken = set(sum(take(iterator, 2), []))
  assert counting.read == taken
  assert len(taken) == 4


def test_seed_decides(rows):
  def first(seed):
    return take(iterators.train_iterator(rows, batch_size=4, seed=seed), 10)

  assert first(3) == first(3)
  assert first(3) != first(4)


@pytest.mark.parametrize(('step', 'count'), [(0, 1), (1, 2), (5, 1), (6, 2), (14, 4)])
def test_resumes_exactly_also_on_another_number_of_processes(rows, step, count):
  iterator = iterators.train_iterator(rows, batch_size=4, seed=2)
  take(iterator, step)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 5)
  resumed = []
  for p in range(count):
    fresh = iterators.train_iterator(
      rows, batch_size=4, seed=2, process_index=p, process_count=count
    )
    fresh.set_state(state)
    resumed.append(take(fresh, 5))
  assert [sum(parts, []) for parts in zip(*resumed, strict=True)] == expected


@pytest.mark.parametrize(('batch_size', 'count'), [(4, 1), (4, 2), (8, 4), (23, 1), (64, 2)])
def test_evaluation_covers_the_split_once_in_order(rows, batch_size, count):
  shares = [
    list(iterators.eval_batches(rows, batch_size=batch_size, process_index=p, process_count=count))
    for p in range(count)
  ]
  assert {len(share) for share in shares} == {-(-NUM_ROWS // batch_size)}
  order = []
  for parts in zip(*shares, strict=True):
    assert all(part['inputs'].shape == (batch_size // count, 1) for part in parts)
    inputs = np.concatenate([part['inputs'] for part in parts])
    real = np.concatenate([part['segment_ids'] for part in parts]) > 0
    domains = np.concatenate([part['domain_ids'] for part in parts])
    assert (domains[~real] == -1).all()
    order += inputs[real].tolist()
  assert order == list(range(NUM_ROWS))


def test_bad_arguments(rows):
  for make in (
    lambda **kw: iterators.train_iterator(rows, seed=0, **kw),
    lambda **kw: iterators.eval_batches(rows, **kw),
  ):
    with pytest.raises(errors.UserError, match='data.batch_size=6'):
      make(batch_size=6, process_count=4)
    with pytest.raises(errors.UserError, match='data.batch_size=0'):
      make(batch_size=0)
  with pytest.raises(errors.UserError, match='train.seed=-1'):
    iterators.train_iterator(rows, batch_size=4, seed=-1)
