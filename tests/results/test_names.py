"""Titles of metrics in tables."""

import pytest

from moe_jax.results import names
from moe_jax.study import Metric


@pytest.mark.parametrize(
  ('name', 'title'),
  [
    ('dropless/bits_per_byte', 'bits per byte'),
    ('capacity/router/drop_share', 'drop share'),
    ('dropless/router/max_violation/mean', 'MaxVio'),
    ('dropless/router/max_violation/max', 'MaxVio, max of layers'),
    ('dropless/router/max_violation/layer_12', 'MaxVio, layer 12'),
    ('dropless/domains/drama/bits_per_byte', 'bits per byte, drama'),
    ('dropless/domains/a/b c/router/load_cv/min', 'load CV, a/b c, min of layers'),
    ('dropless/router/something_new/mean', 'something new'),
    ('user/my_number', 'my number'),
  ],
)
def test_titles(name, title):
  assert names.metric_title(name) == title


def test_alike_titles_say_their_evaluation():
  assert names.metric_titles(
    ['dropless/loss', 'capacity/loss', 'capacity/router/load_cv/mean']
  ) == {
    'dropless/loss': 'loss (dropless)',
    'capacity/loss': 'loss (capacity)',
    'capacity/router/load_cv/mean': 'load CV',
  }


@pytest.mark.parametrize(
  ('metric', 'title'),
  [
    (Metric(), 'bits per byte'),
    (Metric('capacity/loss', 'nats per token'), 'loss (nats per token)'),
    # The default unit is that of another metric.
    (Metric('dropless/router/max_violation/mean'), 'MaxVio'),
    (Metric('user/entropy', 'bits'), 'entropy (bits)'),
    (Metric('dropless/domains/drama/bits_per_byte'), 'bits per byte, drama'),
  ],
)
def test_the_deciding_metric_has_a_unit_of_its_own(metric, title):
  assert names.deciding_title(metric) == title
