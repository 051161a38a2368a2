"""Lines of metrics.jsonl after a resume, and router metrics."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_jax import routing
from moe_jax.run import manifest, metrics_file, metrics_writer
from moe_jax.train import metrics


def line(step, split='train', **more):
  return json.dumps({'step': step, 'split': split, 'loss': 1.0, **more}).encode()


def steps_of(path):
  return [record['step'] for record in metrics_file.read_metrics(path)]


DAMAGED_LINES = (
  b'garbage',
  b'7',
  b'',
  b'[]',
  b'null',
  b'{"step": 9, "split": "tr\303',
  b'{"step": 9, "split": "train", "loss": 1.0',
  b'\xff\xfe',
  line(9)[:-1] + b', "more": ' + b'9' * 5000 + b'}',
  b'[' * 20_000,
  line('9'),
  line(9.0),
  line(-9),
  line(True),
  line(None),
  line(9, split=7),
  line(9, split=None),
  line(9, loss='low'),
  line(9, loss=None),
  line(9, loss=True),
  b'{"step": 9, "split": "train"}',
  b'{"split": "train", "loss": 1.0}',
  line(9, **{'router/load': [[0.5, 0.5], [1.0]]}),
  line(9, **{'router/load': 'even'}),
  line(9, **{'router/max_violation': [1.0, None]}),
)


@pytest.mark.parametrize('damaged', DAMAGED_LINES, ids=range(len(DAMAGED_LINES)))
def test_a_damaged_line_is_said_and_costs_no_other_line(tmp_path, capsys, damaged):
  path = tmp_path / 'metrics.jsonl'
  content = b'\n'.join([line(10), damaged, line(20), line(30, split='other'), line(30), b''])
  path.write_bytes(content)
  assert steps_of(path) == [10, 20, 30, 30]
  read = capsys.readouterr()
  assert (read.out, read.err) == ('', f'warning: {path}: line 2 is damaged, left out\n')
  said = []
  metrics_file.keep_until(path, 20, False, said.append)
  aside = tmp_path / 'damaged_metrics.jsonl'
  assert said == [f'warning: {path}: line 2 is damaged, left out; the old file is {aside}']
  assert aside.read_bytes() == content
  assert steps_of(path) == [10, 20]
  # The second time, there is nothing to say.
  metrics_file.keep_until(path, 20, False, said.append)
  assert len(said) == 1 and not capsys.readouterr().err
  assert sorted(p.name for p in tmp_path.iterdir()) == ['damaged_metrics.jsonl', 'metrics.jsonl']


def test_a_line_that_repeats_a_step_and_split_is_said_and_left_out(tmp_path, capsys):
  path, said = tmp_path / 'metrics.jsonl', []
  lines = [
    line(10),
    line(10, split='valid'),
    line(20),
    line(20),
    b'7',
    line(10, loss=9.0),
    line(30),
  ]
  path.write_bytes(b'\n'.join([*lines, b'']))
  # The first of step 10 stays, which has the loss 1.0.
  kept = [('train', 10, 1.0), ('valid', 10, 1.0), ('train', 20, 1.0), ('train', 30, 1.0)]
  columns = ('split', 'step', 'loss')
  read = [tuple(r[name] for name in columns) for r in metrics_file.read_metrics(path)]
  words = 'line 5 is damaged and lines 4, 6 repeat earlier ones, left out'
  assert read == kept and capsys.readouterr().err == f'warning: {path}: {words}\n'
  metrics_file.keep_until(path, 30, False, said.append)
  aside = tmp_path / 'damaged_metrics.jsonl'
  assert said == [f'warning: {path}: {words}; the old file is {aside}']
  assert aside.read_bytes() == b'\n'.join([*lines, b''])
  assert path.read_bytes() == b'\n'.join([*(lines[i] for i in (0, 1, 2, 6)), b''])
  path.write_bytes(b'\n'.join([line(10), line(10)]))
  metrics_file.keep_until(path, 10, False, said.append)
  assert 'line 2 repeats an earlier one, left out' in said[-1]
  assert path.read_bytes() == line(10) + b'\n'


@pytest.mark.parametrize('end', [b'{"step": 2', b'{"step": 9, "split": "tr\303', line(9)[:-1]])
def test_a_cut_last_line_is_no_damage(tmp_path, capsys, end):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(line(10) + b'\n' + end)
  assert steps_of(path) == [10] and not capsys.readouterr().err
  said = []
  metrics_file.keep_until(path, 10, False, said.append)
  assert path.read_bytes() == line(10) + b'\n'
  assert said == [f'note: {path}: line 2, the last one, was cut off and is dropped']
  assert not (tmp_path / 'damaged_metrics.jsonl').exists()


def test_a_whole_last_line_without_its_end_stays(tmp_path):
  path, said = tmp_path / 'metrics.jsonl', []
  path.write_bytes(line(10) + b'\n' + line(20))
  metrics_file.keep_until(path, 20, False, said.append)
  assert path.read_bytes() == line(10) + b'\n' + line(20) + b'\n' and not said


def test_lines_that_are_written_again_are_counted_or_kept(tmp_path):
  path, said = tmp_path / 'metrics.jsonl', []
  content = b'\n'.join([*map(line, (10, 20, 30)), line(20, split='valid'), b''])
  path.write_bytes(content)
  metrics_file.keep_until(path, 20, True, said.append)
  assert said == [f'1 line of {path} past that step is written again']
  # The evaluation at step 20 is done again.
  assert path.read_bytes() == line(10) + b'\n' + line(20) + b'\n'
  for number, name in enumerate(('earlier_metrics.jsonl', 'earlier_metrics_1.jsonl')):
    path.write_bytes(content)
    metrics_file.keep_until(path, 0, False, said.append)
    assert path.read_bytes() == b''
    assert (tmp_path / name).read_bytes() == content
    words = ('warning: starting at step 0', str(path), 'up to step 30', name)
    assert all(word in said[1 + number] for word in words)


@pytest.mark.parametrize(
  ('paces', 'end', 'finished', 'train', 'valid'),
  [
    # Every 4 steps and at the last one; evaluations every 5.
    ([(0, 4, 5)], 10, True, [4, 8, 10], [5, 10]),
    ([(0, 4, 5)], 10, False, [4, 8], [5]),
    ([(0, 4, 0)], 8, True, [4, 8], []),
    # Went on at 5 with a line each 2 steps, at 8 with one each 3.
    ([(0, 4, 0), (5, 2, 0), (8, 3, 4)], 12, True, [4, 6, 8, 9, 12], [12]),
    ([(0, 4, 0), (5, 2, 0), (8, 3, 4)], 7, False, [4, 6], []),
    # Nothing is known of what came before.
    ([(6, 4, 0)], 10, False, [8], []),
    ([], 10, True, [], []),
    # Repaired at its end, where no step was left.
    ([(0, 4, 0), (10, 4, 0)], 10, True, [4, 8, 10], []),
  ],
)
def test_lines_that_must_be_there(paces, end, finished, train, valid):
  paces = [manifest.Pace(*pace) for pace in paces]
  expected = {('train', step) for step in train} | {('valid', step) for step in valid}
  missing = lambda there: metrics_file.missing_lines(  # noqa: E731
    [{'split': split, 'step': step} for split, step in there], paces, end, finished=finished
  )
  assert set(missing([])) == expected
  for one in expected:
    assert missing(expected - {one}) == [one]


def test_running_metrics_by_hand():
  # Three steps from 0 with decay 0.99 would sum to 0.0297; only shares matter. Loads 6, 2, 0.001
  # and 0 of 8.001: mean 2.00025; largest 6 / 2.00025 - 1; two below 0.02.
  result = metrics.running_metrics(np.array([[6, 2, 0.001, 0], [1, 1, 1, 1]]) * 1e-3)
  np.testing.assert_allclose(result['router/running_max_violation'], [6 / 2.00025 - 1, 0])
  assert result['router/running_dead_experts'] == [2, 0]


def test_the_load_of_a_single_expert_is_at_balance():
  one = lambda value: np.array([value], np.float32)  # noqa: E731
  sums = routing.RouterSums(
    **{field: one(8) for field in routing.RouterSums._fields if field != 'own'}, own={}
  )
  each = dict.fromkeys(('tokens_per_expert', 'prob_sum', 'kept_per_expert'), one([8]))
  result = metrics.router_metrics(sums._replace(**each), num_ranks=1)
  assert result['router/load_entropy'] == [1.0]


def test_router_metrics_by_hand():
  # One layer, E = 4, 8 tokens with one assignment each: 4, 2, 2 and none; one of them dropped.
  one = lambda value: np.array([value], np.float32)  # noqa: E731
  sums = routing.RouterSums(
    tokens=one(8),
    tokens_per_expert=one([4, 2, 2, 0]),
    prob_sum=one([2, 2, 2, 2]),
    kept_per_expert=one([3, 2, 2, 0]),
    tokens_all_dropped=one(1),
    logsumexp_squared=one(8),
    entropy=one(4),
    top_prob=one(6),
    logsumexp_max=one(2.5),
    slots=one(12),
    own={},
  )
  result = metrics.router_metrics(sums, num_ranks=2)
  expected = {
    'router/load': [[0.5, 0.25, 0.25, 0]],
    'router/load_kept': [[3 / 8, 0.25, 0.25, 0]],
    'router/drop_share': 1 / 8,
    'router/drop_share_per_layer': [1 / 8],
    'router/token_drop_share': [1 / 8],
    # 4 assignments where the mean is 2.
    'router/max_violation': [1.0],
    # Loads over their mean: 2, 1, 1, 0. Variance (1 + 0 + 0 + 1) / 4.
    'router/load_cv': [0.5**0.5],
    # Experts 0 and 1 have 6 of 8 where half would be 4.
    'router/rank_imbalance': [0.5],
    'router/padding_waste': [5 / 12],
    'router/largest_logsumexp': [2.5],
    # (log(2) / 2 + 2 log(4) / 4) / log(4).
    'router/load_entropy': [0.75],
    'router/dead_experts': [1],
    'router/entropy': [0.5],
    'router/top_prob': [0.75],
  }
  assert result.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_tensorboard_holds_numbers_and_a_number_for_each_layer(tmp_path):
  record = {
    'loss': 2.5,
    'tokens': 256,
    'router/max_violation': [0.5, 1.5],
    'router/dead_experts': [0, 3],
    'router/load': [[0.5, 0.5], [0.25, 0.75]],
    'anything/new': [7.0],
    'ok': True,
    'name': 'x',
    'nothing': None,
    'domains': {'prose': {'loss': 2.0, 'router/entropy': [1.0, 2.0]}, 'verse': {'loss': 3.0}},
  }
  # From step 4 on again: lines written past it are hidden.
  for resume_step, steps in ((0, (4, 8)), (4, (6,))):
    writer = metrics_writer.MetricsWriter(str(tmp_path), resume_step, say=lambda line: None)
    for step in steps:
      writer.write(step, 'train', record)
    writer.write(steps[-1], 'valid', record | {'loss': float(steps[-1])})
    writer.close()
  events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  names = [
    'loss',
    'tokens',
    'router/max_violation/layer_0',
    'router/max_violation/layer_1',
    'router/dead_experts/layer_0',
    'router/dead_experts/layer_1',
    'anything/new/layer_0',
    'domains/prose/loss',
    'domains/verse/loss',
  ]
  assert set(events.Tags()['scalars']) == {
    f'{split}/{name}' for split in ('train', 'valid') for name in names
  }
  points = lambda tag: [(e.step, e.value) for e in events.Scalars(tag)]  # noqa: E731
  assert points('train/router/max_violation/layer_1') == [(4, 1.5), (6, 1.5)]
  assert points('train/router/dead_experts/layer_1') == [(4, 3.0), (6, 3.0)]
  assert points('valid/loss') == [(6, 6.0)]
