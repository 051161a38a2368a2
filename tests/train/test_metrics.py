"""What a resume does with the lines of metrics.jsonl, and what the router metrics are."""

import json

import numpy as np

from moe_jax import routing
from moe_jax.train import metrics


def test_a_damaged_line_costs_no_other_line(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  good = [json.dumps({'step': step, 'split': 'train', 'loss': 1.0}) for step in (10, 20, 30)]
  damaged = '\n'.join([good[0], 'garbage', '7', good[1], good[2]]) + '\n'
  path.write_text(damaged)
  metrics._keep_until(path, 20, False)
  assert [record['step'] for record in metrics.read_metrics(path)] == [10, 20]
  assert (tmp_path / 'metrics.damaged').read_text() == damaged
  assert 'damaged lines' in capsys.readouterr().out


def test_a_cut_last_line_is_no_damage(tmp_path, capsys):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps({'step': 10, 'split': 'train'}) + '\n{"step": 2')
  metrics._keep_until(path, 10, False)
  assert [record['step'] for record in metrics.read_metrics(path)] == [10]
  assert not (tmp_path / 'metrics.damaged').exists() and not capsys.readouterr().out


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
