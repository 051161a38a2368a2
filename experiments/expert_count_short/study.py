"""The same as `expert_count` at half the horizon.

python -m moe_jax.sweep --study=experiments/expert_count_short/study.py --workdir=runs/count_short
"""

from experiments import base
from experiments.expert_count.study import study_of


def get_study():
  """Returns the study."""
  return study_of('expert_count_short', base.small(num_steps=500))
