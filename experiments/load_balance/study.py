"""How strong, and over what, should balance be asked for?

python -m moe_jax.sweep --study=experiments/load_balance/study.py --workdir=runs/load_balance
"""

from experiments import base
from moe_jax.study import Comparison, Study, chain, point, product

WEIGHT = 'moe.load_balancing_weight'


def get_study():
  """Returns the study."""
  # Arms of the planned comparisons stand first: on small machines the others come last.
  best = 'load_balancing_weight=0.01'
  arms = chain(
    product({WEIGHT: (0.01, 0.0, 1.0)}),
    point('loss-free bias', {WEIGHT: 0.0, 'moe.router': 'loss_free', 'moe.score': 'sigmoid'}),
    point('sequence, weight=0.01', {WEIGHT: 0.01, 'moe.balance_scope': 'sequence'}),
    point('device, weight=0.01', {WEIGHT: 0.01, 'moe.balance_scope': 'device'}),
    product({WEIGHT: (1e-1, 1e-3, 1e-4)}),
  )
  return Study(
    name='load_balance',
    question='How strong, and over what, should balance be asked for?',
    base=base.small(),
    arms=arms,
    seeds=(0, 1, 2, 3, 4),
    baseline=best,
    comparisons=(
      Comparison('load_balancing_weight=0.0', best),
      Comparison('load_balancing_weight=1.0', best),
      Comparison('sequence, weight=0.01', best),
      Comparison('device, weight=0.01', best),
      Comparison('loss-free bias', best),
    ),
    x=WEIGHT,
  )
