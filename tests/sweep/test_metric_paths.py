"""Paths to the numbers of an evaluation, and what is said of one that is not there."""

import pathlib

import pytest

from moe_jax.errors import UserError
from moe_jax.sweep import metric_paths
from moe_jax.sweep.evaluations import (
  LAYER_METRICS,
  METRICS,
  POOLED_LAYER_METRICS,
  POOLED_METRICS,
)

LOSS = {'loss': 2.5, 'router/max_violation': [0.5, 2.0], 'router/load': [[0.5, 0.5]]}
EVALUATIONS = {
  'dropless': {
    'bits_per_byte': 2,
    'loss': float('nan'),
    'split': 'test',
    'router/max_violation': [1.0, 3.0, 2.0],
    'domains': {'prose': LOSS, 'prose/old': {'loss': 1.5}},
  }
}


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('dropless/bits_per_byte', 2.0),
    ('dropless/router/max_violation/mean', 2.0),
    ('dropless/router/max_violation/max', 3.0),
    ('dropless/router/max_violation/min', 1.0),
    ('dropless/router/max_violation/layer_2', 2.0),
    ('dropless/domains/prose/loss', 2.5),
    ('dropless/domains/prose/old/loss', 1.5),
    ('dropless/domains/prose/router/max_violation/mean', 1.25),
    # A list, text, a list of lists, what is not finite, and what is not there.
    ('dropless/router/max_violation', None),
    ('dropless/split', None),
    ('dropless/domains/prose/router/load/mean', None),
    ('dropless/loss', None),
    ('dropless/router/max_violation/layer_3', None),
    ('dropless/router/max_violation/layer_-1', None),
    ('dropless/domains/verse/loss', None),
    ('dropless/domains', None),
    ('capacity/bits_per_byte', None),
    ('dropless', None),
    ('', None),
  ],
)
def test_number_at(path, value):
  assert metric_paths.number_at(EVALUATIONS, path) == value


@pytest.mark.parametrize(
  'name',
  [
    'dropless/bits_per_byte',
    'dropless/router/max_violation/mean',
    'dropless/router/max_violation/layer_11',
    'dropless/domains/drama/bits_per_byte',
    'dropless/domains/a/b/router/load_cv/min',
    'user/own',
  ],
)
def test_names_that_a_study_may_decide_by(name):
  metric_paths.check_name(name, ('dropless',), {'own': len})


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('dropless/bits_per_bite', 'did you mean dropless/bits_per_byte'),
    ('dropless/router/max_violatoin/mean', 'did you mean dropless/router/max_violation/mean'),
    ('dropless/router/max_violation', 'is a list over layers; add one of /mean'),
    ('dropless/domains/drama/router/entropy', 'is a list over layers'),
    ('dropless/router/max_violation/median', '/mean, /max, /min or /layer_0'),
    ('dropless/router/max_violation/layer_01', 'must be EVALUATION/NAME'),
    ('capacity/bits_per_byte', 'an evaluation of the study (dropless)'),
    ('dropless/domains/drama/nothing', 'EVALUATION/domains/DOMAIN/NAME'),
    ('user/onw', 'did you mean user/own'),
    ('', 'must be EVALUATION/NAME'),
  ],
)
def test_names_that_are_none(name, words):
  with pytest.raises(UserError) as caught:
    metric_paths.check_name(name, ('dropless',), {'own': len})
  assert str(caught.value).startswith(f'study.metric={name!r}: ') and words in str(caught.value)


def test_a_dense_arm_and_a_layer_that_is_not_there():
  metric_paths.check_layers('dropless/bits_per_byte', 'dense', 0)
  metric_paths.check_layers('user/router', 'dense', 0)
  metric_paths.check_layers('dropless/router/load_cv/layer_1', 'moe', 2)
  for name, layers, words in (
    ('dropless/router/load_cv/mean', 0, "'moe' is dense"),
    ('dropless/domains/prose/router/load_cv/mean', 0, "'moe' is dense"),
    ('dropless/router/load_cv/layer_2', 2, 'MoE layers 0 to 1 only'),
  ):
    with pytest.raises(UserError, match=words):
      metric_paths.check_layers(name, 'moe', layers)


def test_the_readme_names_every_metric():
  text = (pathlib.Path(__file__).parents[2] / 'experiments/README.md').read_text(encoding='utf-8')
  every = {*METRICS, *LAYER_METRICS, *POOLED_METRICS, *POOLED_LAYER_METRICS}
  missing = {name for name in every if f'`{name.removesuffix("_baseline")}`' not in text}
  assert not missing
