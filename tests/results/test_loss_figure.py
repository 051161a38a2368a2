"""The figure of training loss: means over the same seeds, and no arm hidden by another."""

import dataclasses

import numpy as np
import pytest

from moe_jax.results import loss_figure
from moe_jax.results.records import FINISHED
from moe_jax.study import labels_of
from tests.results import example

STUDY, RECORDS = example.study(), example.records()
MOE = [arm.name for arm in STUDY.arms if not arm.dropped and arm.name != 'dense']
LABELS = [labels_of(STUDY)[arm] for arm in MOE]
# With a trial that failed and one that diverged.
FEW = [record for record in RECORDS if record.arm in ('dense', *MOE[3:5])]


def _title(figure):
  return figure.get_suptitle().replace('\n', ' ')


def _drawn(axes, color):
  """Lines of a colour with more than one point."""
  return [line for line in axes.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def test_few_arms_stand_together_with_a_legend_above():
  figure = loss_figure.loss_curves(STUDY, FEW)
  (axes,) = figure.axes
  legend = axes.get_legend()
  assert [text.get_text().replace('\n', ' ') for text in legend.get_texts()] == [
    'dense', *LABELS[3:5]
  ]  # fmt: skip
  assert axes.get_xlabel() == 'optimizer step'
  assert axes.get_ylabel() == 'training loss (nats per token)'
  # A diverged trial does not set the scale.
  assert axes.get_ylim()[1] < 4
  assert legend.get_bbox_to_anchor().y0 > axes.bbox.y1
  styles = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
  assert len(styles) == 3


def test_means_are_over_the_same_seeds():
  # Of 3 arms one has lost seed 2, another seed 1: seeds 0, 1, 2 are those of dense alone, which
  # counts 3; each pair counts 2 x 2 = 4, and the smaller one is taken. The arm without seed 1 is
  # dashed, over seed 0 alone.
  figure = loss_figure.loss_curves(STUDY, FEW)
  assert loss_figure.shared_seeds(_by_arm(FEW)) == (0, 1)
  assert _title(figure) == 'expert_count: training loss, mean of seeds 0, 1; dashed: of fewer'
  (axes,) = figure.axes
  colors = [line.get_color() for line in axes.get_legend().get_lines()]
  for color, arm, seeds in zip(colors, ('dense', *MOE[3:5]), ((0, 1), (0,), (0, 1)), strict=True):
    curves = {r.seed: np.array(r.curve) for r in FEW if r.arm == arm and r.status == FINISHED}
    mean, *lost = _drawn(axes, color)
    np.testing.assert_allclose(
      mean.get_ydata(), np.mean([curves[seed][:, 1] for seed in seeds], axis=0)
    )
    assert (mean.get_linestyle() == '-') == (len(seeds) == 2)
    assert all(line.get_linestyle() == ':' for line in lost)
  # Intervals only of arms with all these seeds.
  assert len(axes.collections) == 2


def test_many_arms_stand_apart_on_one_scale():
  figure = loss_figure.loss_curves(STUDY, RECORDS)
  panels = [axes for axes in figure.axes if axes.get_visible()]
  titles = [axes.get_title(loc='left').replace('\n', ' ') for axes in panels]
  assert titles == ['dense', *LABELS]
  assert len({axes.get_ylim() for axes in panels}) == 1
  assert '; black: dense, grey: others' in _title(figure)
  for axes, arm in zip(panels, ('dense', *MOE), strict=True):
    (own,) = [line for line in axes.lines if line.get_lw() == 1.4]
    assert len([line for line in axes.lines if line.get_color() == 'black']) == (arm != 'dense')
    assert len([line for line in axes.lines if line.get_color() == '0.85']) == 6 - (arm != 'dense')
    assert own.get_color() not in ('black', '0.85')
  assert figure._supxlabel.get_text() == (
    'dotted, not in the means: 1 diverged, 1 failed, 1 unfinished'
    if any(r.status == 'failed' and r.curve for r in RECORDS)
    else 'dotted, not in the means: 1 diverged, 1 unfinished'
  )


def test_loss_is_averaged_at_steps_that_all_seeds_have():
  trials = [record for record in RECORDS if record.arm == 'dense']
  trials[1] = dataclasses.replace(trials[1], curve=trials[1].curve[::3])
  (axes,) = loss_figure.loss_curves(STUDY, trials).axes
  steps = [step for step, _ in trials[1].curve]
  assert axes.lines[1].get_xdata().tolist() == steps


@pytest.mark.parametrize(
  ('finished', 'shared'),
  [
    ({'a': (0, 1, 2), 'b': (0, 1, 2)}, (0, 1, 2)),
    # 2 arms x 3 seeds are more than 3 arms x 1.
    ({'a': (0, 1, 2), 'b': (0, 1, 2), 'c': (0,)}, (0, 1, 2)),
    ({'a': (0, 1, 2, 3, 4), 'b': (0, 1, 2), 'c': (0, 1, 2)}, (0, 1, 2)),
    ({'a': (0,), 'b': (1,)}, (0,)),
    ({'a': ()}, ()),
  ],
)
def test_shared_seeds(finished, shared):
  template = RECORDS[0]
  arms = {
    arm: [dataclasses.replace(template, arm=arm, seed=seed) for seed in seeds]
    for arm, seeds in finished.items()
  }
  assert loss_figure.shared_seeds(arms) == shared


def _by_arm(records):
  arms = {}
  for record in records:
    arms.setdefault(record.arm, []).append(record)
  return arms


def test_bands_are_in_the_range_unless_they_are_far_wider_than_curves_are_apart():
  steps, losses = np.arange(11), np.linspace(2, 1, 11)
  # From step 1 on curves lie in 1.0..1.9, bands in 0.8..2.1; the margin is a twentieth of 1.3.
  found = loss_figure._loss_range([(steps, losses, np.full(11, 0.2)), (steps, losses, None)])
  np.testing.assert_allclose(found, (0.8 - 0.065, 2.1 + 0.065))
  # As much again, 0.9, on each side at most: 0.1..2.8.
  found = loss_figure._loss_range([(steps, losses, np.full(11, 50.0))])
  np.testing.assert_allclose(found, (0.1 - 0.135, 2.8 + 0.135))
  alone = loss_figure._loss_range([(steps, losses, np.full(11, np.nan))])
  np.testing.assert_allclose(alone, (1.0 - 0.045, 1.9 + 0.045))
