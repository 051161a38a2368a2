"""With a cache, token by token, the model says what it says about the whole text at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.decoder import forward, init_cache
from tests.models import small_decoder


@pytest.mark.parametrize(
  'changes', [{}, {'every': 2, 'num_shared_experts': 1, 'tied_embeddings': True}]
)
def test_token_by_token_equals_the_full_pass(changes):
  model = small_decoder.make_model(mesh=(2, 2), moe={'capacity_factor': None}, **changes)
  params = small_decoder.draw_params(model)
  length, lengths = 9, np.array([3, 6, 1, 5])
  tokens, segment_ids, positions = small_decoder.draw_tokens(4, length)
  whole = jax.jit(lambda: forward(model, params, tokens, segment_ids, positions).logits)()

  @jax.jit
  def step(tokens, segment_ids, positions, cache):
    return forward(model, params, tokens, segment_ids, positions, cache=cache)

  # The prompts, padded on the right with tokens that must not matter.
  in_prompt = positions[:, :6] < lengths[:, None]
  prompts = jnp.where(in_prompt, tokens[:, :6], 31)
  cache = init_cache(model.options, 4, length)
  out = step(prompts, in_prompt.astype(jnp.int32), positions[:, :6], cache)
  for row in range(4):
    seen = slice(0, lengths[row])
    np.testing.assert_allclose(out.logits[row, seen], whole[row, seen], rtol=1e-4, atol=1e-5)
  for i in range(3):
    at = jnp.asarray(lengths + i, jnp.int32)[:, None]
    token = jnp.take_along_axis(tokens, at, axis=1)
    out = step(token, jnp.ones_like(token), at, out.cache)
    expected = np.take_along_axis(np.asarray(whole), np.asarray(at)[..., None], axis=1)
    np.testing.assert_allclose(out.logits, expected, rtol=1e-4, atol=1e-5)


def test_empty_cache_has_the_models_sizes():
  model = small_decoder.make_model(num_layers=6, every=2, compute_dtype='bfloat16')
  cache = init_cache(model.options, 3, 7)
  # 6 layers in units of 2: 3 units, and one pair of arrays for each block of a unit.
  shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache)]
  assert shapes == 4 * [((3, 3, 7, 1, 4), jnp.bfloat16)]
