"""Which learning rate is best for each family on the validation split? Point 3 of PROTOCOL.md.

python -m moe_jax.sweep --study=experiments/learning_rate/study.py --workdir=runs/learning_rate
"""

from experiments import base
from moe_jax.study import Metric, Study, chain, point, product

RATES = {'optim.learning_rate': (2e-3, 4e-3, 8e-3)}


def get_study():
  """Returns the study: one seed, which no other study uses, and half their steps."""
  families = chain(
    point('num_experts=16', {'moe.num_experts': 16}),
    point('dense', {'moe.num_experts': 0}),
    point('num_experts=4', {'moe.num_experts': 4}),
    point('num_experts=64', {'moe.num_experts': 64}),
  )
  return Study(
    name='learning_rate',
    question='Which learning rate is best for each family on the validation split?',
    base=base.small(num_steps=500),
    arms=product(families, RATES),
    seeds=(100,),
    metric=Metric('dropless/bits_per_byte'),
    evaluations=('dropless',),
    split='valid',
    may_differ=('compute',),
    x='optim.learning_rate',
    lines='moe.num_experts',
  )
