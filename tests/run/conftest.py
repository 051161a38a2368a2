"""A run that tests of resuming and of training on share."""

import pytest

from moe_jax.run import single
from tests import tiny

# Everything whose state must survive: moments, a router's bias, jitter and random drops.
LIVELY = {
  'optim.name': 'adamw',
  'optim.learning_rate': 0.01,
  'moe.router': 'loss_free',
  'moe.bias_rate': 0.05,
  'moe.jitter': 0.1,
  'moe.priority': 'random',
  'train.eval_every': 3,
}


@pytest.fixture(scope='session')
def lively(text, tmp_path_factory):
  """(config, directory) of six steps that nothing disturbed, checkpoints 3 and 6; not changed."""
  config = tiny.config({**text, **LIVELY})
  workdir = tmp_path_factory.mktemp('lively') / 'run'
  assert single.train(config, str(workdir)) == (6, True, None)
  return config, workdir
