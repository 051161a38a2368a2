"""The experts when decoding: each implementation equals one-hot matmuls, and reads no more."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import dispatch, experts
from moe_jax.dispatch import einsum
from moe_jax.experts import decode
from moe_jax.parallel.mesh import make_mesh
from tests.dispatch.test_blocks import draw_plan
from tests.layers import small_layer

ACTIVATIONS = {'swiglu': 2, 'geglu': 2, 'gelu': 1, 'gelu_exact': 1, 'relu': 1}


def draw_weights(num_experts, width, hidden, activation, layers=()):
  rng = np.random.default_rng(3)
  columns = hidden * ACTIVATIONS[activation]
  w_in = rng.normal(size=(*layers, num_experts, width, columns))
  w_out = rng.normal(size=(*layers, num_experts, hidden, width))
  return jnp.asarray(w_in, jnp.float32), jnp.asarray(w_out, jnp.float32)


def oracle(tokens, plan, weights, activation):
  """One-hot matmuls, every assignment in a slot of its own: (s, k) in slot s K + k."""
  size, k = plan.keep.shape[1:]
  own = jnp.broadcast_to(jnp.arange(size * k, dtype=jnp.int32).reshape(size, k), plan.keep.shape)
  source = jnp.zeros((plan.keep.shape[0], weights[0].shape[0], size * k), jnp.int32)
  plan = plan._replace(slot_index=own, source_index=source)
  buffers = einsum.dispatch(tokens, plan)
  rows = buffers.reshape(buffers.shape[0], -1, buffers.shape[-1])
  outputs = experts.run_experts(rows, weights, activation).reshape(buffers.shape)
  return einsum.combine(outputs, plan)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
  groups=st.integers(1, 4),
  size=st.integers(1, 4),
  k=st.integers(1, 3),
  num_experts=st.sampled_from([3, 16]),
  num_rows=st.sampled_from([0, 1, 2]),
  way=st.sampled_from([None, *decode.IMPLEMENTATIONS]),
  activation=st.sampled_from(list(ACTIVATIONS)),
  keep=st.sampled_from([0.6, 1.0]),
  stacked=st.booleans(),
)
def test_every_way_gives_what_one_hot_products_give(
  groups, size, k, num_experts, num_rows, way, activation, keep, stacked
):
  plan = draw_plan(groups, size, k, num_experts, keep, seed=1)
  tokens = jnp.asarray(np.random.default_rng(2).normal(size=(groups, size, 4)), jnp.float32)
  weights = draw_weights(num_experts, 4, 5, activation, (3,) if stacked else ())

  @jax.jit
  def both(tokens, plan, weights):
    of_layer = jax.tree.map(lambda w: w[2], weights) if stacked else weights
    layer = jnp.int32(2) if stacked else None
    found = dispatch.run_decode(
      tokens, plan, weights, activation=activation, layer=layer, which=way, num_rows=num_rows
    )
    return found, oracle(tokens, plan, of_layer, activation)

  found, expected = both(tokens, plan, weights)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# On (2, 4) with padding and drops, every router: tests/layers/test_every_router.py.
@pytest.mark.parametrize(('mesh', 'length'), [((1, 8), 1), ((2, 4), 1), ((4, 2), 8)])
def test_a_mesh_gives_the_result_of_one_device(mesh, length):
  options = small_layer.make_options(capacity_factor=None, dispatch='decode')
  inputs = small_layer.draw(options, length=length)
  oracle_options = small_layer.make_options(capacity_factor=None, dispatch='einsum')
  expected = jax.jit(
    lambda i: small_layer.apply(i, make_mesh(1, 1), oracle_options, deterministic=True)
  )(inputs)
  found = jax.jit(lambda i: small_layer.apply(i, make_mesh(*mesh), options, deterministic=True))(
    inputs
  )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[1].kept_per_expert, expected[1].kept_per_expert)


def test_narrow_tokens_are_multiplied_narrow_and_summed_in_float32():
  plan = draw_plan(2, 3, 2, 8, 1.0, seed=0)
  tokens = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4)), jnp.bfloat16)
  weights = draw_weights(8, 4, 5, 'swiglu')
  found = dispatch.run_decode(tokens, plan, weights, activation='swiglu')
  assert found.dtype == jnp.bfloat16
  expected = oracle(tokens, plan, weights, 'swiglu')
  np.testing.assert_allclose(
    found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02
  )


@pytest.mark.parametrize(
  ('assignments', 'platform', 'way'),
  [(63, 'gpu', 'gather'), (64, 'gpu', 'loop'), (63, 'tpu', 'gather'), (63, 'cpu', 'loop')],
)
def test_the_way_goes_by_shape_and_platform(assignments, platform, way):
  assert decode.implementation(assignments, 64, platform) == way


@pytest.mark.parametrize('way', decode.IMPLEMENTATIONS)
def test_the_loop_copies_the_weights_of_one_block_at_a_time(way):
  # 32 assignments: gathering them needs 32 times the weights of an expert, the loop once or twice.
  width, hidden, layers = 64, 128, 3
  plan = draw_plan(32, 1, 1, 64, 1.0, seed=0)
  tokens = jnp.ones((32, 1, width))
  weights = draw_weights(64, width, hidden, 'swiglu', (layers,))

  def run(weights, layer):
    return dispatch.run_decode(tokens, plan, weights, activation='swiglu', layer=layer, which=way)

  compiled = jax.jit(run).lower(weights, jnp.int32(1)).compile()
  of_expert = 4 * 3 * width * hidden
  experts = compiled.memory_analysis().temp_size_in_bytes / of_expert
  assert 30 < experts < 70 if way == 'gather' else experts < 3
