"""Soft MoE: experts read mixtures of tokens and tokens read mixtures of experts; no choice at all.

`mix` returns the weights of both mixtures, `choose` what statistics and losses read of them.

One-letter dimensions: G routing groups, S tokens of a group, D embed, E experts, P slots of an
expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax import fields
from moe_jax.router_options import MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import (
  Choice,
  Mixture,
  Params,
  RouterInputs,
  State,
  Weight,
)

NORM_EPSILON = 1e-6
# Not -inf: the softmax of a group of only padding would be NaN before it is masked.
LEAST_LOGIT = -1e30


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions):
  """Hyperparameters of this router."""

  slots_per_expert: int = hyperparameter(fields.at_least(1, 1, 'Slots of each expert.'))

  @property
  def decodes(self) -> bool:
    """False: slots mix all tokens in evaluation, too."""
    return False


def new_params(options: Options, embed_dim: int) -> dict[str, Weight]:
  """Returns one vector per slot, and the scale of all logits."""
  return {
    'phi': Weight((embed_dim, options.num_experts * options.slots_per_expert)),
    'scale': Weight((1,), init='ones'),
  }


def mix(params: Params, state: State, inputs: RouterInputs, options: Options) -> Mixture:
  """Returns the weights of both mixtures; slot j of expert e is column e P + j of `phi`.

  A = l2norm(X) (scale l2norm(phi)), phi normalised over D. dispatch = softmax of A over the valid
  tokens of the group, combine = softmax of A over all E P slots.

  Source: Puigcerver et al. 2023, arXiv:2308.00951, with the normalisation, as in google-research's
  vmoe/projects/soft_moe/router.py (942a78b), the 1e-6 under each root included, through which a
  zero token has a gradient. Differs: padding has no weight; the mixtures are over a routing group,
  which may hold several sequences, there over one image.
  """
  del state
  logits = _slot_logits(params, inputs, options)
  valid = inputs.valid[:, :, None, None]
  # One set of logits, two softmaxes: along S for each slot, along E P for each token.
  over_tokens = jax.nn.softmax(jnp.where(valid, logits, LEAST_LOGIT), axis=1)
  flat = logits.reshape(*logits.shape[:2], -1)
  over_slots = jax.nn.softmax(flat, axis=-1).reshape(logits.shape)
  return Mixture(dispatch=jnp.where(valid, over_tokens, 0), combine=jnp.where(valid, over_slots, 0))


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Returns each expert's weight in a token: its combine weights, summed over the expert's slots.

  `router_logits` are the logsumexp over an expert's slots, so their softmax over experts is
  `router_probs`, which are 0 for padding. Every assignment is selected; it takes no slot of its
  own. `num_selected_experts`, `score`, `renormalize` and `gate_scale` are not read.
  """
  combine = mix(params, state, inputs, options).combine
  router_probs = jnp.sum(combine, axis=-1)
  # [G S E P] -> [G S E].
  router_logits = jax.nn.logsumexp(_slot_logits(params, inputs, options), axis=-1)
  experts = jnp.arange(options.num_experts, dtype=jnp.int32)[None, None, :]
  return Choice(
    expert_index=jnp.broadcast_to(experts, router_probs.shape),
    gates=router_probs,
    chosen=jnp.ones(router_probs.shape, bool),
    router_probs=router_probs,
    router_logits=router_logits,
    sums={},
  )


def _slot_logits(params: Params, inputs: RouterInputs, options: Options) -> Float[Array, 'G S E P']:
  # Padding may hold anything; its logits are those of a zero token.
  tokens = _to_unit_length(jnp.where(inputs.valid[..., None], inputs.tokens, 0), axis=-1)
  # Both factors have length 1, so logits lie within the scale: one number for how sharp all the
  # mixtures are.
  phi = params['scale'][:, None] * _to_unit_length(params['phi'], axis=0)
  logits = router_lib.matmul(tokens, phi, options)
  return logits.reshape(*logits.shape[:2], options.num_experts, options.slots_per_expert)


def _to_unit_length(vectors: Float[Array, '*any'], axis: int) -> Float[Array, '*any']:
  squared = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
  return vectors * jax.lax.rsqrt(squared + NORM_EPSILON)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects experts without a slot."""
  if options.slots_per_expert < 1:
    return 'slots_per_expert', 'must be at least 1'
  return None


ROUTER = router_lib.Router(
  name='soft',
  paper='Puigcerver et al. 2023, arXiv:2308.00951',
  summary='each slot reads a mixture of all tokens, each token a mixture of all slots',
  choose=choose,
  options=Options,
  causal=False,
  learns=True,
  by_group=True,
  balance='fixed',
  cost='D E P multiply-adds; E P weights for dispatch and E P for combine, kept for the gradient',
  params=new_params,
  mix=mix,
  slots='all',
  allowed=allowed,
)
