"""The algebra that makes the arms of a study, by hand."""

import pytest

from moe_jax import config as config_lib
from moe_jax import study
from moe_jax.errors import UserError


def names(grid):
  return [p.name for p in grid]


def test_product_of_fields_and_grids():
  grid = study.product(
    study.chain(study.point('a', {'x.e': 1, 'x.k': 9}), study.point('b', {'x.e': 2})),
    {'x.k': (1, 2)},
  )
  assert names(grid) == ['a, k=1', 'a, k=2', 'b, k=1', 'b, k=2']
  # A later factor overrides a field of an earlier one.
  assert [p.changes for p in grid] == [
    {'x.e': 1, 'x.k': 1},
    {'x.e': 1, 'x.k': 2},
    {'x.e': 2, 'x.k': 1},
    {'x.e': 2, 'x.k': 2},
  ]


def test_zipped_goes_through_its_fields_together():
  grid = study.zipped({'m.e': (4, 8), 'm.f': (64, 32)})
  assert names(grid) == ['e=4, f=64', 'e=8, f=32']
  with pytest.raises(UserError, match='equally many'):
    study.zipped({'m.e': (4, 8), 'm.f': (64,)})


def test_where_keeps_what_it_drops_with_the_first_reason():
  grid = study.product({'m.e': (2, 4), 'm.k': (1, 4)})
  grid = study.where(grid, lambda c: c['m.k'] <= c['m.e'], 'k > E')
  grid = study.where(grid, lambda c: c['m.e'] > 2, 'too few')
  assert [(p.name, p.dropped) for p in grid] == [
    ('e=2, k=1', 'too few'),
    ('e=2, k=4', 'k > E'),
    ('e=4, k=1', ''),
    ('e=4, k=4', ''),
  ]
  # A product with a dropped arm is dropped.
  assert study.product(grid[1:2], {'m.z': (0, 1)})[1].dropped == 'k > E'


def labels(*grids):
  base = config_lib.get_config()
  return study.labels_of(study.Study('s', 'Does it?', base, study.chain(*grids), (0,)))


def test_labels_say_in_short_what_differs():
  factor, policy = {'moe.capacity_factor': (0.5, 1.0)}, {'moe.priority': ('token', 'random')}
  grid = study.product({'moe.num_experts': (8,)}, factor, policy)
  # All arms have 8 experts.
  assert labels(grid) == {
    'num_experts=8, capacity_factor=0.5, priority=token': 'CF=0.5, token',
    'num_experts=8, capacity_factor=0.5, priority=random': 'CF=0.5, random',
    'num_experts=8, capacity_factor=1.0, priority=token': 'CF=1.0, token',
    'num_experts=8, capacity_factor=1.0, priority=random': 'CF=1.0, random',
  }
  # Here one has not; names that the study gave stay, and fields without a short form.
  more = study.product(
    study.point('dense twin', {'moe.num_experts': 0}), {'moe.renormalize': ('none',)}
  )
  assert list(labels(grid[:1], more).values()) == [
    'E=8, CF=0.5, token', 'dense twin, renormalize=none',
  ]  # fmt: skip
  # A single arm has nothing to differ from.
  assert labels(study.zipped({'moe.num_experts': (4,)})) == {'num_experts=4': 'E=4'}


def test_labels_of_an_arm_that_has_its_own():
  axes = {'moe.num_experts': (4, 8), 'moe.num_selected_experts': (1, 2)}
  by_hand = study.product(axes, labels=('a', 'b', 'c', 'd'))
  assert list(labels(by_hand).values()) == ['a', 'b', 'c', 'd']
  by_rule = study.zipped(axes, labels=lambda changes: f'{changes["moe.num_experts"]} experts')
  assert list(labels(by_rule).values()) == ['4 experts', '8 experts']
  # A factor with a label gives it to the product.
  twin = study.point('dense twin', {'moe.num_experts': 0}, label='dense')
  grid = study.product(twin, {'optim.learning_rate': (0.1, 0.2)})
  assert list(labels(grid).values()) == ['dense, LR=0.1', 'dense, LR=0.2']
  with pytest.raises(UserError, match='must be 4, one for each arm'):
    study.product(axes, labels=('a', 'b'))


def test_labels_that_would_be_the_same_are_names():
  # Both fields end in `layers`.
  grid = study.chain(
    study.product({'model.num_layers': (2,), 'moe.every': (1, 2)}),
    study.point('L=2, every=1', {'moe.router': 'hash'}),
  )
  assert list(labels(grid).values()) == ['num_layers=2, every=1', 'L=2, every=2', 'L=2, every=1']
