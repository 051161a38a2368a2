"""What do policies that see the future gain in training, and lose in decoding?

python -m moe_jax.sweep --study=experiments/dropping/study.py --workdir=runs/dropping
"""

from experiments import base
from moe_jax.study import Comparison, Metric, Study, chain, product

FACTOR, PRIORITY = 'moe.capacity_factor', 'moe.priority'


def get_study():
  """Returns the study."""
  return Study(
    name='dropping',
    question='What do policies that see the future gain in training, and lose in decoding?',
    base=base.small(),
    # The factor at which most is dropped first; 2.0 drops next to nothing.
    arms=chain(
      product({FACTOR: (0.5, 1.0), PRIORITY: ('token', 'choice', 'priority', 'random')}),
      product({FACTOR: (2.0,), PRIORITY: ('token', 'choice', 'priority', 'random')}),
    ),
    seeds=(0, 1, 2, 3, 4),
    metric=Metric('causal/bits_per_byte'),
    baseline='capacity_factor=1.0, priority=token',
    comparisons=tuple(
      Comparison(f'capacity_factor={c}, priority={p}', f'capacity_factor={c}, priority=token')
      for c in (0.5, 1.0)
      for p in ('choice', 'priority', 'random')
    ),
    evaluations=('causal', 'capacity', 'dropless'),
    x=FACTOR,
    lines=PRIORITY,
  )
