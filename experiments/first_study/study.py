"""The study of the README: does a balancing loss keep experts from specialising?"""

from configs import quickstart
from moe_jax.study import Comparison, Metric, Study, product


def get_study():
  """Returns two arms with three seeds each, which takes minutes."""
  base = quickstart.get_config()
  base.update({'mesh': {'data': 1, 'expert': 1}, 'train': {'num_steps': 150, 'eval_every': 0}})
  return Study(
    name='first_study',
    question='Does a balancing loss keep experts from specialising?',
    base=base,
    arms=product({'moe.load_balancing_weight': (0.0, 0.05)}),
    seeds=(0, 1, 2),
    metric=Metric('dropless/router/expert_token_mi/mean', 'bits', lower_is_better=False),
    baseline='load_balancing_weight=0.0',
    comparisons=(Comparison('load_balancing_weight=0.05', 'load_balancing_weight=0.0'),),
  )
