"""Figures of experts: all arms on one scale, each seed and dead expert to be seen."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_jax.results import expert_figures, style
from moe_jax.results.records import FINISHED
from moe_jax.study import labels_of
from tests.results import example

STUDY, RECORDS = example.study(), example.records()
MOE = [arm.name for arm in STUDY.arms if not arm.dropped and arm.name != 'dense']
LABELS = [labels_of(STUDY)[arm] for arm in MOE]


def _title(figure):
  return figure.get_suptitle().replace('\n', ' ')


def _labels(axes):
  return [text.get_text().replace('\n', ' ') for text in axes.get_yticklabels()]


def test_load_shows_every_expert_of_every_seed():
  figure = expert_figures.load(STUDY, RECORDS)
  assert _title(figure) == 'expert_count: load of experts; cross: no assignment'
  assert [axes.get_title() for axes in figure.axes] == ['MoE layer 0', 'MoE layer 1']
  assert _labels(figure.axes[0]) == LABELS
  for layer, axes in enumerate(figure.axes):
    points = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == 'o'])
    loads = [
      np.array(record.load[-1][1][layer]) * len(record.load[-1][1][layer])
      for record in RECORDS
      if record.status == FINISHED and record.load
    ]
    np.testing.assert_allclose(np.sort(points), np.sort(np.concatenate(loads)))
    # Balance is marked.
    assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]


def test_a_dead_expert_is_a_cross():
  record = next(r for r in RECORDS if r.arm == MOE[0] and r.status == FINISHED)
  record = dataclasses.replace(record, load=[[1000, [[0.0, 0.5, 0.5, 0.0]]]])
  (axes,) = expert_figures.load(STUDY, [record]).axes
  (crosses,) = [line for line in axes.lines if line.get_marker() == 'x']
  assert crosses.get_xdata().tolist() == [0, 0]


@pytest.mark.parametrize(('num_layers', 'shown'), [(3, [0, 1, 2]), (7, [0, 2, 4, 6])])
def test_of_many_layers_four_are_shown(num_layers, shown):
  record = next(r for r in RECORDS if r.arm == MOE[0] and r.status == FINISHED)
  record = dataclasses.replace(record, load=[[1, record.load[-1][1][:1] * num_layers]])
  titles = [axes.get_title() for axes in expert_figures.load(STUDY, [record]).axes]
  assert titles == [f'MoE layer {layer}' for layer in shown]


def test_load_by_domain_has_one_scale_and_loses_no_expert():
  figure = expert_figures.domain_load(STUDY, RECORDS)
  panels = [axes for axes in figure.axes if axes.get_visible() and axes.images]
  titles = [axes.get_title(loc='left').replace('\n', ' ') for axes in panels]
  assert titles == LABELS
  norms = {id(axes.images[0].norm) for axes in panels}
  assert len(norms) == 1
  for axes, arm in zip(panels, MOE, strict=True):
    record = next(r for r in RECORDS if r.arm == arm and r.status == FINISHED)
    loads = [
      np.array(record.domains['capacity'][domain]['router/load'][-1]) for domain in example.DOMAINS
    ]
    image = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(np.sort(image), np.sort(np.array(loads) * len(loads[0])))
    # Experts stand by the domain that loads them most.
    assert (np.diff(image.argmax(0)) >= 0).all()
  assert tuple(_labels(panels[0])) == example.DOMAINS
  assert 'last layer' in _title(figure)


def test_specialization_is_drawn_of_what_there_is():
  paths = ('expert_domain_mi', 'coactivation')
  records = [
    dataclasses.replace(
      record,
      metrics=record.metrics
      | {f'dropless/router/{path}': [0.1 * record.seed, 0.3] for path in paths},
    )
    if record.status == FINISHED and record.arm != 'dense'
    else record
    for record in RECORDS
  ]
  figure = expert_figures.specialization(STUDY, records)
  assert [axes.get_xlabel().replace('\n', ' ') for axes in figure.axes] == [
    'expert-domain MI, bits',
    'coactivation',
  ]
  axes = figure.axes[0]
  assert _labels(axes) == LABELS
  whole = MOE.index(example.TOP_2.format(4))
  seeds = [
    line
    for line in axes.lines
    if len(line.get_xdata()) > 1 and line.get_marker() == 'o' and line.get_ydata()[0] == whole
  ]
  # Means over layers 0.15, 0.2 and 0.25.
  np.testing.assert_allclose(seeds[0].get_xdata(), [0.15, 0.2, 0.25])


@pytest.mark.parametrize(('highest', 'ticks'), [(2, [0.5, 1, 1.5, 2]), (3, [0.5, 1, 2, 3])])
def test_the_colour_bar_is_marked_at_round_loads(highest, ticks):
  figure = Figure()
  axes = figure.subplots()
  loads = np.array([[0.5, highest]])
  image = axes.imshow(loads, norm=style.load_norm([loads]), cmap=style.LOAD_COLORS)
  image.set_clim(vmax=highest)
  assert style.load_bar(figure, image, axes, False).get_ticks().tolist() == ticks
