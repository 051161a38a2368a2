"""The experts' matmuls, one expert at a time or all at once, against NumPy in float64."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import experts
from moe_jax.errors import UserError
from moe_jax.experts import implementations
from moe_jax.parallel.mesh import make_mesh

E, C, D, F = 8, 6, 4, 10


@pytest.fixture(params=['batched', 'loop'])
def way(request, monkeypatch):
  """Makes shapes small enough for a test take one way or the other."""
  if request.param == 'loop':
    monkeypatch.setattr(implementations, 'LEAST_EXPERTS', 2)
    monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  return request.param


def make_inputs():
  rng = np.random.default_rng(0)
  shapes = ((E, 2 * C, D), (E, D, F), (E, F // 2, D))
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def expected(x, w_in, w_out):
  """Returns sum(y^2) / 2 of the SwiGLU experts and its gradients, from the formulas, in float64."""
  x, w_in, w_out = (np.asarray(a, np.float64) for a in (x, w_in, w_out))
  d_x, d_in, d_out = np.zeros_like(x), np.zeros_like(w_in), np.zeros_like(w_out)
  total, half = 0.0, F // 2
  for e in range(x.shape[0]):
    hidden = x[e] @ w_in[e]
    gate, value = hidden[:, :half], hidden[:, half:]
    sigmoid = 1 / (1 + np.exp(-gate))
    active = gate * sigmoid * value
    y = active @ w_out[e]
    total += np.sum(y * y) / 2
    d_out[e] = active.T @ y
    d_active = y @ w_out[e].T
    d_gate = d_active * value * (sigmoid + gate * sigmoid * (1 - sigmoid))
    d_hidden = np.concatenate([d_gate, d_active * gate * sigmoid], axis=1)
    d_in[e] = x[e].T @ d_hidden
    d_x[e] = d_hidden @ w_in[e].T
  return total, (d_x, d_in, d_out)


def loss_of(data, expert):
  """Returns sum(y^2) / 2 over a mesh: rows differ on all devices, weights along 'expert' alone."""
  alone = ('data',) if data == 1 else ()
  of_rows, of_weights = PartitionSpec('expert', 'data'), PartitionSpec((*alone, 'expert'))

  def local(x, w_in, w_out):
    return experts.run_experts(x, (w_in, w_out), 'swiglu')

  layer = jax.shard_map(
    local,
    mesh=make_mesh(data, expert),
    in_specs=(of_rows, of_weights, of_weights),
    out_specs=of_rows,
  )
  return lambda *arrays: jnp.sum(jnp.square(layer(*arrays))) / 2


@pytest.mark.parametrize('mesh', [(1, 1), (1, 4), (2, 4)])
def test_outputs_and_gradients_are_the_formulas(way, mesh):
  inputs = make_inputs()
  got = jax.jit(jax.value_and_grad(loss_of(*mesh), argnums=(0, 1, 2)))(*inputs)
  chex.assert_trees_all_close(got, expected(*inputs), rtol=2e-5, atol=2e-5)


def test_outside_of_a_mesh_and_under_vmap(way):
  x, w_in, w_out = make_inputs()
  run = functools.partial(experts.run_experts, activation='swiglu')
  alone = [run(x * scale, (w_in * scale, w_out)) for scale in (1.0, 0.5)]
  scales = jnp.array([1.0, 0.5])
  packed = jax.jit(jax.vmap(lambda scale: run(x * scale, (w_in * scale, w_out))))(scales)
  np.testing.assert_allclose(packed, np.stack(alone), rtol=2e-5, atol=1e-6)


def test_a_cpu_loops_and_other_platforms_do_not(way):
  def loops(platform):
    gradient = jax.jit(jax.grad(loss_of(1, 1), argnums=(0, 1, 2)))
    text = gradient.trace(*make_inputs()).lower(lowering_platforms=(platform,)).as_text()
    return text.count('stablehlo.while')

  # Of each of two matmuls: itself and the gradient of its rows.
  assert loops('cpu') == {'batched': 0, 'loop': 4}[way]
  assert loops('tpu') == loops('cuda') == 0


def test_cpu_paths_can_be_switched_off(monkeypatch):
  monkeypatch.setattr(implementations, 'LEAST_EXPERTS', 2)
  monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  x, w_in, w_out = make_inputs()
  counts = jnp.full((E,), 2 * C, jnp.int32)

  def run(filled):
    loss = lambda *a: jnp.sum(experts.run_experts(a[0], a[1:], 'swiglu', filled) ** 2) / 2  # noqa: E731
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(x, w_in, w_out).lower(lowering_platforms=('cpu',)).as_text()
    return (
      gradient(x, w_in, w_out),
      'stablehlo.while' in text,
      experts.should_pack((w_in, w_out), 'cpu'),
    )

  for filled in (None, counts):
    monkeypatch.setenv(implementations.CPU_PATHS, 'on')
    with_paths, loops, packs = run(filled)
    assert loops and packs
    monkeypatch.setenv(implementations.CPU_PATHS, 'off')
    without, loops, packs = run(filled)
    assert not loops and not packs
    chex.assert_trees_all_close(without, with_paths, rtol=2e-5, atol=2e-5)
  monkeypatch.setenv(implementations.CPU_PATHS, 'no')
  with pytest.raises(UserError, match='MOE_JAX_CPU_EXPERTS=.no.: must be on or off'):
    run(None)


def test_which_shapes_loop():
  # As benchmarked: many experts, few rows, and weights that are not small.
  assert implementations.prefers_loop(40, (256, 512, 2048))
  assert implementations.prefers_loop(160, (64, 1024, 512))
  assert not implementations.prefers_loop(1280, (8, 512, 2048))  # few experts, many rows
  assert not implementations.prefers_loop(512, (64, 512, 2048))  # many rows
  assert not implementations.prefers_loop(40, (256, 64, 128))  # small weights


def test_both_ways_compute_each_product_once(way):
  """Matmuls in the traced program: three for each matrix, each of 2 E C D F operations."""
  x, w_in, w_out = make_inputs()
  loss = lambda *arrays: jnp.sum(experts.run_experts(arrays[0], arrays[1:], 'swiglu'))  # noqa: E731
  jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, w_in, w_out)
  rows = E * 2 * C
  assert product_flops(jaxpr.jaxpr) == 3 * (2 * rows * D * F + 2 * rows * (F // 2) * D)


def product_flops(jaxpr):
  """Returns the operations of all matmuls of a jaxpr, loops times their lengths."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      summed = math.prod(shape[i] for i in contracted)
      total += 2 * equation.outvars[0].aval.size * summed
    elif equation.primitive.name == 'cond':  # one branch for each platform
      each = [product_flops(branch.jaxpr) for branch in equation.params['branches']]
      assert len(set(each)) == 1
      total += each[0]
    else:
      times = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
      inner = [equation.params.get(name) for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr')]
      total += times * sum(product_flops(getattr(j, 'jaxpr', j)) for j in inner if j is not None)
  return total
