"""Auxiliary losses of a router, formed from `RouterSums`. None is multiplied by its weight here.

Each takes the sums of one layer (leading dimensions broadcast) and averages over the balance
scopes, weighted by their valid tokens, so that a scope of only padding counts for nothing.

One-letter dimensions: N balance scopes, E experts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.router import squared_variation
from moe_jax.routing.stats import RouterSums

# Scales of the load-balancing loss that codebases use, see `load_balancing_value`.
NORMALIZATIONS = ('one', 'k', 'gshard')


def load_balancing_loss(sums: RouterSums, num_selected_experts: int) -> Float[Array, '*layers']:
  """Returns E * sum_e f_e P_e, averaged over scopes: 1 at balance, E if one expert wins all (K=1).

  f_e is the share of assignments expert e received BEFORE any drop (sums to 1 over e; no gradient),
  P_e its mean router probability.

  Args:
    sums: leading dimensions, if any, are layers.
    num_selected_experts: K; f is divided by it.

  Source: Fedus et al. 2021, arXiv:2101.03961, eq. 4. Differs: divided by K, so that the value at
  perfect balance is 1 for every K; one value per layer, where Hugging Face concatenates the tokens
  of all layers before it forms f and P.

  Scope `global`: Qiu et al. 2025, arXiv:2501.11873, if train.accumulation_scope is `batch` or there
  is one micro-batch. With `running` it is their buffer (algorithm 1): all but the last micro-batch
  see partial counts. With `microbatch` each micro-batch is balanced by itself.
  """
  num_experts = sums.prob_sum.shape[-1]
  tokens = _at_least_one(sums.tokens)[..., None]
  # Counts before any drop: after it no expert is above its capacity, and an overload would not
  # show. Counts have no gradient; all of it passes through P, away from loaded experts.
  expert_share = jax.lax.stop_gradient(sums.tokens_per_expert) / (num_selected_experts * tokens)
  mean_prob = sums.prob_sum / tokens
  # [N E] -> [N], a loss for each scope: f P of the whole batch could balance without its scopes.
  per_scope = num_experts * jnp.sum(expert_share * mean_prob, axis=-1)
  return _mean_over_scopes(per_scope, sums.tokens)


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
  tokens = _at_least_one(sums.tokens)
  # [N E] -> [N parts E/parts], consecutive experts to a part.
  shape = (*tokens.shape, num_devices, num_experts // num_devices)
  counts = jax.lax.stop_gradient(sums.tokens_per_expert).reshape(shape)
  # The mean over a part for f, the sum for P: f' and P' of the source.
  load = num_experts * jnp.mean(counts, axis=-1) / (num_selected_experts * tokens[..., None])
  prob = jnp.sum(sums.prob_sum.reshape(shape), axis=-1) / tokens[..., None]
  per_scope = jnp.sum(load * prob, axis=-1)
  return _mean_over_scopes(per_scope, sums.tokens)


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
  # All are multiples of `load_balancing_loss`, which is E sum_e c_e / (K T) P_e.
  factors = {'one': 1.0, 'k': float(num_selected_experts), 'gshard': 1.0 / num_experts**2}
  if normalization not in factors:
    raise ValueError(f'normalization={normalization!r}: must be one of {NORMALIZATIONS}')
  return load_balancing_loss(sums, num_selected_experts) * factors[normalization]


def router_z_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the mean over tokens of logsumexp(router_logits)^2.

  Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
  """
  # No scopes: a mean over tokens is the same however they are divided.
  return sums.logsumexp_squared / _at_least_one(jnp.sum(sums.tokens, axis=-1))


def importance_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the squared coefficient of variation of the summed router probabilities; 0 at balance.

  Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7, on the softmax over all experts as in
  Riquelme et al. 2021, arXiv:2106.05974, app. A (Shazeer sums the gates after selection).
  """
  # The coefficient of variation does not change with the scale. Dividing by the tokens keeps the
  # mean near 1 / E, above the floor below.
  mean_prob = sums.prob_sum / _at_least_one(sums.tokens)[..., None]
  return _mean_over_scopes(squared_variation(mean_prob), sums.tokens)


def entropy_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the mean over tokens of the entropy of the router probabilities, in nats.

  Log E for a uniform router, 0 for one that is certain. A positive weight makes routers more
  certain, a negative one less.
  """
  return sums.entropy / _at_least_one(jnp.sum(sums.tokens, axis=-1))


def _mean_over_scopes(
  per_scope: Float[Array, '*layers N'], tokens: Float[Array, '*layers N']
) -> Float[Array, '*layers']:
  return jnp.sum(per_scope * tokens, axis=-1) / _at_least_one(jnp.sum(tokens, axis=-1))


def _at_least_one(tokens: Float[Array, '*any']) -> Float[Array, '*any']:
  return jnp.maximum(tokens, 1.0)
