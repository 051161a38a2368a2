"""Shared parts of figures."""

import numpy as np
import pytest

from moe_jax.results import panels


@pytest.mark.parametrize(
  ('name', 'lines'),
  [
    ('two words', ['two words']),
    ('some more words', ['some more', 'words']),
    # Between words first, then after what joins the parts of one, then anywhere.
    ('a num_experts=4', ['a', 'num_', 'experts=4']),
    ('load=0.00001', ['load=0.', '00001']),
    ('abcdefghijklm', ['abcdefghij', 'klm']),
    ('$x$', [r'\$x\$']),
    ('', ['']),
  ],
)
def test_names_are_broken_where_they_can_be_read(name, lines):
  assert panels.wrapped(name, 10).split('\n') == lines


def test_the_interval_is_of_student():
  mean, half = panels.mean_and_interval([1.0, 2.0, 3.0])
  assert mean == 2
  # The table's t of 97.5% with 2 degrees of freedom.
  assert half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
  mean, half = panels.mean_and_interval([[1.0, 5.0]])
  assert mean.tolist() == [1, 5] and np.isnan(half).all()
