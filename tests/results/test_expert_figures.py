"""Figures of the experts of one trial: what each shows."""

import dataclasses

import numpy as np

from moe_jax.results import expert_figures
from tests.results import example

STUDY, RECORDS = example.study(), example.records()
MOE = [arm.name for arm in STUDY.arms if not arm.dropped and arm.name != 'dense']


def test_load_is_relative_to_balance():
  arm = example.TOP_1.format(4)
  figure = expert_figures.load(STUDY, RECORDS, arm)
  # Seed 0 of this arm is unfinished.
  assert figure.get_suptitle().replace('\n', ' ') == f'{arm}, seed 1'
  record = next(r for r in RECORDS if (r.arm, r.seed) == (arm, 1))
  panels, bar = figure.axes[:2], figure.axes[2]
  assert bar.get_ylabel() == 'load x experts (1: balance)'
  for layer, axes in enumerate(panels):
    (mesh,) = axes.collections
    shares = np.array([load for _, load in record.load])[:, layer]
    np.testing.assert_allclose(mesh.get_array(), 4 * shares.T)
    assert mesh.norm(1.0) == 0.5
    assert axes.get_title() == f'MoE layer {layer}'
  title = expert_figures.load(STUDY, RECORDS, arm, seed=0).get_suptitle().replace('\n', ' ')
  assert title == f'{arm}, seed 0, unfinished at step 700'


def test_many_layers_wrap(tmp_path):
  record = next(r for r in RECORDS if r.arm == MOE[0])
  record = dataclasses.replace(record, load=[[step, load[:1] * 7] for step, load in record.load])
  figure = expert_figures.load(STUDY, [record], MOE[0])
  figure.savefig(tmp_path / 'load.png')
  assert len([axes for axes in figure.axes[:9] if axes.get_visible()]) == 7


def test_specialization_is_of_the_last_or_all_layers():
  arm = example.TOP_2.format(16)
  record = next(r for r in RECORDS if (r.arm, r.seed) == (arm, 0))
  last = expert_figures.specialization(STUDY, RECORDS, arm)
  every = expert_figures.specialization(STUDY, RECORDS, arm, evaluation='dropless', all_layers=True)
  assert [axes.get_title() for axes in last.axes[:-1]] == ['MoE layer 1']
  assert [axes.get_title() for axes in every.axes[:-1]] == ['MoE layer 0', 'MoE layer 1']
  for figure, evaluation in ((last, 'capacity'), (every, 'dropless')):
    assert f'{evaluation} evaluation, test split' in figure.get_suptitle().replace('\n', ' ')
    (image,) = figure.axes[-2].images
    loads = [record.domains[evaluation][domain]['router/load'][1] for domain in example.DOMAINS]
    np.testing.assert_allclose(image.get_array(), loads)
    assert tuple(t.get_text() for t in figure.axes[-2].get_yticklabels()) == example.DOMAINS
