"""Runs whose optimizer follows a rule of an earlier version: looked at, never trained on."""

import jax
import numpy as np
import optax
import pytest

from moe_jax import optim
from moe_jax.errors import UserError
from moe_jax.run import optimizer_layout
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.train.state import abstract_state, init_state
from tests import tiny


def _earlier(patch, name):
  """The optimizer as it was when statistics spanned stacked matrices."""
  with patch.context() as then:
    then.setattr(optim, '_scale_by_factored_rms', optax.scale_by_factored_rms)
    then.setattr(optim, '_orthogonalize', optax.identity)
    return optim.make_optimizer(tiny.config({'optim.name': name}).optim, 6)


@pytest.mark.parametrize('name', ['adafactor', 'muon'])
@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_a_checkpoint_of_an_earlier_rule_is_read_and_not_trained_on(
  name, mesh, monkeypatch, tmp_path
):
  trainer = tiny.trainer({'optim.name': name}, mesh)
  with jax.set_mesh(trainer.mesh):
    state = init_state(trainer.task, _earlier(monkeypatch, name), 0)._replace(step=np.int32(3))
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, state, {'row': 7}, {})
    checkpoints.wait()
    before = tiny.snapshot(tmp_path)
    abstract = abstract_state(trainer.task, trainer.optimizer)
    with pytest.raises(UserError, match='checkpoint 3 is of an earlier rule of its optimizer'):
      checkpoints.restore(abstract)
    step, restored, position = checkpoints.restore(abstract, any_optimizer=True)
    assert (step, position) == (3, {'row': 7})
    tiny.assert_equal(restored.params, state.params)
    tiny.assert_equal(checkpoints.restore_step(3, abstract).params, state.params)
    assert tiny.snapshot(tmp_path) == before and not checkpoints.damaged
    checkpoints.close()


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'muon', 'sgd'])
def test_a_state_of_this_version_is_no_other(name, tmp_path):
  trainer = tiny.trainer({'optim.name': name})
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(0, trainer.state, {}, {})
  checkpoints.wait()
  restored = checkpoints.restore(abstract_state(trainer.task, trainer.optimizer))
  tiny.assert_equal(restored[1], trainer.state)
  checkpoints.close()


def test_factors_lie_where_their_matrices_lie():
  """[L, E, 2, D] of [L, E, D, 2F]: E is split; the others have no dimension that is."""
  trainer = tiny.trainer({'optim.name': 'adafactor'}, (2, 4))
  abstract = abstract_state(trainer.task, trainer.optimizer)
  factors = abstract.opt_state[1][0].v_row['layers']['block_0']
  assert factors['moe']['w_in'].shape == (2, 8, 2, 1)
  assert factors['moe']['w_in'].sharding.spec[1] == 'expert'
  assert 'expert' not in factors['attention']['query'].sharding.spec
  shapes = optimizer_layout.shapes_of({'opt_state': abstract.opt_state})
  assert optimizer_layout.as_saved(abstract, shapes) is None
