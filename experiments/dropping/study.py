"""What do policies that see the future gain in training, and lose in decoding?

python -m moe_jax.sweep --study=experiments/dropping/study.py --workdir=runs/dropping
"""

from experiments import base
from moe_jax.study import Comparison, Metric, Study, product


def get_study():
  """Returns the study."""
  arms = product(
    {
      'moe.capacity_factor': (0.5, 1.0, 2.0),
      'moe.priority': ('token', 'choice', 'priority', 'random'),
    }
  )
  return Study(
    name='dropping',
    question='What do policies that see the future gain in training, and lose in decoding?',
    base=base.small(num_steps=1500),
    arms=arms,
    seeds=(0, 1, 2),
    metric=Metric('causal/bits_per_byte'),
    baseline='capacity_factor=1.0, priority=token',
    comparisons=tuple(
      Comparison(f'capacity_factor={c}, priority={p}', f'capacity_factor={c}, priority=token')
      for c in (0.5, 1.0)
      for p in ('choice', 'priority', 'random')
    ),
    evaluations=('causal', 'capacity', 'dropless'),
    x='moe.capacity_factor',
    lines='moe.priority',
  )
