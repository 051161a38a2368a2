"""What a resume does with the lines of metrics.jsonl."""

import json

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
