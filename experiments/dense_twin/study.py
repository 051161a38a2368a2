"""Is the quick start's mixture better than a dense model of the same active FLOPs?

python -m moe_jax.sweep --study=experiments/dense_twin/study.py --workdir=runs/dense_twin
"""

from configs import dense_matched, quickstart
from moe_jax.study import Comparison, Study, chain, point


def get_study():
  """Returns the study."""
  base = quickstart.get_config()
  # Results do not depend on the mesh; on CPUs, one worker per core is faster than a mesh.
  base.mesh.update(data=1, expert=1)
  # Half as long again as the quick start: at 400 steps three seeds left the answer open.
  base.train.update(num_steps=600, eval_every=0, log_every=20)
  dense = dense_matched.get_config('quickstart')
  return Study(
    name='dense_twin',
    question='Is the quick start better than a dense model of the same active FLOPs?',
    base=base,
    arms=chain(
      point('8 experts, k=2', {}),
      point('dense', {'model.mlp_dim': dense.model.mlp_dim, 'moe.num_experts': 0}),
    ),
    seeds=(0, 1, 2, 3, 4),
    baseline='dense',
    comparisons=(Comparison('8 experts, k=2', 'dense'),),
  )
