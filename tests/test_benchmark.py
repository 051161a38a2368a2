"""The benchmark of packing runs; no test looks at what it measures."""

import json

from tests import tiny


def test_sweep_prints_a_ratio_for_each_size_of_pack(tmp_path):
  path = tiny.config_file(tmp_path)
  result = tiny.command('benchmark', 'sweep', f'--config={path}', '--num_trials=2,3', '--json')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_trials'] for row in rows] == [2, 3]
  for row in rows:
    assert row['gain']['low'] <= row['gain']['median'] <= row['gain']['high']
    assert row['void'] == (not 0.95 <= row['null']['median'] <= 1.05)
  for flags in (['--num_trials=1'], ['--rounds=3']):
    result = tiny.command('benchmark', 'sweep', f'--config={path}', *flags)
    result.assert_error(flags[0].partition('=')[0])
