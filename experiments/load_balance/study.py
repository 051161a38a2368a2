"""How strong, and over what, should balance be asked for?

python -m moe_jax.sweep --study=experiments/load_balance/study.py --workdir=runs/load_balance
"""

from experiments import base
from moe_jax.study import Comparison, Study, chain, point, product

WEIGHT = 'moe.load_balancing_weight'


def get_study():
  """Returns the study."""
  by_weight = product({WEIGHT: (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)})
  by_scope = chain(
    point('sequence, weight=0.01', {WEIGHT: 1e-2, 'moe.balance_scope': 'sequence'}),
    point('device, weight=0.01', {WEIGHT: 1e-2, 'moe.balance_scope': 'device'}),
  )
  bias = point('loss-free bias', {WEIGHT: 0.0, 'moe.router': 'loss_free', 'moe.score': 'sigmoid'})
  best = f'{WEIGHT.rpartition(".")[2]}=0.01'
  return Study(
    name='load_balance',
    question='How strong, and over what, should balance be asked for?',
    base=base.small(num_steps=1500),
    arms=chain(by_weight, by_scope, bias),
    seeds=(0, 1, 2),
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
