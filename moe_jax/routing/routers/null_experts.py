"""Token choice among real experts and null experts, which compute nothing.

One-letter dimensions: G routing groups, S tokens of a group, E experts, N null experts, K
assignments of a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import fields
from moe_jax.router_options import TopKOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State, Weight
from moe_jax.routing.routers import top_k
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(TopKOptions):
  """Hyperparameters of this router."""

  num_null_experts: int = hyperparameter(
    fields.at_least(0, 0, 'Experts that compute nothing.', high=65_536)
  )
  null_balance_weight: float = hyperparameter(
    fields.positive(
      1.0,
      'What such an expert counts in their own loss (tau); at balance it gets 1 / tau times the '
      'tokens of a real one.',
    )
  )

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns one null expert for two real ones."""
    del num_selected_experts
    return {'num_null_experts': num_experts // 2}


def params(options: Options, embed_dim: int) -> dict[str, Weight]:
  """Returns one matrix; its last `num_null_experts` columns are the null experts."""
  return {'router': Weight((embed_dim, options.num_experts + options.num_null_experts))}


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest logits of E real and N null experts.

  A null expert's output is 0: an assignment to one requests no slot (`chosen` False, expert 0, gate
  0), is not counted as load and cannot be dropped. So a token pays for the real experts it selected
  and no more; one that selected none gets 0 from the layer. Equal logits go to the lower index,
  real experts before null ones.

  Gates are those of `top_k` over all E + N: `before_drop` divides by the sum over all K selected,
  null ones included, so a null expert takes weight from the real ones (as does softmax_order
  `after`). `after_drop` divides by the sum over the real ones that kept the token, and takes
  nothing from them. `router_probs` and `router_logits` are the first E columns; the probabilities
  sum to less than 1. The z-loss and entropy of the null columns are not seen.

  `null` counts the assignments to null experts.

  Source: Zeng et al. 2024, arXiv:2406.13233 (AdaMoE), with its code, CengZihao/AdaMoE (180f122);
  its gates are `after_drop` where nothing is dropped. Differs: a capacity.

  The zero experts of Jin et al. 2024, arXiv:2410.07348 (MoE++; 7f43967) are the same. Differs
  from these: no copy and no constant experts, no gating residuals between layers, one capacity, and
  the loss below. MoE++'s code leaves the zero expert out of the sum that gates are divided by.
  """
  del state
  num_experts = options.num_experts
  choice = top_k.choose_top_k(
    router_lib.logits(params, inputs.tokens, options),
    num_selected_experts=options.num_selected_experts,
    score=options.score,
    softmax_order=options.softmax_order,
    renormalize=options.renormalize,
    gate_scale=options.gate_scale,
  )
  # The plan never sees a null expert: `chosen` is False there, and expert 0 an index in bounds.
  real = choice.expert_index < num_experts
  return Choice(
    expert_index=jnp.where(real, choice.expert_index, 0),
    gates=jnp.where(real, choice.gates, 0),
    chosen=real,
    # [G S E+N] -> [G S E].
    router_probs=choice.router_probs[..., :num_experts],
    router_logits=choice.router_logits[..., :num_experts],
    sums={'null': router_lib.masked_sum(jnp.sum(~real, axis=-1).astype(jnp.float32), inputs.valid)},
  )


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns (E + N / tau) * (sum_e f_e P_e + tau f_null P_null / N), tau = null_balance_weight.

  1 at balance, where a null expert gets 1 / tau times the assignments of a real one: with f = P the
  sum is smallest there, and the factor is one over its value. With tau = 1 all are used alike.

  f are shares of all K T assignments, without gradient, P mean router probabilities. The N null
  experts compute the same, so only their common share f_null = 1 - sum_e f_e, and P_null, count.

  The common load-balancing loss sees only real experts: it is smallest where every token goes to
  null experts. Use this one instead.

  Source: the code of AdaMoE (180f122), experiment 1, where each null expert has their mean f: the
  same value, with tau = 1. Jin et al. 2024, arXiv:2410.07348 (MoE++), eq. 7, for tau. Differs from
  that: (E + N / tau) / K times its sum, in which f are shares of tokens; its second use of tau, in
  the capacities (eq. 8), is left to capacity_factor: tau E / (tau E + N) times their gamma.
  """
  del state
  num_experts, num_null = options.num_experts, options.num_null_experts
  weight = options.null_balance_weight
  tokens = jnp.maximum(jnp.sum(sums.tokens), 1)
  assignments = options.num_selected_experts * tokens
  counts = jnp.sum(sums.tokens_per_expert.reshape(-1, num_experts), axis=0)
  prob_sum = jnp.sum(sums.prob_sum.reshape(-1, num_experts), axis=0)
  # A token's probabilities sum to 1: what the real experts lack, null experts have.
  null_prob_sum = jnp.sum(sums.tokens) - jnp.sum(prob_sum)
  real = jnp.sum(jax.lax.stop_gradient(counts) * prob_sum)
  # N equal terms, (f_null / N) (P_null / N) each.
  null = jax.lax.stop_gradient(sums.own['null']) * null_prob_sum / max(num_null, 1)
  return (num_experts + num_null / weight) * (real + weight * null) / (assignments * tokens)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects a router without null experts, and what `top_k` rejects."""
  if options.num_null_experts < 1:
    return 'num_null_experts', 'must be at least 1; without null experts the router is top_k'
  if options.null_balance_weight <= 0:
    return 'null_balance_weight', 'must be above 0'
  return top_k.allowed(options)


ROUTER = router_lib.Router(
  name='null_experts',
  paper='Zeng et al. 2024, arXiv:2406.13233; Jin et al. 2024, arXiv:2410.07348',
  summary='top-k over real and null experts, which compute nothing',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='loss',
  cost='D (E + null) multiply-adds, top-k of E + null',
  params=params,
  loss=loss,
  allowed=allowed,
)
