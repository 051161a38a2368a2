"""RMSNorm, the dense feed-forward layer, and how parameters name their dimensions.

One-letter dimensions: B sequences, T tokens of each, D embed, F hidden units.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.experts import activate, hidden_dim

# A matrix [.., fan_in, fan_out]; a leading expert dimension must not count into the fan-in.
matrix_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')
experts_init = nn.initializers.variance_scaling(
  1.0, 'fan_in', 'truncated_normal', in_axis=-2, out_axis=-1, batch_axis=(0,)
)


def logical(init: Callable, *dims: str | None) -> Callable:
  """Names the dimensions of a parameter; `parallel.sharding.RULES` maps them to the mesh."""
  return nn.with_logical_partitioning(init, dims)


class RMSNorm(nn.Module):
  """Divides by the root mean square over the last dimension, in float32, and scales.

  Source: Zhang and Sennrich 2019, arXiv:1910.07467.
  """

  epsilon: float

  @nn.compact
  def __call__(self, x: Float[Array, '*any D']) -> Float[Array, '*any D']:
    """Returns the normalised array in the dtype of the input."""
    scale = self.param('scale', logical(nn.initializers.ones, 'embed'), (x.shape[-1],))
    # [D] -> [1 .. 1 D], spelt out: tests forbid that arrays of different rank are broadcast.
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    # Squares of bfloat16 numbers, summed over D in bfloat16, would lose the small ones.
    x_fp32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x_fp32), axis=-1, keepdims=True)
    return (x_fp32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class Mlp(nn.Module):
  """Dense feed-forward layer without biases.

  Attributes:
    mlp_dim: F, hidden units.
    activation: one of `experts.ACTIVATIONS`.
  """

  mlp_dim: int
  activation: str

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """Returns w_out(activation(w_in(x)))."""
    embed_dim = x.shape[-1]
    columns = hidden_dim(self.mlp_dim, self.activation)
    w_in = self.param('w_in', logical(matrix_init, 'embed', 'mlp'), (embed_dim, columns))
    w_out = self.param('w_out', logical(matrix_init, 'mlp', 'embed'), (self.mlp_dim, embed_dim))
    hidden = activate(x @ w_in.astype(x.dtype), self.activation)
    return hidden @ w_out.astype(x.dtype)
