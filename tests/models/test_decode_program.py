"""Copies and memory of the program of decoding, read from the program and not from a clock."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from moe_jax.models import generate
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train.state import init_params, params_shardings
from tests import tiny

ROWS, CELLS, PROMPT = 16, 64, 8


@functools.cache
def compiled_steps(mesh=(1, 1), dispatch='decode', num_layers=2):
  """Returns the program of four decoding steps of 16 rows, and the bytes of their cache."""
  config = tiny.config(
    {
      'mesh.data': mesh[0],
      'mesh.expert': mesh[1],
      'model.embed_dim': 64,
      'model.num_layers': num_layers,
      'moe.num_experts': 64,
      'moe.mlp_dim': 128,
    }
  )
  model = build_task(config, make_mesh(*mesh), tiny.VOCAB_SIZE, 'decode')
  moe = dataclasses.replace(model.moe, dispatch=dispatch)
  options = dataclasses.replace(model.network.options, moe=moe)
  model = dataclasses.replace(model, network=model.network.clone(options=options))
  greedy = generate.Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.int32(-1))
  with jax.set_mesh(model.mesh):
    params = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(lambda: init_params(model, jnp.int32(0))),
      params_shardings(model),
    )
    tokens = jnp.zeros((ROWS, PROMPT), jnp.int32)
    prompts = (tokens, jnp.full((ROWS,), PROMPT, jnp.int32), jax.random.key(0), greedy)
    prefill = generate.prefill.lower(model, CELLS, params, {}, *prompts).compile()
    rows = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(lambda p: generate.prefill(model, CELLS, p, {}, *prompts), params),
      prefill.output_shardings,
    )
    compiled = generate.continue_rows.lower(model, 4, params, {}, rows, greedy).compile()
  cache = jax.eval_shape(lambda: model.decode.init_cache(ROWS, CELLS))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  return compiled, size // model.mesh.size


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_the_cache_that_goes_in_is_the_cache_that_comes_out(mesh):
  compiled, cache = compiled_steps(mesh)
  # Beside it the other state of the rows, some 20 bytes for each.
  assert cache <= compiled.memory_analysis().alias_size_in_bytes < cache + 40 * ROWS
  assert 'input_output_alias={' in compiled.as_text()


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_a_step_copies_the_cache_of_one_layer(mesh):
  # Keys and values of one layer of 8 are read from a copy. A second cache would be all of it.
  compiled, cache = compiled_steps(mesh, num_layers=8)
  assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * cache


def test_a_step_copies_the_experts_of_no_layer():
  of_layer = 4 * 64 * 3 * 64 * 128
  compiled, _ = compiled_steps()
  assert compiled.memory_analysis().temp_size_in_bytes < of_layer / 4
  # The test can fail: slots for all tokens at all experts read a layer's experts from a copy.
  slots, _ = compiled_steps(dispatch='gather')
  assert slots.memory_analysis().temp_size_in_bytes > of_layer
