"""ReMoE: ReLU gates; a token takes every expert whose gate is positive.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import fields
from moe_jax.router_options import MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State

# A coefficient that underflows to 0 could never grow again: multiplication moves it.
SMALLEST_COEFFICIENT = 1e-20
LARGEST_COEFFICIENT = 1e20


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions):
  """Hyperparameters of this router."""

  sparsity_factor: float = hyperparameter(
    fields.number(
      1.2,
      'What the coefficient of sparsity is multiplied or divided by after each step.',
      'must be a finite number > 1',
      lambda v: v > 1,
    )
  )
  sparsity_start: float = hyperparameter(
    fields.positive(1e-8, 'That coefficient before the first step.')
  )


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects every expert with a positive logit; the gate is the logit itself, R = relu(x W).

  Assignment e of a token is expert e. A logit of exactly 0 selects nothing and has no gradient. A
  token without a positive logit takes no expert: its output is 0, and nothing but the auxiliary
  losses that read the logits moves its router. `router_probs` are the gates divided by their sum,
  all 0 for such a token.

  Source: ReMoE, arXiv:2412.14711, checked against github.com/thu-ml/ReMoE (463c6af). Differs:
  `router_probs` are ours, for statistics. `score`, `renormalize` and `gate_scale` are not read.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  # Gate and selection in one: an expert enters and leaves with weight 0, so that the output is
  # continuous in the logit.
  gates = jax.nn.relu(router_logits)
  # Never a division by a smaller number: its square, in the gradient, would underflow.
  total = jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-12)
  experts = jnp.arange(options.num_experts, dtype=jnp.int32)[None, None, :]
  return Choice(
    expert_index=jnp.broadcast_to(experts, router_logits.shape),
    gates=gates,
    chosen=gates > 0,
    router_probs=gates / total,
    router_logits=router_logits,
    sums={'gate_sum': router_lib.masked_sum(gates, inputs.valid)},
  )


def new_state(options: Options, embed_dim: int, vocab_size: int) -> State:
  """Returns the coefficient of the regularisation before the first step."""
  del embed_dim, vocab_size
  return {'coefficient': jnp.full((), options.sparsity_start, jnp.float32)}


def loss(sums: Any, state: State, options: Options) -> Float[Array, '']:
  """Returns coefficient * (1 / T) sum_t sum_e f_e R_te, f_e = E / (K T) * (tokens with R_te > 0).

  T are the valid tokens of the whole batch, K is `num_selected_experts`, the wanted mean number of
  experts per token. No gradient through f, which has none anyway, nor into the coefficient. It is
  to be weighted by 1: the coefficient is the weight.

  Source: ReMoE, arXiv:2412.14711. Differs: the sum is one layer's, so adding the layers, as the
  official code (463c6af) does, instead of averaging them multiplies the paper's by their number,
  which the coefficient makes good. That code forms f in each micro-batch.
  """
  num_tokens, active = _tokens_and_active(sums, options)
  tokens = jnp.maximum(num_tokens, 1)
  expert_share = active * options.num_experts / (options.num_selected_experts * tokens)
  # The L1 norm makes the gates sparse; f_e, above 1 for experts with more than their share, makes
  # them balanced, too.
  weighted = jnp.sum(jax.lax.stop_gradient(expert_share) * sums.own['gate_sum']) / tokens
  return jax.lax.stop_gradient(state['coefficient']) * weighted


def update(state: State, sums: Any, options: Options) -> State:
  """Multiplies the coefficient by sparsity_factor ** sign((1 - K / E) - S).

  S = 1 - active / (T E) is the share of gates that are 0. The sign is taken of active - K T, the
  same in exact arithmetic, so no rounding decides at the target. A batch of padding changes
  nothing.

  Source: ReMoE, arXiv:2412.14711. Differs: S and the coefficient are per layer (the paper's are of
  the mean over the layers), so every layer reaches the target; and the coefficient is kept within
  1e-20 and 1e20, out of which it could not come back in float32. At the target the coefficient
  stays, as in the paper; the official code (463c6af) divides.
  """
  num_tokens, active = _tokens_and_active(sums, options)
  # More than K active on average: the penalty grows, by a factor; fewer: it shrinks.
  direction = jnp.sign(jnp.sum(active) - options.num_selected_experts * num_tokens)
  factor = jnp.float32(options.sparsity_factor) ** direction
  coefficient = jnp.clip(state['coefficient'] * factor, SMALLEST_COEFFICIENT, LARGEST_COEFFICIENT)
  return {'coefficient': coefficient}


def _tokens_and_active(sums: Any, options: Options) -> tuple[Float[Array, ''], Float[Array, 'E']]:
  """Returns T and the number of positive gates of each expert, over all balance scopes."""
  per_scope = sums.tokens_per_expert.reshape(-1, options.num_experts)
  return jnp.sum(sums.tokens), jnp.sum(per_scope, axis=0)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects options that would stop the coefficient, or change the ReLU gates."""
  if options.sparsity_factor <= 1:
    return 'sparsity_factor', 'must be above 1'
  if not SMALLEST_COEFFICIENT <= options.sparsity_start <= LARGEST_COEFFICIENT:
    return 'sparsity_start', f'must be in {SMALLEST_COEFFICIENT}..{LARGEST_COEFFICIENT}'
  if options.renormalize == 'after_drop':
    return 'renormalize', 'must not be after_drop: ReLU gates are not divided by their sum'
  return None


ROUTER = router_lib.Router(
  name='remoe',
  paper='ReMoE, arXiv:2412.14711',
  summary='ReLU gates, as many experts as are positive; adaptive L1 penalty to K on average',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='loss',
  cost='D E multiply-adds; E assignments to sort',
  state=new_state,
  update=update,
  loss=loss,
  allowed=allowed,
)
