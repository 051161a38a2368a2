"""What do more experts give at equal active FLOPs?

python -m moe_jax.sweep --study=experiments/expert_count/study.py --workdir=runs/expert_count
"""

from experiments import base
from moe_jax.study import Comparison, Point, Study, chain, point, product, where, zipped

# Hidden units of a dense layer; k experts share them.
HIDDEN = 512
# Arms that a machine of two cores finishes; the rest of the grid comes after them.
FIRST = (4, 16, 64)


def get_study():
  """Returns the study at the longer horizon; `expert_count_short` has half of it."""
  return study_of('expert_count', base.small())


def study_of(name, config):
  """Returns the study with another base config, whose horizon is the difference."""
  return Study(
    name=name,
    question='What do more experts give at equal active FLOPs?',
    base=config,
    arms=chain(
      point('dense', {'moe.num_experts': 0}),
      _grid(FIRST, (1, 2)),
      _grid(FIRST, (4,)),
      _grid((2, 8, 32), (1, 2, 4)),
    ),
    seeds=(0, 1, 2, 3, 4),
    baseline='dense',
    comparisons=(
      Comparison('num_experts=4, k=2', 'dense'),
      Comparison('num_experts=16, k=2', 'num_experts=4, k=2'),
      Comparison('num_experts=64, k=2', 'num_experts=16, k=2'),
      Comparison('num_experts=16, k=1', 'num_experts=16, k=2'),
    ),
    # The router's own matmuls grow with E: at 64 experts they are a few percent.
    may_differ=('compute',),
    x='moe.num_experts',
    lines='moe.num_selected_experts',
    scaling=True,
  )


def _grid(num_experts, num_selected):
  selected = zipped(
    {
      'moe.num_selected_experts': num_selected,
      'moe.mlp_dim': tuple(HIDDEN // k for k in num_selected),
      'moe.renormalize': tuple('none' if k == 1 else 'before_drop' for k in num_selected),
    }
  )
  # The name says k and E; the other two fields follow from k.
  selected = tuple(Point(f'k={p.changes["moe.num_selected_experts"]}', p.changes) for p in selected)
  return where(
    product({'moe.num_experts': num_experts}, selected),
    lambda c: c['moe.num_selected_experts'] < c['moe.num_experts'],
    'every expert would be selected',
  )
