"""Balance without a loss: a bias per expert that moves against the load, read in selection only.

Source: Wang et al. 2024, arXiv:2408.15664, read in a copy of its LaTeX: select the K largest of
score + bias, weigh with only the score, and after each step add bias_rate * sign(mean load - load)
to the bias. Megatron-LM (d98e8a6) and torchtitan (b5bcd76) agree.

What differs, and what is silent in code of this kind:
- Counts are those of the whole batch (all devices and micro-batches), before any drop. They move
  the bias after the step, so a token is routed only by the counts of earlier batches: causal.
- Equal biased scores go to the lower expert index. Selection is on float32 scores, not on logits:
  two logits so large that their scores round to the same number are a tie.
- `options.score` may be any; the source's is `sigmoid`, and with softmax it steps by bias_rate *
  (mean load - load), without the sign. Here `bias_update` decides, whatever the score.
- `options.renormalize` divides the gates before any drop or never.
- Nothing bounds the bias.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.router_options import (
  BIAS_UPDATES,
  BiasOptions,
  GateScaleOptions,
  MatrixOptions,
  RouterOptions,
  ScoreOptions,
)
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers.top_k import gates_of, scores_and_probs
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, ScoreOptions, GateScaleOptions, BiasOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the scores of its paper."""
    del num_experts, num_selected_experts
    return {'score': 'sigmoid'}


def state(options: BiasOptions, embed_dim: int, vocab_size: int) -> State:
  """Returns a bias that changes nothing yet: 0, or the factor 1 for `multiplicative`."""
  del embed_dim, vocab_size
  start = 1.0 if options.bias_update == 'multiplicative' else 0.0
  return {'bias': jnp.full((options.num_experts,), start, jnp.float32)}


def biased_scores(
  scores: Float[Array, 'G S E'], bias: Float[Array, 'E'], bias_update: str
) -> Float[Array, 'G S E']:
  """Returns the scores that the selection reads. Carries no gradient."""
  if bias_update not in BIAS_UPDATES:
    raise ValueError(f'bias_update={bias_update!r}: must be one of {BIAS_UPDATES}')
  # The bias is state: nothing but `update` moves it.
  scores, bias = jax.lax.stop_gradient((scores, bias[None, None, :]))
  return scores * bias if bias_update == 'multiplicative' else scores + bias


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest of score + bias; gates are the scores without the bias."""
  router_logits = router_lib.logits(params, inputs.tokens, options)
  scores, router_probs = scores_and_probs(router_logits, options.score)
  selection = biased_scores(scores, state['bias'], options.bias_update)
  _, expert_index = jax.lax.top_k(selection, options.num_selected_experts)
  gates = gates_of(scores, expert_index, options.renormalize) * options.gate_scale
  chosen: Bool[Array, 'G S K'] = jnp.ones(expert_index.shape, bool)
  return Choice(expert_index, gates, chosen, router_probs, router_logits, {})


def update(state: State, sums: RouterSums, options: BiasOptions) -> State:
  """Moves the bias against the load c_e of the batch, with u = bias_rate and m the mean load.

  `sign`: b + u sign(m - c). Source: as above.
  `proportional`: b + u (m - c) / m. The source's ablations have a step in proportion to the error;
    differs: divided by m, so that u does not depend on the size of the batch.
  `multiplicative`: selection on score * b with b from 1, b (1 + u sign(m - c)). The source's
    ablations have a factor on the score; differs: here the step is a factor too, so that b stays
    positive. An expert whose score is 0 gains nothing from it.
  `centred`: d = u sign(m - c), b + d - mean(d). Differs from the source: the bias keeps its mean,
    as in torchtitan.

  A batch without tokens moves nothing.
  """
  bias, rate = state['bias'], options.bias_rate
  # [N E] -> [E], of all devices and micro-batches.
  counts = jnp.sum(sums.tokens_per_expert.reshape(-1, options.num_experts), axis=0)
  # Above 0 where an expert had less than the mean: its bias rises.
  error = jnp.mean(counts) - counts
  if options.bias_update == 'proportional':
    # Below one assignment there is none, and the error is 0 too.
    new_bias = bias + rate * error / jnp.maximum(jnp.mean(counts), 1 / options.num_experts)
  elif options.bias_update == 'multiplicative':
    # A factor, so the bias stays above 0 as long as the rate is below 1.
    new_bias = bias * (1 + rate * jnp.sign(error))
  # Only the sign: a step does not grow with the batch. What all biases share selects no expert, so
  # `centred` may take it away.
  elif options.bias_update in ('sign', 'centred'):
    step = rate * jnp.sign(error)
    new_bias = bias + (step - jnp.mean(step) if options.bias_update == 'centred' else step)
  else:
    raise ValueError(f'bias_update={options.bias_update!r}: must be one of {BIAS_UPDATES}')
  return {'bias': new_bias}


def gates_allowed(options: RouterOptions) -> tuple[str, str] | None:
  """Rejects gates that are divided after the drop, or that are always 1."""
  if options.renormalize == 'after_drop':
    return 'renormalize', 'must be none or before_drop'
  if options.num_selected_experts == 1 and options.renormalize != 'none':
    why = 'or the gate is always 1 and the router learns nothing'
    return 'renormalize', f'must be none with num_selected_experts=1, {why}'
  return None


def allowed(options: BiasOptions) -> tuple[str, str] | None:
  """Rejects what `gates_allowed` does, and a factor that could turn negative or 0."""
  if options.bias_update == 'multiplicative' and options.bias_rate >= 1:
    return 'bias_rate', 'must be below 1 with bias_update=multiplicative'
  return gates_allowed(options)


ROUTER = router_lib.Router(
  name='loss_free',
  paper='Wang et al. 2024, arXiv:2408.15664',
  summary='K largest of score + bias; the bias moves against the load of the last batch',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='state',
  cost='D E multiply-adds, top-k of E',
  state=state,
  update=update,
  allowed=allowed,
)
