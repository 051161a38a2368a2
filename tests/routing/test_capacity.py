"""Capacity is exact: no float rounds a whole number of slots up."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import routing
from tests import oracle


@pytest.mark.parametrize(
  ('group_size', 'num_experts', 'num_selected', 'factor', 'slots'),
  [
    (16, 8, 2, 1.0, 4),  # 16 * 2 / 8 = 4
    (16, 8, 2, 1.25, 5),  # 4 * 5/4 = 5
    (16, 8, 2, 1.26, 6),  # 4 * 1.26 = 5.04
    (100, 1, 1, 1.1, 110),  # 110 exactly; the binary 1.1 lies above 11/10 and gives 111
    (50, 5, 1, 1.1, 11),
    (30, 3, 1, 0.7, 7),
    (10, 10, 3, 1.0 / 3.0, 1),  # 0.3333333333333333 * 3 = 0.9999999999999999
    (3, 8, 1, 0.5, 1),  # 3/16: at least one slot
    (1, 8, 1, 1e-9, 1),
    (7, 8, 8, 1.0, 7),  # E - 1 tokens, K = E: one slot per token
    (7, 8, 8, 4.0, 28),  # more than a group can fill; the layer cuts it to S
    (2**24 + 1, 1, 1, 1.0, 2**24 + 1),  # not a float32
  ],
)
def test_by_hand(group_size, num_experts, num_selected, factor, slots):
  assert routing.expert_capacity(group_size, num_experts, num_selected, factor) == slots


def test_does_not_round_up_where_float32_does():
  # 12960 * 1.2 / 4 = 3888, but in float32 12960 * 1.2f / 4 = 3888.0002 -> 3889.
  rounded = np.ceil(np.float32(12960) * np.float32(1.2) / np.float32(4))
  assert rounded == 3889
  assert routing.expert_capacity(12960, 4, 1, 1.2) == 3888


@hypothesis.given(
  st.integers(1, 5000), st.integers(1, 64), st.integers(1, 400), st.integers(0, 2), st.data()
)
def test_matches_the_fraction(group_size, num_experts, digits, decimals, data):
  num_selected = data.draw(st.integers(1, num_experts))
  factor = f'{digits}e-{decimals}'
  slots = routing.expert_capacity(group_size, num_experts, num_selected, float(factor))
  assert slots == oracle.capacity(group_size, num_experts, num_selected, factor)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((16, 8, 2, 0.0), 'capacity_factor=0.0'),
    ((16, 8, 2, -1.0), 'capacity_factor=-1.0'),
    ((16, 8, 2, float('inf')), 'capacity_factor=inf'),
    ((16, 8, 2, float('nan')), 'capacity_factor=nan'),
    ((16, 8, 9, 1.0), 'num_selected_experts=9.*num_experts=8'),
    ((16, 8, 0, 1.0), 'num_selected_experts=0'),
    ((0, 8, 2, 1.0), 'group_size=0'),
  ],
)
def test_names_the_bad_value(arguments, message):
  with pytest.raises(ValueError, match=message):
    routing.expert_capacity(*arguments)
