"""Decoder-only transformer with a MoE layer in every n-th block.

Blocks are scanned in units of n: n - 1 dense blocks, then one with experts. Compile time does not
grow with depth.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax import routing
from moe_jax.dispatch import DECODE, EXCHANGED
from moe_jax.layers.attention import Attention, KeyValueCache, packed_causal_mask
from moe_jax.layers.basic import Mlp, RMSNorm, logical, matrix_init
from moe_jax.layers.cross_entropy import logits
from moe_jax.layers.moe import ROUTER_STATE, Moe
from moe_jax.layers.moe_options import MoeOptions, TokenInfo, TokenRouting
from moe_jax.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DecoderOptions:
  """Every choice of the model, as plain numbers and names; see `moe_jax.config` for each.

  `moe` None is a dense model. `every` is the n of "a MoE layer in every n-th block".
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  activation: str
  rope_theta: float
  norm_epsilon: float
  tied_embeddings: bool
  remat: bool
  compute_dtype: str
  moe: MoeOptions | None
  every: int
  num_shared_experts: int


class DecoderOutput(NamedTuple):
  """Output of a forward pass; statistics are values, never side effects.

  Attributes:
    hidden: normalised, in the dtype of the matmuls.
    output: the matrix from it to the logits, in the same.
    router_sums: each leaf with a leading dimension of MoE layers; None for a dense model.
    choices: as in `LayerOutput`.
    cache: the updated cache, if one came in.
    routed: as in `LayerOutput`, each leaf with a leading dimension of MoE layers.
  """

  hidden: Float[Array, 'B T D']
  output: Float[Array, 'D V']
  router_sums: routing.RouterSums | None
  choices: Int[Array, 'L B T K'] | None
  cache: Any
  routed: TokenRouting | None = None

  @property
  def logits(self) -> Float[Array, 'B T V']:
    """Next-token logits in float32. All of them at once: training and evaluation go by parts."""
    return logits(self.hidden, self.output)


class _Block(nn.Module):
  """Attention and feed-forward, each behind a norm and added to the residual stream."""

  options: DecoderOptions
  mesh: Mesh
  sparse: bool

  @nn.compact
  def __call__(self, x, mask, info, cache, experts, layer, deterministic):
    options = self.options
    attention = Attention(
      options.num_heads,
      options.num_kv_heads,
      options.head_dim,
      options.rope_theta,
      name='attention',
    )
    with jax.named_scope('attention'):
      attended, cache = attention(
        RMSNorm(options.norm_epsilon, name='attention_norm')(x),
        info.positions,
        mask,
        cache,
        layer,
      )
    x = constrain(x + attended, self.mesh, 'batch', None, 'embed')
    normed = RMSNorm(options.norm_epsilon, name='mlp_norm')(x)
    if not self.sparse:
      with jax.named_scope('mlp'):
        y = Mlp(options.mlp_dim, options.activation, name='mlp')(normed)
      return x + y, (None, None, None), cache
    assert options.moe is not None
    moe = Moe(options.moe, self.mesh, options.vocab_size, name='moe')
    y, *routed = moe(normed, info, deterministic, experts, layer)
    if options.num_shared_experts:
      shared_dim = options.num_shared_experts * options.moe.mlp_dim
      with jax.named_scope('mlp'):
        y = y + Mlp(shared_dim, options.activation, name='shared')(normed)
    return x + y, tuple(routed), cache


class _Unit(nn.Module):
  """The unit of the scan: `every` blocks, the last with experts (none in a dense model)."""

  options: DecoderOptions
  mesh: Mesh
  deterministic: bool

  @nn.compact
  def __call__(self, carry, layer, mask, info, experts):
    x, cache = carry
    routed = (None, None, None)
    new_cache = []
    for i in range(self.options.every):
      sparse = self.options.moe is not None and i == self.options.every - 1
      block = _Block(self.options, self.mesh, sparse, name=f'block_{i}')
      block_cache = None if cache is None else cache[i]
      x, routed, block_cache = block(x, mask, info, block_cache, experts, layer, self.deterministic)
      new_cache.append(block_cache)
    cache = None if cache is None else tuple(new_cache)
    return (constrain(x, self.mesh, 'batch', None, 'embed'), cache), routed


class Decoder(nn.Module):
  """The language model.

  Attributes:
    options: every choice of the model.
    mesh: axes ('data', 'expert').
  """

  options: DecoderOptions
  mesh: Mesh

  @nn.compact
  def __call__(
    self,
    inputs: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'],
    positions: Int[Array, 'B T'],
    *,
    cache: Any = None,
    deterministic: bool = True,
  ) -> DecoderOutput:
    """Returns the output from which next-token logits are computed.

    Args:
      inputs: token ids.
      segment_ids: document number within the row, from 1; 0 is padding. With a cache a row is one
        document, and 0 marks tokens that are computed and discarded.
      positions: position within the document.
      cache: from `init_cache`; `positions` then name the cells to write.
      deterministic: no jitter and no random stream; the `routing` stream is needed otherwise.
    """
    options = self.options
    dtype = jnp.dtype(options.compute_dtype)
    embedding = self.param(
      'embedding',
      logical(nn.initializers.normal(0.02), 'vocab', 'embed'),
      (options.vocab_size, options.embed_dim),
    )
    with jax.named_scope('embedding'):
      x = constrain(embedding.astype(dtype)[inputs], self.mesh, 'batch', None, 'embed')
    mask = packed_causal_mask(segment_ids) if cache is None else _cache_mask(positions, cache)
    unit = _Unit
    if options.remat:
      policy = jax.checkpoint_policies.save_only_these_names(EXCHANGED)
      unit = nn.remat(_Unit, prevent_cse=False, policy=policy)
    num_units = options.num_layers // options.every
    scanned = nn.scan(
      unit,
      variable_axes={'params': 0, ROUTER_STATE: 0},
      split_rngs={'params': True, 'routing': True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      out_axes=0,
      length=num_units,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    (x, cache), (sums, choices, routed) = scanned(options, self.mesh, deterministic, name='layers')(
      (x, cache),
      jnp.arange(num_units, dtype=jnp.int32),
      mask,
      TokenInfo(segment_ids > 0, inputs, positions),
      self._experts_of_all_layers(),
    )
    x = RMSNorm(options.norm_epsilon, name='final_norm')(x)
    if options.tied_embeddings:
      output = embedding.T
    else:
      output = self.param(
        'output', logical(matrix_init, 'embed', 'vocab'), (options.embed_dim, options.vocab_size)
      )
    return DecoderOutput(x, output.astype(dtype), sums, choices, cache, routed)

  def _experts_of_all_layers(self) -> tuple[Array, Array] | None:
    """Returns the experts' weights as they are stored, where decoding reads few of them.

    The scan over layers would copy all experts of each layer, selected or not.
    """
    moe = self.options.moe
    if moe is None or moe.dispatch != DECODE or self.is_initializing():
      return None
    weights = self.variables['params']['layers'][f'block_{self.options.every - 1}']['moe']
    return weights['w_in'], weights['w_out']


def forward(
  model: Decoder,
  params: Any,
  inputs: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  *,
  cache: Any = None,
  key: Key[Array, ''] | None = None,
  router_state: Any = None,
) -> DecoderOutput:
  """Applies the model; with a key as in training (jitter, random drops), without deterministically.

  Args:
    model: whose parameters these are.
    params: without Linen's outer collection.
    inputs: as in `Decoder.__call__`, like the rest.
    segment_ids: documents within a row.
    positions: within the document.
    cache: from `init_cache`.
    key: of what is drawn.
    router_state: arrays of all MoE layers, from `init_router_state` or later; None or {} where the
      router has none.
  """
  rngs = None if key is None else {'routing': key}
  out = model.apply(
    {'params': params} | _linen_state(model.options, router_state),
    inputs,
    segment_ids,
    positions,
    cache=cache,
    deterministic=key is None,
    rngs=rngs,
  )
  assert isinstance(out, DecoderOutput)
  return out


def init_router_state(options: DecoderOptions) -> dict[str, Array]:
  """Returns the state of the routers before the first step, each array with the layers in front."""
  if options.moe is None:
    return {}
  new = routing.ROUTERS[options.moe.router].state(
    options.moe.choice, options.embed_dim, options.vocab_size
  )
  layers = options.num_layers // options.every
  return {name: jnp.repeat(value[None], layers, axis=0) for name, value in new.items()}


def _linen_state(options: DecoderOptions, router_state: Any) -> dict[str, Any]:
  if not router_state:
    return {}
  return {ROUTER_STATE: {'layers': {f'block_{options.every - 1}': {'moe': router_state}}}}


def init_cache(options: DecoderOptions, batch_size: int, max_length: int) -> tuple:
  """Returns an empty cache for `batch_size` sequences of at most `max_length` tokens."""
  shape = (
    batch_size,
    options.num_layers // options.every,
    max_length,
    options.num_kv_heads,
    options.head_dim,
  )
  dtype = jnp.dtype(options.compute_dtype)
  return tuple(
    KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(options.every)
  )


def _cache_mask(positions: Int[Array, 'B T'], cache: tuple) -> Bool[Array, 'B 1 T M']:
  """A query sees the cells up to its own position; later ones hold nothing of its past."""
  cell = jnp.arange(cache[0].key.shape[2])
  return (cell[None, None, :] <= positions[:, :, None])[:, None]
