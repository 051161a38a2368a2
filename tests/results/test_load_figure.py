"""The figure of expert load, read back from what was drawn."""

import json

import ml_collections
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.results import load_figure, style

# Layer 0: expert 3 never gets a token; expert 0 gets all of verse, twice its load at balance.
TRAIN = [[[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]], [[0.5, 0.3, 0.2, 0.0], [0.25] * 4]]
DOMAINS = {
  'prose': [[0.2, 0.4, 0.4, 0.0], [0.25] * 4],
  'verse': [[1.0, 0.0, 0.0, 0.0], [0.25] * 4],
}
WHOLE = [[0.6, 0.2, 0.2, 0.0], [0.25] * 4]
EVALUATION = {
  'split': 'test',
  'step': 1200,
  'router/load': WHOLE,
  'domains': {name: {'router/load': load} for name, load in DOMAINS.items()},
}

CONFIG = ml_collections.ConfigDict(
  {'moe': {'router': 'top_k', 'num_experts': 4, 'num_selected_experts': 1}}
)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'four_experts'
  folder.mkdir()
  lines = [
    {'step': step, 'split': 'train', 'loss': 1.0, 'router/load': load}
    for step, load in zip((10, 20), TRAIN, strict=True)
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder


@pytest.fixture(scope='module')
def panels(run):
  figure = load_figure._figure(str(run), EVALUATION, CONFIG.moe)
  return figure, np.array(figure.axes[:6], object).reshape(2, 3)


def test_says_which_run(panels):
  title = panels[0].get_suptitle()
  assert 'four_experts (top_k, 4 experts, 1 selected), step 1,200' in title
  assert [axes.get_title() for axes in panels[1][0]][1:] == [
    'test split, by domain',
    'test split, all domains',
  ]


def test_all_maps_have_one_scale_in_units_of_balance(panels):
  maps = [axes.collections[0] for axes in panels[1][:, :2].flat]
  assert len({id(image.norm) for image in maps}) == 1
  for image, loads in zip(maps[::2], np.swapaxes(TRAIN, 0, 1), strict=True):
    np.testing.assert_allclose(image.get_array(), 4 * loads.T)
  np.testing.assert_allclose(maps[1].get_array(), 4 * np.array(list(DOMAINS.values()))[:, 0])
  white, black = maps[0].to_rgba([1.0, 0.0])[:, :3]
  np.testing.assert_allclose(white, 1)
  np.testing.assert_allclose(black, 0)
  # Next to nothing is blue, not black: the expert lives.
  assert maps[0].to_rgba([0.001])[0, 2] > 0.5


def test_balance_and_dead_experts_are_marked(panels):
  for layer, dead in ((0, [[3]]), (1, [])):
    axes = panels[1][layer, 2]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], WHOLE[layer])
    line, *crosses = axes.lines
    assert list(line.get_ydata()) == [0.25, 0.25]
    assert [text.get_text() for text in axes.texts] == ['1/E']
    assert [list(cross.get_xdata()) for cross in crosses] == dead


def test_the_scale_ends_at_twice_balance_or_above():
  assert style.load_norm([[0.9, 1.1]]).vmax == 2
  # 1000 numbers, 10 of them 8: the 99.5% quantile is 8.
  assert style.load_norm([np.ones(990), np.full(10, 8.0)]).vmax == 8


def test_cells_end_half_way():
  assert load_figure._edges(np.array([10, 20, 40])).tolist() == [5, 15, 30, 50]
  assert load_figure._edges(np.array([7])).tolist() == [6.5, 7.5]


def test_is_written_to_the_run(run):
  path = load_figure.draw(str(run), EVALUATION, CONFIG)
  assert path == run / 'expert_load.png'
  assert path.read_bytes().startswith(b'\x89PNG')


def test_a_run_without_a_step_is_an_error(tmp_path):
  with pytest.raises(UserError, match='no training step'):
    load_figure.draw(str(tmp_path), EVALUATION, CONFIG)
