"""Experts on the rows that are filled, one expert at a time, against all rows in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import experts
from moe_jax.experts import cpu, cpu_weight_gradients, implementations
from moe_jax.parallel.mesh import make_mesh
from tests import tiny
from tests.experts import test_implementations

E, C, D, F = test_implementations.E, 50, test_implementations.D, test_implementations.F


@pytest.fixture(autouse=True, params=['weights in the loop', 'weights after it'])
def takes_small_weights(monkeypatch, request):
  """Of the backward pass; C lies between the two bounds."""
  monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  monkeypatch.setattr(cpu, 'MOST_BATCHED', C - 1 if 'in' in request.param.split() else C)


def make_inputs(num_filled, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((E, C, D), (E, D, F), (E, F // 2, D))
  x, w_in, w_out = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
  counts = jnp.asarray(num_filled, jnp.int32)
  return jnp.where(jnp.arange(C)[None, :, None] < counts[:, None, None], x, 0), w_in, w_out, counts


def loss(x, w_in, w_out, counts):
  y = experts.run_experts(x, (w_in, w_out), 'swiglu', filled=counts)
  return jnp.sum(jnp.square(y)) / 2


gradient = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))


def test_sizes():
  assert cpu.sizes_of(1) == (1,)
  assert cpu.sizes_of(5) == (2, 4, 5)
  # Steps of 25 / 2 below 25 and of 25 / 6 from there on, all rounded up to even numbers.
  assert cpu.sizes_of(50) == (14, 26, 32, 38, 44, 50)
  # Below 544 in steps of 544 / 2, from there in steps of 544 / 6 = 90.7, so 92.
  assert cpu.sizes_of(1088) == (272, *range(544, 1088, 92), 1088)
  for capacity in range(1, 3000):
    sizes = cpu.sizes_of(capacity)
    assert sizes == tuple(sorted(set(sizes))) and sizes[-1] == capacity and len(sizes) <= 8


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.lists(st.integers(0, C), min_size=E, max_size=E))
def test_outputs_and_gradients_are_the_formulas(num_filled):
  inputs = make_inputs(num_filled)
  got = jax.jit(gradient(loss))(*inputs)
  tiny.assert_close(got, test_implementations.expected(*inputs[:3]))


@pytest.mark.parametrize('num_filled', [[0] * E, [C] * E, [14, 15, 26, 27, 44, 45, 50, 1]])
def test_the_edges_of_the_sizes(num_filled):
  inputs = make_inputs(num_filled)
  got = jax.jit(gradient(loss))(*inputs)
  tiny.assert_close(got, test_implementations.expected(*inputs[:3]))


def test_each_turn_multiplies_the_rows_of_its_size():
  """So an expert costs at most C rows, and all of them the capacity factor of what is active."""
  x, w_in, w_out, counts = make_inputs([C] * E)
  of_row = 2 * (D * F + (F // 2) * D)  # of both matmuls
  forward = functools.partial(cpu._looped_forward, 'swiglu', True)
  assert turns(forward, x, counts, w_in, w_out) == [n * of_row for n in cpu.sizes_of(C)]
  backward = functools.partial(cpu._looped_backward, 'swiglu')
  got = turns(backward, x, x, counts, jnp.zeros((E, C, F)), w_in, w_out)
  weights_in_loop = cpu.MOST_BATCHED < C
  assert got == [n * of_row * (1 + weights_in_loop) for n in cpu.sizes_of(C)]


def turns(function, *arrays):
  """Returns the operations of matmuls in one iteration of each loop, in order."""
  equations = jax.make_jaxpr(function)(*arrays).jaxpr.eqns
  bodies = [e.params['body_jaxpr'].jaxpr for e in equations if e.primitive.name == 'while']
  return [test_implementations.product_flops(body) for body in bodies]


def test_rows_beyond_are_not_computed():
  """Rows that are not filled are not read: only in the loop, since others compute all rows."""
  x, w_in, w_out, counts = make_inputs([14] * E)
  looked = jnp.where(jnp.arange(C)[None, :, None] < 14, x, jnp.nan)
  y = jax.jit(functools.partial(cpu.run_filled, 'swiglu'))(looked, counts, w_in, w_out)
  assert np.all(np.isfinite(y)) and np.all(y[:, 14:] == 0) and np.all(y[:, :14] != 0)


def test_experts_without_rows_are_left_out():
  """Nothing looks at their weights, whose gradients are zero."""
  x, w_in, w_out, counts = make_inputs([0, 5, *[0] * (E - 2)])
  spoilt = [w.at[0].set(jnp.nan) for w in (w_in, w_out)]
  run = jax.jit(functools.partial(cpu.run_filled, 'swiglu'))
  y, pull = jax.vjp(lambda *of: run(of[0], counts, *of[1:]), x, *spoilt)
  np.testing.assert_array_equal(y, run(x, counts, w_in, w_out))
  of_x, *of_weights = pull(jnp.ones_like(y).at[:, 5:].set(0))
  assert np.all(np.isfinite(of_x)) and np.any(of_x[1])
  for of in of_weights:
    assert np.any(of[1]) and not np.any(of[0]) and not np.any(of[2:])


@pytest.mark.parametrize('num_filled', [0, 14, 15, C])
def test_one_expert_alone(num_filled):
  """All turns of a loop would do the same, and XLA do it before the loop, for all sizes."""
  x, w_in, w_out, counts = make_inputs([num_filled] * E)
  inputs = x[:1], w_in[:1], w_out[:1], counts[:1]
  run = jax.jit(gradient(loss))
  tiny.assert_close(run(*inputs), test_implementations.expected(*inputs[:3]))
  text = run.lower(*inputs).compile().as_text()
  outside = text[text.index('\nENTRY') :]
  products = [line for line in outside.splitlines() if ' dot(' in line or 'ynn' in line]
  assert ' conditional(' in outside and not products, products


def test_bfloat16_stays_itself():
  x, w_in, w_out, counts = make_inputs([*range(E)])
  y = experts.run_experts(x.astype(jnp.bfloat16), (w_in, w_out), 'swiglu', filled=counts)
  assert y.dtype == jnp.bfloat16


def test_packed_trials_go_in_turn():
  x, w_in, w_out, counts = make_inputs([3, 50, 20, 0, 8, 9, 33, 41])
  counts = jnp.stack([counts, counts[::-1]])
  rows = jnp.stack([x, x[::-1]])
  run = gradient(loss)
  packed = jax.jit(jax.vmap(run, in_axes=(0, None, None, 0)))
  alone = [jax.jit(run)(rows[i], w_in, w_out, counts[i]) for i in range(2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
  tiny.assert_close(packed(rows, w_in, w_out, counts), stacked)
  loops = lambda run, *of: run.lower(*of).compile().as_text().count(' while(')  # noqa: E731
  own = loops(jax.jit(run), rows[0], w_in, w_out, counts[0])
  # One loop over the trials forward, one backward.
  assert loops(packed, rows, w_in, w_out, counts) == own + 2


@pytest.mark.parametrize('data', [1, 2])
def test_devices_with_other_loads(data):
  inputs = make_inputs([3, 50, 20, 0, 8, 9, 33, 41])
  # Each device has the same experts, and its part of the rows of each.
  of_rows, of_weights = PartitionSpec('expert', 'data'), PartitionSpec('expert')

  def local(x, w_in, w_out):
    counts = jnp.sum(jnp.any(x != 0, axis=-1), axis=1, dtype=jnp.int32)
    return experts.run_experts(x, (w_in, w_out), 'swiglu', filled=counts)

  layer = jax.shard_map(
    local,
    mesh=make_mesh(data, 1),
    in_specs=(of_rows, of_weights, of_weights),
    out_specs=of_rows,
  )
  total = lambda *arrays: jnp.sum(jnp.square(layer(*arrays))) / 2  # noqa: E731
  got = jax.jit(gradient(total))(*inputs[:3])
  tiny.assert_close(got, test_implementations.expected(*inputs[:3]))


def test_a_cpu_loops_and_other_platforms_do_not():
  inputs = make_inputs([C] * E)
  traced = jax.jit(gradient(loss)).trace(*inputs)
  text = traced.lower(lowering_platforms=('cpu',)).compile().as_text()
  weights_after = cpu.MOST_BATCHED >= C
  # A loop for each size in each direction; of the weights, one for each number of rows but all.
  of_weights = len(cpu_weight_gradients.sizes_of(C)) - 1
  assert text.count(' while(') == 2 * len(cpu.sizes_of(C)) + weights_after * of_weights
  assert text.count(' conditional(') == weights_after
  for platform in ('tpu', 'cuda'):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'stablehlo.while' not in text and 'stablehlo.dot_general' in text
