"""The matmul of a router in bfloat16, against NumPy on rounded factors in float64."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.parallel.mesh import BATCH_AXES, make_mesh
from moe_jax.router_options import MatrixOptions
from moe_jax.routing import router as router_lib

OPTIONS = MatrixOptions(num_experts=5, num_selected_experts=2, router_dtype='bfloat16')


def rounded(x):
  return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def make_inputs():
  rng = np.random.default_rng(0)
  shapes = ((8, 3, 64), (64, 5), (8, 3, 5))
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_factors_are_rounded_and_sums_are_not():
  tokens, matrix, _ = make_inputs()
  logits = router_lib.matmul(tokens, matrix, OPTIONS)
  assert logits.dtype == jnp.float32
  expected = np.einsum('gsd,dn->gsn', rounded(tokens), rounded(matrix))
  # A sum of 64 products in bfloat16 would be off by 1e-2 and more.
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
  exact = np.einsum('gsd,dn->gsn', np.asarray(tokens, float), np.asarray(matrix, float))
  assert 1e-3 < np.abs(logits - exact).max() < 0.2


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_gradients_are_those_of_rounded_factors(mesh):
  tokens, matrix, weight = make_inputs()

  def local(tokens, matrix, weight):
    logits = router_lib.matmul(tokens, matrix, OPTIONS)
    return jax.lax.psum(jnp.sum(logits * weight), BATCH_AXES)

  everywhere, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
  loss = jax.shard_map(
    local, mesh=make_mesh(*mesh), in_specs=(split, everywhere, split), out_specs=everywhere
  )
  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(tokens, matrix, weight)
  back = rounded(weight)
  expected = (
    np.einsum('gsn,dn->gsd', back, rounded(matrix)),
    np.einsum('gsd,gsn->dn', rounded(tokens), back),
  )
  chex.assert_trees_all_close(grads, expected, rtol=0, atol=5e-5)


def test_the_program_multiplies_bfloat16_alone():
  tokens, matrix, _ = make_inputs()
  loss = lambda tokens, matrix: jnp.sum(router_lib.matmul(tokens, matrix, OPTIONS) ** 2)  # noqa: E731
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(tokens, matrix).as_text()
  products = [line for line in text.splitlines() if 'stablehlo.dot_general' in line]
  assert len(products) == 3
  for line in products:
    factors, _, result = line.rpartition(' : ')[2].partition(' -> ')
    assert factors.count('bf16') == 2
    assert 'f32' in result
