"""The decoder equals its blocks written out, whatever is scanned, shared, tied or recomputed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import Attention, packed_causal_mask
from moe_jax.layers.basic import Mlp, RMSNorm
from moe_jax.layers.moe import Moe
from moe_jax.layers.moe_options import TokenInfo
from moe_jax.models.decoder import forward
from moe_jax.parallel.mesh import EXPERT_AXIS
from moe_jax.parallel.sharding import named_shardings
from tests import tiny
from tests.models import small_decoder


def packed_rows():
  """Two rows: documents of 3 and 3 tokens; one of 4 and 2 of padding."""
  tokens, _, _ = small_decoder.draw_tokens(2, 6)
  segment_ids = jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])
  positions = jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]])
  return tokens, segment_ids, positions


def written_out(model, params, tokens, segment_ids, positions):
  """The same model without a scan: one block after the other."""
  options = model.options
  x = params['embedding'][tokens]
  mask = packed_causal_mask(segment_ids)
  all_sums = []
  for layer in range(options.num_layers):
    unit, i = divmod(layer, options.every)
    block = jax.tree.map(lambda leaf, unit=unit: leaf[unit], params['layers'][f'block_{i}'])

    def run(module, name, *arguments, block=block):
      return module.apply({'params': block[name]}, *arguments)

    norm = RMSNorm(options.norm_epsilon)
    attention = Attention(
      options.num_heads, options.num_kv_heads, options.head_dim, options.rope_theta
    )
    x = x + run(attention, 'attention', run(norm, 'attention_norm', x), positions, mask)[0]
    normed = run(norm, 'mlp_norm', x)
    if options.moe is None or i < options.every - 1:
      x = x + run(Mlp(options.mlp_dim, options.activation), 'mlp', normed)
      continue
    info = TokenInfo(segment_ids > 0, tokens, positions)
    moe = Moe(options.moe, model.mesh, options.vocab_size)
    y, sums, *_ = run(moe, 'moe', normed, info, True)
    all_sums.append(sums)
    if options.num_shared_experts:
      shared = Mlp(options.num_shared_experts * options.moe.mlp_dim, options.activation)
      y = y + run(shared, 'shared', normed)
    x = x + y
  x = RMSNorm(options.norm_epsilon).apply({'params': params['final_norm']}, x)
  output = params['embedding'].T if options.tied_embeddings else params['output']
  return x @ output, all_sums


@pytest.mark.parametrize(
  'changes',
  [
    {'num_layers': 4, 'every': 2, 'num_shared_experts': 2},
    {'tied_embeddings': True, 'num_kv_heads': 2, 'activation': 'gelu'},
    {'moe': None},
  ],
)
def test_equals_its_blocks_written_out(changes):
  model = small_decoder.make_model(**changes)
  params = small_decoder.draw_params(model)
  out = jax.jit(lambda p: forward(model, p, *packed_rows()))(params)
  logits, sums = jax.jit(lambda p: written_out(model, p, *packed_rows()))(params)
  np.testing.assert_allclose(out.logits, logits, rtol=1e-4, atol=1e-5)
  assert ('output' in params) != model.options.tied_embeddings
  if not sums:
    assert out.router_sums is None
    return
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *sums)
  tiny.assert_close(out.router_sums._asdict(), stacked._asdict())


def training_outcome(remat):
  moe = {'jitter': 0.1, 'priority': 'random', 'capacity_factor': 0.75}
  model = small_decoder.make_model(moe=moe, remat=remat, num_shared_experts=1)
  params = small_decoder.draw_params(model)

  def loss(params):
    out = forward(model, params, *packed_rows(), key=jax.random.key(5))
    sums = out.router_sums
    return jnp.mean(jnp.square(out.logits)) + jnp.sum(sums.prob_sum**2) / 100, sums

  (value, sums), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return value, jax.tree.map(np.asarray, sums), gradients


def test_remat_changes_neither_counts_nor_gradients():
  value, sums, gradients = training_outcome(remat=False)
  value_again, sums_again, gradients_again = training_outcome(remat=True)
  np.testing.assert_allclose(value, value_again, rtol=1e-6)
  for name in ('tokens', 'tokens_per_expert', 'kept_per_expert', 'tokens_all_dropped'):
    np.testing.assert_array_equal(getattr(sums, name), getattr(sums_again, name))
  # 10 valid tokens, 2 experts each, in both layers; some dropped.
  np.testing.assert_array_equal(sums.tokens_per_expert.sum(axis=(1, 2)), 20)
  assert sums.kept_per_expert.sum() < 40
  for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_again), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_layers_draw_noise_of_their_own():
  # Two layers with the same weights on the same input (attention and experts give 0) would choose
  # alike if they shared their noise.
  model = small_decoder.make_model(moe={'jitter': 0.9, 'capacity_factor': None})
  params = small_decoder.draw_params(model)

  def silence(path, leaf):
    if path[-1].key in ('out', 'w_out'):
      return jnp.zeros_like(leaf)
    return jnp.broadcast_to(leaf[:1], leaf.shape)

  params['layers'] = jax.tree_util.tree_map_with_path(silence, params['layers'])
  tokens = small_decoder.draw_tokens(2, 12)

  def prob_sum(key):
    return jax.jit(lambda: forward(model, params, *tokens, key=key).router_sums.prob_sum)()

  noisy, calm = prob_sum(jax.random.key(0)), prob_sum(None)
  assert np.abs(noisy[0] - noisy[1]).max() > 0.1
  np.testing.assert_allclose(calm[0], calm[1], rtol=1e-5)


def test_documents_of_a_row_do_not_see_each_other():
  model = small_decoder.make_model(moe={'capacity_factor': None})
  params = small_decoder.draw_params(model)
  run = jax.jit(lambda *row: forward(model, params, *row).logits)
  tokens, segment_ids, positions = packed_rows()
  packed = run(tokens, segment_ids, positions)
  # Other tokens in document 1 change document 1 alone.
  other = run(tokens.at[0, :3].add(1), segment_ids, positions)
  np.testing.assert_array_equal(packed[0, 3:], other[0, 3:])
  assert np.abs(packed[0, :3] - other[0, :3]).max() > 1e-2
  # Document 2 in a row of its own says the same.
  alone = jnp.roll(tokens, -3, axis=1)
  only = jnp.array([[1, 1, 1, 0, 0, 0]] * 2)
  logits = run(alone, only, positions.at[1].set(positions[0]))
  np.testing.assert_allclose(logits[0, :3], packed[0, 3:], rtol=1e-4, atol=1e-5)


def test_padding_changes_no_valid_logit_and_no_sum():
  model = small_decoder.make_model(moe={'priority': 'priority', 'capacity_factor': 0.75})
  params = small_decoder.draw_params(model)
  run = jax.jit(lambda *row: forward(model, params, *row))
  tokens, segment_ids, positions = packed_rows()
  one = run(tokens, segment_ids, positions)
  other = run(tokens.at[1, 4:].add(5), segment_ids, positions)
  valid = np.asarray(segment_ids > 0)
  np.testing.assert_array_equal(one.logits[valid], other.logits[valid])
  np.testing.assert_equal(
    jax.tree.map(np.asarray, one.router_sums), jax.tree.map(np.asarray, other.router_sums)
  )


def test_narrow_compute_keeps_router_and_sums_wide():
  wide, narrow = (
    small_decoder.make_model(moe={'capacity_factor': None}, compute_dtype=dtype)
    for dtype in ('float32', 'bfloat16')
  )
  params = small_decoder.draw_params(narrow)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  out, expected = (
    jax.jit(lambda model=model: forward(model, params, *packed_rows()))()
    for model in (narrow, wide)
  )
  assert out.logits.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(out.router_sums)} == {jnp.dtype('float32')}
  # The first layer's logits stray by a few roundings (2**-8) of its input, not by more.
  np.testing.assert_allclose(
    out.router_sums.prob_sum[0], expected.router_sums.prob_sum[0], rtol=0.05
  )
  scale = np.abs(expected.logits).max()
  assert 1e-4 < np.abs(out.logits - expected.logits).mean() / scale < 0.05


def test_experts_are_sharded_and_everything_else_copied():
  model = small_decoder.make_model(mesh=(2, 4), moe={'num_experts': 8}, num_shared_experts=1)
  tokens = small_decoder.draw_tokens(8, 2)

  def init():
    return model.init(jax.random.key(0), *tokens)

  shardings = named_shardings(model.mesh, nn.get_partition_spec(jax.eval_shape(init)))
  params = nn.unbox(jax.jit(init, out_shardings=shardings)())['params']
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    of_experts = path[-1].key in ('w_in', 'w_out') and path[-2].key == 'moe'
    # [layers, E, ..]: 8 experts over an expert axis of 4 are 2 on each device.
    wanted = (leaf.shape[0], 2, *leaf.shape[2:]) if of_experts else leaf.shape
    assert {shard.data.shape for shard in leaf.addressable_shards} == {wanted}, path
    assert leaf.dtype == jnp.float32
  w_in = params['layers']['block_0']['moe']['w_in']
  assert w_in.shape[:2] == (2, 8)
  first_expert = {shard.device: shard.index[1].start or 0 for shard in w_in.addressable_shards}
  # Devices of one column of the mesh hold the same experts.
  for column in range(model.mesh.shape[EXPERT_AXIS]):
    assert {first_expert[d] for d in model.mesh.devices[:, column]} == {2 * column}
