"""Balance losses for comparison with other codebases, formed from `RouterSums` as in `losses`.

None is multiplied by its weight here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.losses import load_balancing_loss
from moe_jax.routing.stats import RouterSums

NORMALIZATIONS = ('one', 'k', 'gshard')


def device_balance_loss(
  sums: RouterSums, num_selected_experts: int, num_devices: int
) -> Float[Array, '*layers']:
  """Returns sum_D f_D P_D, averaged over scopes: 1 at balance, num_devices if one part wins all.

  The experts form `num_devices` equal parts of consecutive experts. f_D is the mean over the part
  of E f_e (f_e the share of assignments before any drop; no gradient), P_D the sum over the part of
  the mean router probabilities.

  Args:
    sums: leading dimensions, if any, are layers.
    num_selected_experts: K; f is divided by it.
    num_devices: parts; a number of the model, whatever the mesh.

  Raises:
    ValueError: if the parts do not divide the experts.

  Source: Dai et al. 2024, arXiv:2401.06066, the device-level balance loss. Differs: without its
  weight; scopes with few valid tokens count for less.
  """
  num_experts = sums.prob_sum.shape[-1]
  if num_devices < 1 or num_experts % num_devices:
    raise ValueError(f'num_devices={num_devices!r}: must divide num_experts={num_experts}')
  tokens = jnp.maximum(sums.tokens, 1.0)
  shape = (*tokens.shape, num_devices, num_experts // num_devices)
  counts = jax.lax.stop_gradient(sums.tokens_per_expert).reshape(shape)
  load = num_experts * jnp.mean(counts, axis=-1) / (num_selected_experts * tokens[..., None])
  prob = jnp.sum(sums.prob_sum.reshape(shape), axis=-1) / tokens[..., None]
  per_scope = jnp.sum(load * prob, axis=-1)
  total = jnp.maximum(jnp.sum(sums.tokens, axis=-1), 1.0)
  return jnp.sum(per_scope * sums.tokens, axis=-1) / total


def load_balancing_value(
  sums: RouterSums, num_selected_experts: int, normalization: str
) -> Float[Array, '*layers']:
  """Returns `load_balancing_loss` as other codebases scale it.

  Args:
    sums: leading dimensions, if any, are layers.
    num_selected_experts: K.
    normalization: with c_e the assignments before any drop, T tokens and P_e the mean router
      probability: `one`: E sum_e c_e / (K T) P_e, 1 at balance (Switch, Megatron, DeepSeek). `k`:
      E sum_e c_e / T P_e, K at balance (Hugging Face; the top-k router of Flaxformer). `gshard`:
      mean_e c_e / (K T) P_e, 1 / E^2 at balance.

  Raises:
    ValueError: for an unknown normalization.

  Source: `gshard`: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1. Differs: all K choices
  count, divided by K; there, only first choices count.
  """
  num_experts = sums.prob_sum.shape[-1]
  factors = {'one': 1.0, 'k': float(num_selected_experts), 'gshard': 1.0 / num_experts**2}
  if normalization not in factors:
    raise ValueError(f'normalization={normalization!r}: must be one of {NORMALIZATIONS}')
  return load_balancing_loss(sums, num_selected_experts) * factors[normalization]
