"""What do more experts give at equal active FLOPs?

python -m moe_jax.sweep --study=experiments/expert_count/study.py --workdir=runs/expert_count

The arms that answer the planned comparisons stand first; on two cores the rest can wait.
"""

from experiments import base
from moe_jax.study import Comparison, Study, chain, point, product, where, zipped

# Hidden units of a dense layer; k experts share them.
HIDDEN = 512


def get_study():
  """Returns the study."""
  selected = zipped(
    {
      'moe.num_selected_experts': (1, 2, 4),
      'moe.mlp_dim': (HIDDEN, HIDDEN // 2, HIDDEN // 4),
      'moe.renormalize': ('none', 'before_drop', 'before_drop'),
    }
  )
  # The name says k and E; the other two fields follow from k.
  selected = tuple(p._replace(name=f'k={p.changes["moe.num_selected_experts"]}') for p in selected)
  grid = product({'moe.num_experts': (4, 16, 64, 2, 8, 32)}, selected)
  grid = where(
    grid,
    lambda c: c['moe.num_selected_experts'] < c['moe.num_experts'],
    'every expert would be selected',
  )
  # 2 experts do not divide over 4 devices of the expert axis.
  grid = tuple(
    p._replace(changes={**p.changes, 'mesh.data': 4, 'mesh.expert': 2})
    if p.changes['moe.num_experts'] == 2
    else p
    for p in grid
  )
  config = base.small(num_steps=1500)
  return Study(
    name='expert_count',
    question='What do more experts give at equal active FLOPs?',
    base=config,
    arms=chain(point('dense', {'moe.num_experts': 0}), grid),
    seeds=(0, 1, 2),
    baseline='dense',
    comparisons=(
      Comparison('num_experts=4, k=2', 'dense'),
      Comparison('num_experts=16, k=2', 'num_experts=4, k=2'),
      Comparison('num_experts=64, k=2', 'num_experts=16, k=2'),
      Comparison('num_experts=16, k=1', 'num_experts=16, k=2'),
    ),
    # The router's own products grow with E: at 64 experts they are a few percent.
    may_differ=('compute',),
    x='moe.num_experts',
    lines='moe.num_selected_experts',
  )
