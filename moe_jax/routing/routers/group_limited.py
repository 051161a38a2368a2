"""Group-limited selection: first the best groups of experts, then the best experts in them.

Source: DeepSeek-AI 2024, arXiv:2412.19437, sec. 2.1: sigmoid scores s, a bias that balances
without a loss (see `loss_free`), groups limited by the sum of their two largest biased scores,
gates gate_scale * s / (sum of s over the selected), and a balance loss within each sequence.

What differs, and what is silent in code of this kind:
- Groups are consecutive experts of equal number, whatever the mesh; in the source they are the
  experts of a node.
- A group is rated by the sum of its two largest biased scores, as in DeepSeek's code (DeepSeek-V3,
  9b4e978, inference/model.py), by its one biased score if it is one expert. The two are fixed. The
  paper sums the K / M largest affinities, M the number of selected groups (2 for its 8 and 4), as
  does Megatron-LM (005742f). Experts of other groups are out (-inf, not 0: a biased score may be
  negative).
- Equal groups go to the lower group, equal biased scores to the lower expert index.
- The scores may be any of `options.score` and the division by the sum may be left out
  (`options.renormalize`).
- The sequence loss counts the K largest scores WITHOUT bias and without limit to groups. Sequences
  are averaged with weight of their valid tokens, so that it adds up over devices; the source
  averages over sequences of equal length, for which the two are the same. Sequences of only padding
  count for nothing. At perfect balance the loss is 1, whatever K and E. It agrees with the paper
  and with Megatron-LM.
- The bias moves by the counts of the experts selected with it, before any drop.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, Q
sequences of a group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import (
  BiasOptions,
  ExpertGroupOptions,
  GateScaleOptions,
  MatrixOptions,
  ScoreOptions,
)
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers import loss_free
from moe_jax.routing.routers.top_k import gates_of, scores_and_probs
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, ScoreOptions, GateScaleOptions, BiasOptions, ExpertGroupOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the scores of its paper, and fewer groups."""
    del num_experts, num_selected_experts
    return {'num_expert_groups': 4, 'num_selected_groups': 2, 'score': 'sigmoid'}


def limit_to_groups(
  selection: Float[Array, 'G S E'], num_expert_groups: int, num_selected_groups: int
) -> Float[Array, 'G S E']:
  """Returns the biased scores with -inf for the experts of all groups but the best."""
  group, size, num_experts = selection.shape
  per_group = num_experts // num_expert_groups
  # [G S E] -> [G S groups E/groups].
  grouped = selection.reshape(group, size, num_expert_groups, per_group)
  # A group is rated by the sum of its two best: [G S groups].
  top, _ = jax.lax.top_k(grouped, min(2, per_group))
  _, best = jax.lax.top_k(jnp.sum(top, axis=-1), num_selected_groups)
  kept = _marked(best, num_expert_groups)[..., None] > 0
  # Not 0: a biased score may be below it.
  return jnp.where(kept, grouped, -jnp.inf).reshape(selection.shape)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K largest biased scores within the best groups of experts."""
  router_logits = router_lib.logits(params, inputs.tokens, options)
  scores, router_probs = scores_and_probs(router_logits, options.score)
  selection = loss_free.biased_scores(scores, state['bias'], options.bias_update)
  selection = limit_to_groups(selection, options.num_expert_groups, options.num_selected_groups)
  _, expert_index = jax.lax.top_k(selection, options.num_selected_experts)
  # Scores without bias: it decides who is selected and never how much an output weighs.
  gates = gates_of(scores, expert_index, options.renormalize) * options.gate_scale
  chosen: Bool[Array, 'G S K'] = jnp.ones(expert_index.shape, bool)
  balance = sequence_balance(scores, router_probs, inputs.valid, options)
  return Choice(
    expert_index, gates, chosen, router_probs, router_logits, {'sequence_balance': balance}
  )


def sequence_balance(
  scores: Float[Array, 'G S E'],
  router_probs: Float[Array, 'G S E'],
  valid: Bool[Array, 'G S'],
  options: Options,
) -> Float[Array, 'G']:
  """Returns the sum over the sequences of a group of n * sum_e f_e P_e.

  n is the number of valid tokens of the sequence, f_e = E / (K n) times the number of them whose K
  largest scores have e, P_e their mean router probability. Carries gradient only through P.
  """
  num_experts, num_selected = options.num_experts, options.num_selected_experts
  # Source, eq. 17-20. f: who would be selected without bias and groups.
  _, favourites = jax.lax.top_k(jax.lax.stop_gradient(scores), num_selected)
  mask = valid[..., None]
  tokens = _per_sequence(mask.astype(jnp.float32), options.group_size)
  counts = _per_sequence(jnp.where(mask, _marked(favourites, num_experts), 0), options.group_size)
  prob_sum = _per_sequence(jnp.where(mask, router_probs, 0), options.group_size)
  # n f_e P_e = E / K * counts_e * prob_sum_e / n; E / K follows at the end. [G Q E] -> [G Q].
  products = jnp.sum(counts * prob_sum, axis=-1) / jnp.maximum(tokens[..., 0], 1)
  return jnp.sum(products, axis=-1) * (num_experts / num_selected)


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns the sequence-wise balance loss, a mean over valid tokens; 1 at perfect balance."""
  del state, options
  return sums.own['sequence_balance'] / jnp.maximum(jnp.sum(sums.tokens), 1)


def _marked(index: Int[Array, 'G S K'], size: int) -> Float[Array, 'G S size']:
  """Returns 1 at the indices and 0 elsewhere."""
  zeros = jnp.zeros((*index.shape[:-1], size), jnp.float32)
  return jnp.put_along_axis(zeros, index, 1.0, axis=-1, inplace=False)


def _per_sequence(values: Float[Array, 'G S E'], group_size: int) -> Float[Array, 'G Q E']:
  """Sums over the tokens of each of the sequences of a group; token s is of s % group_size."""
  group, size, width = values.shape
  num_positions = -(-size // group_size)
  # [G S E] -> [G positions n E] -> [G n E], with n = Q sequences.
  values = jnp.pad(values, ((0, 0), (0, num_positions * group_size - size), (0, 0)))
  return jnp.sum(values.reshape(group, num_positions, group_size, width), axis=1)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects groups that do not divide the experts or cannot hold K of them."""
  num_groups, kept = options.num_expert_groups, options.num_selected_groups
  if num_groups < 1 or options.num_experts % num_groups:
    return 'num_expert_groups', f'must divide num_experts={options.num_experts}'
  if not 1 <= kept <= num_groups:
    return 'num_selected_groups', f'must be in 1..num_expert_groups={num_groups}'
  most = kept * (options.num_experts // num_groups)
  if options.num_selected_experts > most:
    return 'num_selected_experts', f'must be at most {most}, the experts of the selected groups'
  return loss_free.allowed(options)


ROUTER = router_lib.Router(
  name='group_limited',
  paper='DeepSeek-AI 2024, arXiv:2412.19437',
  summary='best groups by their two largest of score + bias, then the K largest in them',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='state',
  cost='D E multiply-adds, top-2 of each group, top-k of the groups, 2 top-k of E',
  state=loss_free.state,
  update=loss_free.update,
  loss=loss,
  allowed=allowed,
)
