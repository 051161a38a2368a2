"""Auxiliary losses of a router, formed from `RouterSums`. None is multiplied by its weight here.

Each takes the sums of one layer (leading dimensions broadcast) and averages over the balance
scopes, weighted by their valid tokens, so that a scope of padding alone counts for nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.routing.stats import RouterSums


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
  see partial counts. With `microbatch` each micro-batch is balanced for itself.
  """
  num_experts = sums.prob_sum.shape[-1]
  tokens = _at_least_one(sums.tokens)[..., None]
  expert_share = jax.lax.stop_gradient(sums.tokens_per_expert) / (num_selected_experts * tokens)
  mean_prob = sums.prob_sum / tokens
  per_scope = num_experts * jnp.sum(expert_share * mean_prob, axis=-1)
  return _mean_over_scopes(per_scope, sums.tokens)


def router_z_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the mean over tokens of logsumexp(router_logits)^2.

  Source: Zoph et al. 2022, arXiv:2202.08906, eq. 5.
  """
  return sums.logsumexp_squared / _at_least_one(jnp.sum(sums.tokens, axis=-1))


def importance_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the squared coefficient of variation of the summed router probabilities; 0 at balance.

  Population variance over squared mean, never through a standard deviation, whose gradient is NaN
  at perfect balance.

  Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7, on the softmax over all experts as in
  Riquelme et al. 2021, arXiv:2106.05974, app. A (Shazeer sums the gates after selection).
  """
  mean_prob = sums.prob_sum / _at_least_one(sums.tokens)[..., None]
  mean = jnp.mean(mean_prob, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(mean_prob - mean), axis=-1)
  per_scope = variance / jnp.maximum(jnp.square(mean[..., 0]), 1e-10)
  return _mean_over_scopes(per_scope, sums.tokens)


def entropy_loss(sums: RouterSums) -> Float[Array, '*layers']:
  """Returns the mean over tokens of the entropy of the router probabilities, in nats.

  Log E for a router that does not know, 0 for one that is sure. A positive weight makes routers
  surer, a negative one keeps them undecided.
  """
  return sums.entropy / _at_least_one(jnp.sum(sums.tokens, axis=-1))


def _mean_over_scopes(
  per_scope: Float[Array, '*layers N'], tokens: Float[Array, '*layers N']
) -> Float[Array, '*layers']:
  return jnp.sum(per_scope * tokens, axis=-1) / _at_least_one(jnp.sum(tokens, axis=-1))


def _at_least_one(tokens: Float[Array, '*any']) -> Float[Array, '*any']:
  return jnp.maximum(tokens, 1.0)
