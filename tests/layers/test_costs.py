"""Costs of the layer, read from the program and not from a clock."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax import routing
from moe_jax.experts import implementations
from moe_jax.layers import moe_layer
from moe_jax.parallel.mesh import make_mesh
from tests.layers import small_layer

WIDTH, HIDDEN, SELECTED, FACTOR = 128, 256, 2, 1.25


def lower(num_experts, batch, length, mesh=(1, 1), backward=False, dtype=jnp.float32):
  """Returns the layer, or its gradient, before it is compiled."""
  options = dataclasses.replace(
    small_layer.OPTIONS,
    choice=routing.ROUTERS['top_k'].options(num_experts=num_experts, num_selected_experts=SELECTED),
    mlp_dim=HIDDEN,
    capacity_factor=FACTOR,
  )
  mesh = make_mesh(*mesh)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)  # noqa: E731
  params = small_layer.make_params(
    shape(WIDTH, num_experts),
    shape(num_experts, WIDTH, 2 * HIDDEN),
    shape(num_experts, HIDDEN, WIDTH),
  )
  x = jax.ShapeDtypeStruct((batch, length, WIDTH), dtype)
  info = small_layer.info_of(jnp.ones((batch, length), bool))
  keys = small_layer.group_keys(options, batch)

  def layer(params, x):
    return moe_layer.moe_layer(
      x, info, params, state={}, keys=keys, mesh=mesh, options=options, deterministic=True
    )[:2]

  def loss(params, x):
    return jnp.sum(jnp.square(layer(params, x)[0].astype(jnp.float32)))

  return jax.jit(jax.grad(loss, argnums=(0, 1)) if backward else layer).lower(params, x)


@pytest.mark.parametrize('num_experts', [8, 64, 256])
@pytest.mark.parametrize('backward', [False, True])
def test_flops_and_memory_are_those_of_the_products(num_experts, backward):
  tokens = 2048
  compiled = lower(num_experts, 1, tokens, backward=backward).compile()
  # A SwiGLU expert has three matrices, the router one; the backward pass has two matmuls for each.
  active = 2 * tokens * WIDTH * (SELECTED * 3 * HIDDEN + num_experts) * (3 if backward else 1)
  flops = compiled.cost_analysis()['flops']
  assert active * 0.9 * FACTOR < flops < active * 1.1 * FACTOR
  # Of each slot: input, hidden (gate and value, then their product), output; and backward the
  # gradients of all of them but the input, which takes the place of its buffer.
  numbers = 2 * WIDTH + 3 * HIDDEN + (3 * HIDDEN if backward else 0)
  slots = num_experts * routing.expert_capacity(tokens, num_experts, SELECTED, FACTOR)
  assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * slots * numbers


@pytest.mark.parametrize('backward', [False, True])
def test_products_in_a_loop_need_no_more_memory(backward, monkeypatch):
  """XLA counts a loop's body once; the FLOPs of these: tests/experts."""
  monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  tokens, num_experts = 2048, 64
  compiled = lower(num_experts, 1, tokens, backward=backward).compile()
  assert ' while(' in compiled.as_text()
  numbers = 2 * WIDTH + 3 * HIDDEN + (3 * HIDDEN if backward else 0)
  slots = num_experts * routing.expert_capacity(tokens, num_experts, SELECTED, FACTOR)
  assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * slots * numbers


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('num_experts', [8, 64])
def test_memory_of_a_device_where_rows_are_packed(num_experts, backward, monkeypatch):
  monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  devices, length = 8, 256
  compiled = lower(num_experts, devices, length, (1, devices), backward).compile()
  # As many slots as the device's own tokens fill of all experts come from all devices for its own.
  numbers = 2 * WIDTH + 3 * HIDDEN + (3 * HIDDEN if backward else 0)
  slots = num_experts * routing.expert_capacity(length, num_experts, SELECTED, FACTOR)
  assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * 4 * slots * numbers


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('packs', [False, True])
def test_exchanged_bytes_are_the_formula(dtype, backward, packs, monkeypatch):
  if packs:
    monkeypatch.setattr(implementations, 'LEAST_WEIGHTS', 1)
  data, expert, batch, length, num_experts = 2, 4, 8, 64, 8
  text = lower(num_experts, batch, length, (data, expert), backward, dtype).as_text()
  # Before compiling: XLA on CPUs widens bfloat16.
  sizes = [
    [int(n) for n in dims.split('x')] + [bits]
    for dims, bits in re.findall(r'stablehlo\.all_to_all.*?\(tensor<([\dx]+)x(f32|bf16)>\)', text)
  ]
  itemsize = jnp.dtype(dtype).itemsize
  exchanged = []
  for *dims, bits in sizes:
    assert {'f32': 4, 'bf16': 2}[bits] == itemsize
    number = 1
    for size in dims:
      number *= size
    # A part of 1 / R stays where it is.
    exchanged.append(number * itemsize * (1 - 1 / expert))
  tokens = batch * length / (data * expert)
  each = tokens * SELECTED * FACTOR * WIDTH * itemsize * (1 - 1 / expert)
  # There and back; and so again for the gradients.
  assert exchanged == [each] * (4 if backward else 2)
  # Where rows are packed, experts hear once how many of E experts' slots each device fills.
  counts = re.findall(r'stablehlo\.all_to_all.*?\(tensor<([\dx]+)xi32>\)', text)
  assert counts == [f'{num_experts}x1'] * packs


@pytest.mark.parametrize('dispatch', ['gather', 'dropless'])
def test_one_program_for_balanced_and_collapsed_routing(dispatch):
  options = small_layer.make_options(dispatch=dispatch)
  inputs = small_layer.draw(options)
  mesh, traced = make_mesh(1, 1), []

  @jax.jit
  def layer(params):
    traced.append(params)
    return small_layer.apply(inputs._replace(params=params), mesh, options)

  loads = []
  for bias in (0.0, 20.0):
    # The last feature of every token is 1, so that this is a bias of expert 0.
    router = inputs.params.router['router'].at[-1, 0].add(bias)
    _, sums = layer(inputs.params._replace(router={'router': router}))
    loads.append(sums.tokens_per_expert[0, 0])
  assert loads[1] == inputs.valid.sum() > loads[0]
  assert len(traced) == layer._cache_size() == 1
