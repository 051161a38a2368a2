"""Token choice by logits with noise of fixed size, gates as they are (V-MoE).

One-letter dimensions: G routing groups, S tokens of a group, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import fields
from moe_jax.router_options import (
  GateScaleOptions,
  MatrixOptions,
  SoftmaxOrderOptions,
  hyperparameter,
)
from moe_jax.routing import router as router_lib
from moe_jax.routing import selection as selection_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers import noisy_top_k, top_k
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, SoftmaxOrderOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  noise_scale: float = hyperparameter(
    fields.positive(1.0, 'The noise on the logits has deviation noise_scale / E.')
  )


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest of h = x W_r + N(0, (noise_scale / E)^2).

  Gates are the softmax of h over all experts, at the selected ones; V-MoE has `renormalize` none,
  any other value (and `softmax_order`) acts as in `top_k`. `router_probs` and
  `router_logits` are those of the logits without noise: the importance loss reads them, and so does
  `moe.priority`. In evaluation there is no noise and nothing is drawn. Equal h go to the lower
  expert index.

  `load` sums 1 - Phi((eta - z_e) E / noise_scale), eta the K-th largest h of the token: the
  probability that expert e, its own noise drawn again, reaches eta. For an expert that was not
  selected that is the probability of being selected, all other noise as it is. For a selected one
  it is smaller than that, as the threshold to stay selected is the (K+1)-th largest h
  (`noisy_top_k` reads that one). Carries gradient, also through eta. Without noise (evaluation, or
  noise_scale 0) load counts the assignments, without gradient.

  Source: Riquelme et al. 2021, arXiv:2106.05974, app. A, and its code, vmoe/nn/routing.py
  (942a78b), which agree: importance of the softmax without noise, eta the K-th largest h, gates of
  the softmax with noise. Differs: V-MoE's batch-prioritised routing sorts by the largest gate, with
  noise; `priority` here by the largest probability without.
  """
  del state
  num_experts = options.num_experts
  router_logits = router_lib.logits(params, inputs.tokens, options)
  noisy = options.training and options.noise_scale > 0
  selection = router_logits
  if noisy:
    # Of fixed size: nothing about the noise is learned.
    noise = noisy_top_k.normal(inputs.keys, router_logits.shape[1:])
    selection = router_logits + noise * (options.noise_scale / num_experts)
  choice = top_k.choose_top_k(
    selection,
    num_selected_experts=options.num_selected_experts,
    softmax_order=options.softmax_order,
    renormalize=options.renormalize,
    gate_scale=options.gate_scale,
  )
  if noisy:
    last_in = selection_lib.smallest_selected(selection, choice.expert_index)
    load = probability_above(last_in, router_logits, options.noise_scale / num_experts)
  else:
    load = noisy_top_k.spread(choice.expert_index, jnp.ones_like(choice.gates), num_experts)
  return choice._replace(
    router_probs=jax.nn.softmax(router_logits, axis=-1),
    router_logits=router_logits,
    sums={'load': router_lib.masked_sum(load, inputs.valid)},
  )


def probability_above(
  threshold: Float[Array, 'G S 1'], router_logits: Float[Array, 'G S E'], deviation: float
) -> Float[Array, 'G S E']:
  """Returns P(logit + N(0, deviation^2) > threshold)."""
  # 1 - Phi(a) = Phi(-a), without the rounding of 1 - 1.
  return jax.scipy.special.ndtr((router_logits - threshold) / deviation)


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns (CV^2(importance) + CV^2(load)) / 2; 0 at balance.

  Importance is the summed softmax of the logits without noise. Over the valid tokens of the whole
  (micro-)batch; V-MoE's code forms one loss per group. CV^2 is the population variance over the
  squared mean, the latter at least 1e-10.

  Source: Riquelme et al. 2021, arXiv:2106.05974, app. A.
  """
  del state
  importance = jnp.sum(sums.prob_sum.reshape(-1, options.num_experts), axis=0)
  # App. A: the mean of importance loss and load loss.
  variation = router_lib.squared_variation(importance)
  return (variation + router_lib.squared_variation(sums.own['load'])) / 2


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects negative noise, and gates that are always 1."""
  if options.noise_scale < 0:
    return 'noise_scale', 'must not be negative'
  return top_k.gates_allowed(options)


ROUTER = router_lib.Router(
  name='vmoe',
  paper='Riquelme et al. 2021, arXiv:2106.05974',
  summary='K largest logits with noise 1 / E; loss on importance and smooth load',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='loss',
  cost='D E multiply-adds, E random numbers, top-k of E',
  loss=loss,
  allowed=allowed,
)
