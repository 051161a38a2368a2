"""Several routing groups as one: who is kept stays kept, and no expert has a gap in its slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import dispatch
from moe_jax.dispatch import merged
from moe_jax.parallel.mesh import BATCH_AXES, EXPERT_AXIS, make_mesh
from moe_jax.routing import Plan
from tests.dispatch import test_dispatchers

EVERYWHERE = PartitionSpec(BATCH_AXES)


def test_by_hand():
  # Two groups of two tokens, k = 1, two experts with C = 2 slots. Group 0: both tokens at expert 1.
  # Group 1: the first at expert 1, the second at expert 0, but not kept.
  #   expert 0: nobody              expert 1: tokens 0 and 1 of group 0, then token 0 of group 1,
  #                                 number 2 of all: slots 0, 1 and 0 + 2 = 2.
  plan = Plan(
    expert_index=jnp.asarray([[[1], [1]], [[1], [0]]]),
    slot_index=jnp.asarray([[[0], [1]], [[0], [0]]]),
    requested=jnp.ones((2, 2, 1), bool),
    keep=jnp.asarray([[[True], [True]], [[True], [False]]]),
    combine_weights=jnp.asarray([[[0.1], [0.2]], [[0.3], [0.0]]]),
    source_index=jnp.asarray([[[2, 2], [0, 1]], [[2, 2], [0, 2]]]),
  )
  whole, beyond = merged.merge(plan, 4)
  np.testing.assert_array_equal(whole.slot_index[0, :3, 0], [0, 1, 2])
  np.testing.assert_array_equal(whole.source_index, [[[4, 4, 4, 4], [0, 1, 2, 4]]])
  np.testing.assert_array_equal(whole.keep[0, :, 0], [True, True, True, False])
  assert not np.any(beyond)
  np.testing.assert_array_equal(dispatch.filled_slots(whole), [[0], [3]])
  # With two slots, the third is beyond.
  cut, beyond = merged.merge(plan, 2)
  np.testing.assert_array_equal(beyond[0, :, 0], [False, False, True, False])
  np.testing.assert_array_equal(cut.source_index, [[[4, 4], [0, 1]]])
  np.testing.assert_allclose(cut.combine_weights[0, :, 0], [0.1, 0.2, 0, 0])


@pytest.mark.parametrize('capacity', [1, 2, 6])
@pytest.mark.parametrize('priority', ['choice', 'token'])
def test_experts_on_one_device_hear_of_every_empty_slot(capacity, priority):
  plan = test_dispatchers.make_plan(capacity, priority=priority)
  tokens, _ = test_dispatchers.draw_tokens(plan)
  heard = []

  def experts(rows, weights, filled=None):
    jax.debug.callback(lambda *seen: heard.append(seen), rows, filled)
    return jnp.tanh(rows * weights[:, None])

  def run(name, experts):
    local = lambda tokens, plan, weights: dispatch.run_plan(  # noqa: E731
      name,
      tokens,
      plan,
      weights=weights,
      experts=experts,
      axis_name=EXPERT_AXIS,
      num_selected=2,
    )
    layer = jax.shard_map(
      local,
      mesh=make_mesh(1, 1, jax.devices()[:1]),
      in_specs=EVERYWHERE,
      out_specs=EVERYWHERE,
      check_vma=False,  # a callback has no rule for it
    )
    return layer(tokens, plan, jnp.arange(1.0, 5.0)[:, None])

  y = run('gather', experts)
  jax.effects_barrier()
  ((rows, filled),) = heard
  kept = [int(np.sum(plan.keep & (plan.expert_index == e))) for e in range(4)]
  np.testing.assert_array_equal(filled, kept)
  for e in range(4):
    assert np.all(np.any(rows[e, : kept[e]] != 0, axis=-1)) and np.all(rows[e, kept[e] :] == 0)
  plain = lambda rows, weights, filled=None: jnp.tanh(rows * weights[:, None])  # noqa: E731
  np.testing.assert_allclose(y, run('einsum', plain), rtol=1e-5, atol=1e-6)
