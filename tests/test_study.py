"""The algebra that makes the arms of a study, by hand."""

import pytest

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
