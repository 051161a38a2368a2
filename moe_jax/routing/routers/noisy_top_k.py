"""Token choice by logits with learned noise; loss on importance and smooth load (Shazeer).

One-letter dimensions: G routing groups, S tokens of a group, D embed, E experts, K assignments of a
token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.router_options import (
  GateScaleOptions,
  LearnedNoiseOptions,
  SoftmaxOrderOptions,
)
from moe_jax.routing import router as router_lib
from moe_jax.routing import selection as selection_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State, Weight
from moe_jax.routing.routers import top_k
from moe_jax.routing.stats import RouterSums

# Lower bound of the divisor in the load estimator, so that its gradient stays finite when the
# learned deviation has gone to 0.
SMALLEST_DEVIATION = 1e-6


@dataclasses.dataclass(frozen=True)
class Options(LearnedNoiseOptions, SoftmaxOrderOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the one order that it allows."""
    del num_experts, num_selected_experts
    return {'softmax_order': 'after'}


def params(options: Options, embed_dim: int) -> dict[str, Weight]:
  """Returns the matrices of the logits and of the noise, both of which start at zero."""
  shape = (embed_dim, options.num_experts)
  return {'router': Weight(shape, 'zeros'), 'noise': Weight(shape, 'zeros')}


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest of h = x W_r + N(0, 1) * (softplus(x W_n) + noise_floor).

  Gates are the softmax over only the K selected h, so K must be at least 2. `router_probs` and
  `router_logits` are those of the logits without noise. In evaluation there is no noise and nothing
  is drawn. Equal h go to the lower expert index: before the first step, when both matrices are
  zero, evaluation sends every token to experts 0..K-1.

  `importance` sums the gates of each expert. `load` sums, for each expert, the probability that it
  would be selected if its own noise were drawn again and that of the others stayed, Phi((z -
  theta) / deviation): theta is the largest h left out for a selected expert, the smallest selected
  one for the others. Both carry gradient, load also through theta. With K = E every expert is
  always selected and there is no theta: the probability is 1. Without noise (evaluation), load
  counts the assignments; neither has a gradient.

  Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 (gates), 6-7 (importance), app. A (load,
  zero start). Differs: `noise_floor` is 0 as in the paper; Tensor2Tensor (bafdc1b) adds 1e-2.
  """
  del state
  num_experts = options.num_experts
  router_logits = router_lib.logits(params, inputs.tokens, options)
  selection = router_logits
  if options.training:
    # Eq. 4: logits plus normal noise, whose deviation each expert learns.
    deviation = noise_deviation(params, inputs.tokens, options)
    selection = router_logits + deviation * normal(inputs.keys, router_logits.shape[1:])
  # Eq. 3 and 5: the softmax over the K largest, as if all others were -inf.
  choice = top_k.choose_top_k(
    selection, num_selected_experts=options.num_selected_experts, softmax_order='after'
  )
  selected = spread(choice.expert_index, jnp.ones_like(choice.gates), num_experts)
  load = selected
  if options.training and options.num_selected_experts < num_experts:
    # App. A: counts have no gradient, the probability of being counted has one.
    load = selection_probability(router_logits, selection, selected, choice, deviation)
  return choice._replace(
    gates=choice.gates * options.gate_scale,
    router_probs=jax.nn.softmax(router_logits, axis=-1),
    router_logits=router_logits,
    sums={
      'importance': router_lib.masked_sum(
        spread(choice.expert_index, choice.gates, num_experts), inputs.valid
      ),
      'load': router_lib.masked_sum(load, inputs.valid),
    },
  )


def noise_deviation(
  params: Params, tokens: Float[Array, 'G S D'], options: LearnedNoiseOptions
) -> Float[Array, 'G S E']:
  """Returns the standard deviation of the noise on each logit."""
  raw = router_lib.matmul(tokens, params['noise'], options)
  return jax.nn.softplus(raw) + options.noise_floor


def normal(keys: Key[Array, 'G'], shape: tuple[int, ...]) -> Float[Array, 'G *shape']:
  """Draws N(0, 1) for each group from its own key."""
  return router_lib.per_group(lambda key: jax.random.normal(key, shape), keys)


def spread(
  expert_index: Int[Array, 'G S K'], values: Float[Array, 'G S K'], num_experts: int
) -> Float[Array, 'G S E']:
  """Returns the values in the columns of their experts, 0 in all others."""
  zeros = jnp.zeros((*expert_index.shape[:-1], num_experts), values.dtype)
  return jnp.put_along_axis(zeros, expert_index, values, axis=-1, inplace=False)


def selection_probability(
  router_logits: Float[Array, 'G S E'],
  selection: Float[Array, 'G S E'],
  selected: Float[Array, 'G S E'],
  choice: Choice,
  deviation: Float[Array, 'G S E'],
) -> Float[Array, 'G S E']:
  """Returns P(expert is selected), its own noise drawn again, all other noise as it is; K < E."""
  last_in = selection_lib.smallest_selected(selection, choice.expert_index)
  first_out = jnp.max(jnp.where(selected > 0, -jnp.inf, selection), axis=-1, keepdims=True)
  # What an expert must beat if its noise is drawn again: kth_excluding of app. A, the K-th largest
  # of all other experts.
  threshold = jnp.where(selected > 0, first_out, last_in)
  return jax.scipy.special.ndtr(
    (router_logits - threshold) / jnp.maximum(deviation, SMALLEST_DEVIATION)
  )


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns CV^2(importance) + CV^2(load), over the whole (micro-)batch; 0 at balance.

  CV^2 is the population variance over the squared mean, the latter at least 1e-10; Tensor2Tensor
  (bafdc1b) adds 1e-10 to it. The paper has a weight for each of the two, here they share one.
  """
  del state, options
  importance = router_lib.squared_variation(sums.own['importance'])
  return importance + router_lib.squared_variation(sums.own['load'])


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects gates that are not a softmax over the selected logits, or always 1."""
  if options.num_selected_experts == 1:
    return 'num_selected_experts', 'must be at least 2, or the gate is always 1'
  if options.softmax_order == 'before' and options.renormalize == 'none':
    return 'softmax_order', 'must be after with renormalize=none: gates sum to 1 over the selected'
  return None


ROUTER = router_lib.Router(
  name='noisy_top_k',
  paper='Shazeer et al. 2017, arXiv:1701.06538',
  summary='K largest logits with learned noise; loss on importance and smooth load',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='loss',
  cost='2 D E multiply-adds, E random numbers, top-k of E',
  always={'softmax_order': 'after'},
  params=params,
  loss=loss,
  allowed=allowed,
)
