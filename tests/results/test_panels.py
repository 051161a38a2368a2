"""What figures share."""

import numpy as np
import pytest

from moe_jax.results import panels


def test_the_interval_is_of_student():
  mean, half = panels.mean_and_interval([1.0, 2.0, 3.0])
  assert mean == 2
  # The table's t of 97.5% with 2 degrees of freedom.
  assert half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
  mean, half = panels.mean_and_interval([[1.0, 5.0]])
  assert mean.tolist() == [1, 5] and np.isnan(half).all()
