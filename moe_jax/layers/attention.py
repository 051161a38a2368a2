"""Grouped-query attention with rotary positions, with or without a key-value cache.

One-letter dimensions: B sequences, T tokens of each, D embed, N heads, KV key-value heads, H
dimensions of a head, L layers, M cells of the cache, or the T keys without one.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.layers.basic import logical, matrix_init


class KeyValueCache(NamedTuple):
  """Keys (rotated) and values of the positions seen so far; M is the longest sequence it holds.

  Of all L layers in one array each, so that a step writes its cells where they are: a loop that
  takes the cache of one layer after the other copies all of it at each step.
  """

  key: Float[Array, 'B L M KV H']
  value: Float[Array, 'B L M KV H']


def rotate(
  x: Float[Array, 'B T N H'], positions: Int[Array, 'B T'], theta: float
) -> Float[Array, 'B T N H']:
  """Rotary position embedding; dimension i is paired with i + H/2.

  Source: Su et al. 2021, arXiv:2104.09864, sec. 3.2. Differs: halves are paired, not neighbours.
  """
  # Angles grow with the position and fall with the dimension: theta ** (-i / (H / 2)).
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  # [B T 1 H/2], one angle for each pair and the same for all heads. In float32: bfloat16 does not
  # tell position 257 from 256.
  angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  # Each pair is a point of the plane, turned by its angle. Weights of a codebase that pairs 2i with
  # 2i + 1 need the columns of each head permuted.
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)


def packed_causal_mask(segment_ids: Int[Array, 'B T']) -> Bool[Array, 'B 1 T T']:
  """True where query t may see key t': t' <= t in the same document. Padding sees itself."""
  # Order in the packed sequence, not in the document: the second condition sees to documents.
  position = jnp.arange(segment_ids.shape[-1])
  causal = position[:, None] >= position[None, :]
  same_document = segment_ids[:, :, None] == segment_ids[:, None, :]
  # [B 1 T T], 1 for all heads. The diagonal is True, so no softmax is over nothing.
  return (causal[None] & same_document)[:, None]


class Attention(nn.Module):
  """Causal multi-head attention in which groups of query heads share a key-value head.

  Attributes:
    num_heads: query heads.
    num_kv_heads: key-value heads; divides num_heads.
    head_dim: H, even.
    rope_theta: base of the rotary frequencies.

  Source: Ainslie et al. 2023, arXiv:2305.13245.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    positions: Int[Array, 'B T'],
    mask: Bool[Array, 'B 1 T M'],
    cache: KeyValueCache | None = None,
    layer: Int[Array, ''] | int = 0,
  ) -> tuple[Float[Array, 'B T D'], KeyValueCache | None]:
    """Returns the output and, if a cache came in, the cache with these positions written.

    Args:
      x: normalised input.
      positions: position in the document (rotary), and with a cache the cell to write. With a
        cache, the T positions of a row are consecutive.
      mask: True where a query may see a key.
      cache: keys and values of earlier positions.
      layer: the number of this one in the cache.
    """
    embed_dim = x.shape[-1]

    def project(name: str, heads: int, dim: str) -> Float[Array, 'B T N H']:
      kernel = self.param(
        name, logical(matrix_init, 'embed', dim), (embed_dim, heads * self.head_dim)
      )
      return (x @ kernel.astype(x.dtype)).reshape(*x.shape[:2], heads, self.head_dim)

    # Rotated before they are cached: the dot product of two rotated vectors depends only on the
    # difference of their positions, so a cached key stays valid.
    query = rotate(project('query', self.num_heads, 'heads'), positions, self.rope_theta)
    key = rotate(project('key', self.num_kv_heads, 'kv_heads'), positions, self.rope_theta)
    value = project('value', self.num_kv_heads, 'kv_heads')
    if cache is not None:
      # Decoding: new keys and values go into their cells, then queries read the whole cache.
      start = positions[:, 0]
      cache = KeyValueCache(
        _write(cache.key, key, layer, start), _write(cache.value, value, layer, start)
      )
      key, value = (
        jax.lax.dynamic_index_in_dim(cells, layer, axis=1, keepdims=False) for cells in cache
      )
    # [B T N H] queries, [B M KV H] keys and values: query head n reads head n // (N / KV) of them.
    # Logits are divided by sqrt(H).
    attended = jax.nn.dot_product_attention(
      query, key.astype(query.dtype), value.astype(query.dtype), mask=mask
    )
    out = self.param(
      'out', logical(matrix_init, 'heads', 'embed'), (self.num_heads * self.head_dim, embed_dim)
    )
    return attended.reshape(*x.shape[:2], -1) @ out.astype(x.dtype), cache


def _write(
  cells: Float[Array, 'B L M KV H'],
  new: Float[Array, 'B T KV H'],
  layer: Int[Array, ''] | int,
  start: Int[Array, 'B'],
) -> Float[Array, 'B L M KV H']:
  # Each row of the batch is at a position of its own. A start beyond M - T would be moved back
  # without a word, and overwrite earlier cells.
  write_row = jax.vmap(
    lambda row, x, at: jax.lax.dynamic_update_slice(row, x[None], (layer, at, 0, 0))
  )
  return write_row(cells, new.astype(cells.dtype), start)
