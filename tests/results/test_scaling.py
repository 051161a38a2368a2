"""The law over experts: planted ones are found, and none is claimed that the data do not carry."""

import numpy as np
import pytest

from moe_jax.results import scaling
from moe_jax.study import Point
from tests.results import made

EXPANSIONS = (1, 4, 16, 64, 256)


def study_and_records(log_values, noise=0.0, selected=1, expansions=EXPANSIONS, seeds=3):
  """Arms with log10 metric `log_values(E)`; seeds shift all arms, and noise each trial."""
  rng = np.random.default_rng(0)
  arms, records = [], []
  for expansion in expansions:
    num_experts = 0 if expansion == 1 else expansion * selected
    changes = {'num_experts': num_experts, 'num_selected_experts': selected}
    name = f'E={expansion}'
    arms.append(Point(name, {}))
    for seed in range(seeds):
      log_value = log_values(np.array([float(expansion)]))[0] + 0.01 * seed + noise * rng.normal()
      value, config = float(10**log_value), made.make_config(**changes)
      records.append(made.make_record(name, seed, value, config=config))
  return made.make_study(arms), records


def test_expansion_with_saturation_by_hand():
  # E_max = 4: start = 1 / (1 - 1/4) = 4/3. E = 1: 1 / (3/4 + 1/4) = 1. E = 3: E - 1 + 4/3 = 10/3,
  # 1 / (3/10 + 1/4) = 20/11. E to infinity: 4.
  found = scaling.saturating(np.array([1.0, 3.0, 1e12]), 4.0)
  np.testing.assert_allclose(found, [1, 20 / 11, 4], rtol=1e-9)
  np.testing.assert_allclose(scaling.saturating(np.array([1.0, 64.0]), 1e9), [1, 64], rtol=1e-6)


def test_a_planted_law_with_saturation_is_found():
  law = lambda e: 0.3 - 0.08 * np.log10(scaling.saturating(e, 40.0))  # noqa: E731
  (found,) = scaling.fit(*study_and_records(law, noise=1e-4))
  assert found.expansions == EXPANSIONS and found.why_not == ''
  assert found.curvature.low > 0 and found.slope.high < 0
  slope, most = found.saturated
  assert slope == pytest.approx(-0.08, rel=0.02) and most == pytest.approx(40, rel=0.1)


def test_a_power_law_has_its_slope_and_no_saturation():
  study, records = study_and_records(lambda e: 0.3 - 0.02 * np.log10(e), noise=1e-3)
  (found,) = scaling.fit(study, records)
  assert found.slope.low < -0.02 < found.slope.high < 0
  assert found.saturated is None and 'do not carry' in found.why_not
  text = scaling.markdown(study, [found])
  assert '| 1 | 1, 4, 16, 64, 256 | -0.0' in text and '| - | - | the data do not' in text


def test_each_number_of_selected_experts_has_its_law_and_shares_the_dense_arm():
  study, records = study_and_records(lambda e: 0.3 - 0.02 * np.log10(e))
  more = study_and_records(lambda e: 0.3 - 0.04 * np.log10(e), selected=2, expansions=(2, 8, 32))[1]
  one, two = scaling.fit(study, records + more)
  assert (one.num_selected_experts, two.num_selected_experts) == (1, 2)
  assert two.expansions == (1, 2, 8, 32)
  assert two.slope.mean == pytest.approx(-0.04) and one.slope.mean == pytest.approx(-0.02)


def test_too_few_points_and_unfinished_trials_are_not_fitted():
  study, records = study_and_records(lambda e: -0.02 * np.log10(e), expansions=(1, 4))
  (found,) = scaling.fit(study, records)
  assert found.slope.num == 0 and found.why_not == 'not fitted: 2 expansions and 3 seeds that ' + (
    'have all of them'
  )
  study, records = study_and_records(lambda e: -0.02 * np.log10(e), expansions=(1, 4, 16))
  # Only the seeds that have all expansions enter.
  lost = made.make_record(records[-1].arm, 2, status='failed', config=records[-1].config)
  (found,) = scaling.fit(study, [*records[:-1], lost])
  assert found.slope.num == 2 and found.slope.mean == pytest.approx(-0.02)
  assert found.why_not == '3 expansions say nothing of saturation' and found.saturated is None
