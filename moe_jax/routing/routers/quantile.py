"""Quantile balancing: the bias of an expert is set where it would take its share of the tokens.

Source: Su 2026, https://kexue.fm/archives/11619, read in translation (an assignment problem solved
by alternating over its dual variables; one alternation per step, from the last bias, as there):
with scores s and bias b, alpha_t = (K+1)-th largest of s_t + b, the score that an expert must beat
to be selected; beta_e = (q+1)-th largest over the tokens of s_te + b_e - alpha_t with q = K T / E,
so that q tokens lie above it; b_e <- b_e - r beta_e. Megatron-LM's quantile_balancing (d98e8a6) is
the same up to a constant.

What differs, and what is silent in code of this kind:
- beta is taken over the valid tokens of each routing group and averaged over groups with weight of
  their valid tokens, so that it adds up over devices; that is the source's own compromise for large
  batches. A mean of quantiles is not the quantile of all: groups should be much larger than E / K
  tokens.
- q is rounded down, and at most n - 1 with n valid tokens. With K = E alpha is the K-th largest;
  the bias still moves, but all experts are selected whatever it is.
- s are scores, and the bias is not centred; Megatron-LM and Marin read logits and keep the bias at
  mean 0.
- r = bias_rate; 1 in the source's practical form, 0.1 in its part 7, an exponential moving average
  with 0.9.
- The bias moves after the step: a token is routed only by earlier batches, so it is causal.
- Equal biased scores go to the lower expert index. Gates are the scores without the bias.
- Nothing is measured in evaluation.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import BiasRateOptions, GateScaleOptions, MatrixOptions, ScoreOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing import selection
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers import loss_free
from moe_jax.routing.routers.top_k import gates_of, scores_and_probs
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, ScoreOptions, GateScaleOptions, BiasRateOptions):
  """Hyperparameters of this router."""


def state(options: Options, embed_dim: int, vocab_size: int) -> State:
  """Returns a bias of 0."""
  del embed_dim, vocab_size
  return {'bias': jnp.zeros((options.num_experts,), jnp.float32)}


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest of score + bias and, in training, measures the error of the bias."""
  router_logits = router_lib.logits(params, inputs.tokens, options)
  scores, router_probs = scores_and_probs(router_logits, options.score)
  biased = loss_free.biased_scores(scores, state['bias'], 'sign')
  num_selected = options.num_selected_experts
  expert_index = jax.lax.top_k(biased, num_selected)[1]
  gates = gates_of(scores, expert_index, options.renormalize) * options.gate_scale
  if options.training:
    # By how much an expert is above (or below) being selected; its quota-th largest is the error of
    # the bias.
    margin = biased - to_beat(biased, expert_index)
    threshold = group_threshold(margin, inputs.valid, num_selected)
  else:
    threshold = jnp.zeros((len(biased), options.num_experts), jnp.float32)
  chosen: Bool[Array, 'G S K'] = jnp.ones(expert_index.shape, bool)
  return Choice(expert_index, gates, chosen, router_probs, router_logits, {'threshold': threshold})


def to_beat(
  biased: Float[Array, 'G S E'], expert_index: Int[Array, 'G S K']
) -> Float[Array, 'G S 1']:
  """Returns the (K+1)-th largest of each token, from its K largest; the K-th with K = E."""
  key = selection.to_key(biased)
  # Not a slice of the top-k: see `selection.smallest_selected`.
  if expert_index.shape[-1] == biased.shape[-1]:
    return selection.from_key(jnp.min(key, axis=-1, keepdims=True))
  experts = jnp.arange(biased.shape[-1])[None, None, None, :]
  selected = jnp.any(expert_index[..., None] == experts, axis=2)
  # With the K largest out of the way the largest is the (K+1)-th.
  left_out = jnp.where(selected, selection.SMALLEST, key)
  return selection.from_key(jnp.max(left_out, axis=-1, keepdims=True))


def group_threshold(
  margin: Float[Array, 'G S E'], valid: Bool[Array, 'G S'], num_selected_experts: int
) -> Float[Array, 'G E']:
  """Returns n times the (q+1)-th largest margin of each expert over the n valid tokens of a group.

  Args:
    margin: by how much the biased score of an expert exceeds what it must beat.
    valid: False for padding.
    num_selected_experts: K; q = floor(K n / E), at most n - 1. Without valid tokens the result is
      0.
  """
  num_experts = margin.shape[-1]
  tokens = jnp.sum(valid, axis=-1, dtype=jnp.int32)[:, None]
  # K n / E tokens are an expert's share; the (q + 1)-th margin separates these from the others.
  quota = jnp.clip(tokens * num_selected_experts // num_experts, 0, jnp.maximum(tokens - 1, 0))
  # `jax.lax.top_k` wants a k that is known when compiling. This quota is data, and differs between
  # groups; the k-th largest is found by counting.
  masked = jnp.where(valid[..., None], margin, -jnp.inf)
  beta = selection.kth_largest(masked, quota[..., None] + 1)[:, 0]
  return jnp.where(tokens > 0, tokens * beta, 0).astype(jnp.float32)


def update(state: State, sums: RouterSums, options: Options) -> State:
  """Moves the bias by -bias_rate times the mean of beta; not at all in a batch without tokens."""
  # Each group came in times its valid tokens; this is their weighted mean.
  mean = sums.own['threshold'] / jnp.maximum(jnp.sum(sums.tokens), 1)
  return {'bias': state['bias'] - options.bias_rate * mean}


ROUTER = router_lib.Router(
  name='quantile',
  paper='Su 2026, https://kexue.fm/archives/11619',
  summary='K largest of score + bias; the bias from the quantile that gives each expert its share',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='state',
  cost='D E multiply-adds, top-k of E; in training 32 counts of the tokens for each expert',
  state=state,
  update=update,
  allowed=loss_free.gates_allowed,
)
