"""Expert choice: each expert takes the tokens it scores highest, as many as it has slots.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K experts of a token in
evaluation, C slots of an expert.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax import fields
from moe_jax.router_options import GateScaleOptions, MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing import selection
from moe_jax.routing.router import Choice, Params, RouterInputs, State

EVALUATIONS = ('token_choice', 'threshold', 'same')


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  evaluation: str = hyperparameter(
    fields.one_of(
      'token_choice',
      EVALUATIONS,
      'Outside training, top-k of each token; experts whose score passes the running threshold; or '
      'as in training, which sees the future.',
    )
  )
  threshold_decay: float = hyperparameter(fields.share(0.99, 'Decay of that running threshold.'))

  @property
  def decodes(self) -> bool:
    """False where evaluation weighs tokens against each other, as training does."""
    return self.evaluation != 'same'


def take_best(
  scores: Float[Array, 'G S E'], valid: Bool[Array, 'G S'], capacity: int
) -> tuple[Bool[Array, 'G S E'], Float[Array, 'G E']]:
  """Lets each expert take its C best valid tokens of the group.

  Args:
    scores: not negative. Equal ones: the lower token first.
    valid: False for padding, which is never taken.
    capacity: C; all tokens of the group if it has fewer.

  Returns:
    taken: which tokens each expert took; all valid ones where there are fewer than C.
    threshold: the C-th largest score of each expert; 0 where there are fewer valid tokens than C,
      since any token would have been taken.
  """
  capacity = min(capacity, scores.shape[1])
  # Below any score, so that padding comes last.
  masked = jnp.where(valid[..., None], scores, -1)
  best, last = selection.k_largest(masked, capacity)
  # With fewer valid tokens than C padding is among the best: it is not taken, and -1, its score, is
  # no threshold. [G 1 E] -> [G E].
  return best & valid[..., None], jnp.maximum(last[:, 0], 0)


def best_experts(
  router_logits: Float[Array, 'G S E'], num_selected_experts: int
) -> Bool[Array, 'G S E']:
  """Returns which experts are among the K best of each token; of equals the lower index."""
  num_experts = router_logits.shape[-1]
  # [G S K] -> [G S K E] -> [G S E].
  expert_index = jax.lax.top_k(router_logits, num_selected_experts)[1]
  return jnp.any(expert_index[..., None] == jnp.arange(num_experts)[None, None, None, :], axis=2)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Training: see `take_best`. A token may get any number of experts, none too.

  Scores are the softmax of each token over the experts, and so are the gates, never renormalised.
  Scores that round to the same float are equal. No gradient passes through the selection of tokens.

  In training a token's experts depend on all tokens of its group, later ones too. So a language
  model learns to use what it cannot have in decoding. What evaluation does is an option:

  * `same`: as in training. Leaks as training does; for comparison only.
  * `token_choice`: the num_selected_experts best experts of each token, by its logits.
  * `threshold`: every expert whose score is above its `threshold` of the state, the moving mean of
    the C-th largest score in training; none, one or all.

  Source: Zhou et al. 2022, arXiv:2202.09368, eq. 1 (softmax over experts, top-C over tokens, gates
  are the scores), as in Flaxformer (399ea3a) and V-MoE's code (942a78b). Differs: the tokens are
  those of one routing group of the config, without its padding, which Flaxformer sets to zero and
  can still pick; no noise, V-MoE adds some of deviation 1 / E; it is possible in decoders, too,
  Flaxformer uses token choice in them; the three evaluations are ours; `gate_scale` is not of the
  source.
  """
  router_logits = router_lib.logits(params, inputs.tokens, options)
  scores = jax.nn.softmax(router_logits, axis=-1)
  num_experts = scores.shape[-1]
  valid = inputs.valid
  # Experts choose tokens, eq. 1: the order is along S, for each column.
  taken, threshold = take_best(jax.lax.stop_gradient(scores), valid, options.capacity)
  chosen = taken
  if not options.training and options.evaluation == 'token_choice':
    chosen = best_experts(router_logits, options.num_selected_experts)
  elif not options.training and options.evaluation == 'threshold':
    chosen = scores > state['threshold'][None, None, :]
  # Groups of only padding count for nothing in the mean of the thresholds.
  has_tokens = jnp.any(valid, axis=-1)
  return Choice(
    # Any number of experts may take a token, so each token has E assignments, one for each
    # expert; `chosen` marks those that exist.
    expert_index=jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), scores.shape),
    gates=scores * options.gate_scale,
    chosen=chosen,
    router_probs=scores,
    router_logits=router_logits,
    sums={
      'threshold': jnp.where(has_tokens[:, None], threshold, 0),
      'groups': has_tokens.astype(jnp.float32),
    },
  )


def initial_state(options: Options, embed_dim: int, vocab_size: int) -> State:
  """Returns thresholds, and the number of steps in their mean: the first replaces the start."""
  del embed_dim, vocab_size
  return {
    'threshold': jnp.zeros((options.num_experts,), jnp.float32),
    'steps': jnp.zeros((), jnp.float32),
  }


def update(state: State, sums: Any, options: Options) -> State:
  """Moves the thresholds to the mean of this step's, each group with a valid token counting once.

  The first step takes its mean as it is: from a start at 0 the moving mean would be too low for
  1 / (1 - threshold_decay) steps. A step without a valid token changes nothing.
  """
  groups = sums.own['groups']
  mean = sums.own['threshold'] / jnp.maximum(groups, 1)
  decay = jnp.where(state['steps'] > 0, options.threshold_decay, 0.0)
  moved = decay * state['threshold'] + (1 - decay) * mean
  return {
    'threshold': jnp.where(groups > 0, moved, state['threshold']),
    'steps': state['steps'] + (groups > 0),
  }


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects renormalised gates, and unknown evaluations."""
  if options.renormalize != 'none':
    return 'renormalize', 'must be none with router=expert_choice: gates are the scores themselves'
  if options.evaluation not in EVALUATIONS:
    return 'evaluation', f'must be one of {EVALUATIONS}'
  return None


ROUTER = router_lib.Router(
  name='expert_choice',
  paper='Zhou et al. 2022, arXiv:2202.09368',
  summary='each expert takes its best tokens; token choice or a threshold in evaluation',
  choose=choose,
  options=Options,
  causal=False,
  learns=True,
  by_group=True,
  balance='assignment',
  slots='filled',
  cost='D E multiply-adds, 32 + log S counts of the tokens for each expert',
  state=initial_state,
  update=update,
  allowed=allowed,
)
