"""Prints what each policy gains over `token` in its own evaluation and loses in the causal one.

python -m experiments.dropping.differences

Differences are paired by seed: mean and half the width of the 95% interval of Student t, bits per
byte of the test split; of training, nats per token over the last 100 steps.
"""

import json
import pathlib

import numpy as np
from scipy import stats

RESULTS = pathlib.Path(__file__).parent / 'results.jsonl'
POLICIES = ('choice', 'priority', 'random')
# Of the curve, points of 20 steps each.
LAST = 5


def _value(record, metric):
  if metric == 'training':
    return np.mean([loss for _, loss in record['curve'][-LAST:]])
  return record['metrics'][f'{metric}/bits_per_byte']


def _difference(records, arm, reference, metric):
  finished = [record for record in records if record['status'] == 'finished']
  one, other = (
    {r['seed']: _value(r, metric) for r in finished if r['arm'] == name}
    for name in (arm, reference)
  )
  differences = np.array([one[seed] - other[seed] for seed in sorted(one)])
  half = stats.t.ppf(0.975, differences.size - 1) * stats.sem(differences)
  return f'{differences.mean():+.3f} ± {half:.3f}'


def main():
  records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
  metrics = ('training', 'capacity', 'causal', 'dropless')
  print(f'{"factor":<8}{"policy":<10}' + ''.join(f'{name:<18}' for name in metrics))
  for factor in (0.5, 1.0, 2.0):
    for policy in POLICIES:
      arm, reference = (f'capacity_factor={factor}, priority={name}' for name in (policy, 'token'))
      row = [_difference(records, arm, reference, metric) for metric in metrics]
      print(f'{factor:<8}{policy:<10}' + ''.join(f'{text:<18}' for text in row))


if __name__ == '__main__':
  main()
