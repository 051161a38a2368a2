"""Greedy assignment: the best pairs of token and expert first, as long as both have capacity.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, C
slots of an expert.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import GateScaleOptions, MatrixOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing import selection
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers.top_k import RENORMALIZATIONS, choose_top_k


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""


class _Matching(NamedTuple):
  """All groups between two rounds.

  Attributes:
    key: the scores as integers; `_REJECTED` where the expert has rejected the token for good.
    changed: True if an expert rejected a token in the last round.
  """

  key: Int[Array, 'G S E']
  changed: Bool[Array, '']


# Below every score.
_REJECTED = selection.SMALLEST


def greedy_assignment(
  scores: Float[Array, 'G S E'],
  valid: Bool[Array, 'G S'],
  *,
  num_selected_experts: int,
  capacity: int,
) -> tuple[Int[Array, 'G S K'], Bool[Array, 'G S K']]:
  """Takes the pairs (token, expert) of a group in descending score while both have capacity.

  A pair is taken if the token has fewer than K experts and the expert fewer than C tokens by then.
  Equal scores: the lower token first, then the lower expert. Padding takes no slot.

  A token t that ends with fewer than K experts has found all others full: at least E - K + 1
  experts with C tokens each, none of them t. The other valid tokens fill at most K (T - 1) slots.
  So every token gets K experts if (E - K + 1) C > K (T - 1), or C >= T; K T <= E C is not enough.

  It is found by few rounds in which all tokens and experts act at once. In a round each token
  proposes to its K best experts that have not rejected it, of equals the lower ones, and each
  expert rejects all but the best C of its proposals, of equals the lower tokens. It ends when no
  token is rejected.

  Why that is the same. The order of all pairs only ever decides between two pairs of one token,
  where it is the order in which the token proposes, or between two pairs of one expert, where it is
  the order in which the expert rejects. Greedy takes a pair exactly if fewer than K better pairs of
  its token and fewer than C better pairs of its expert are taken; by induction along the order of
  all pairs, only one set of pairs M satisfies this. Let M be the pairs proposed in the last round.
  A token proposes to at most K, and an expert that rejects no token has at most C, so each pair of
  M has fewer than K and C better ones. Take a pair not in M. If its expert rejected it, the expert
  had C better proposals then and has C better ones at the end, since a proposal it did not reject
  is made again and it replaces one only by a better one. If it was never rejected, the token
  proposes to K better ones. So the condition fails for every pair that is not in M.

  Each round but the last rejects a token, so there are at most S E + 1; as a rule a few.

  Returns:
    expert_index: the experts of each token, best first.
    chosen: False for the experts that a token did not get.
  """
  capacity = min(capacity, scores.shape[1])
  # Zeros are equal. So are NaNs, below -inf.
  key = selection.to_key(jnp.where(scores == 0, 0, scores))
  key = jnp.where(jnp.isnan(scores), _REJECTED + 1, key)
  key = jnp.where(valid[..., None], key, _REJECTED)

  # Deferred acceptance (Gale & Shapley 1962): an expert holds proposals without promising anything
  # and may reject them later, when better ones come; what it rejects is rejected for good.
  play = functools.partial(_round, num_selected_experts=num_selected_experts, capacity=capacity)
  start = _Matching(key, router_lib.varying_like(jnp.bool_(True), key))
  last = jax.lax.while_loop(lambda matching: matching.changed, play, start)
  best, expert_index = _best_experts(last.key, num_selected_experts)
  return expert_index, best > _REJECTED


def _round(matching: _Matching, *, num_selected_experts: int, capacity: int) -> _Matching:
  """Plays one round: each token proposes, and each expert rejects all but the best C."""
  num_groups, _, num_experts = matching.key.shape
  # Every token proposes to its K best experts that have not rejected it.
  best, expert_index = _best_experts(matching.key, num_selected_experts)
  expert = jnp.where(best > _REJECTED, expert_index, num_experts)
  # By expert, best first; stable, so of equals the lower token.
  token = jax.lax.broadcasted_iota(jnp.int32, expert.shape, 1)
  pairs = tuple(pair.reshape(num_groups, -1) for pair in (expert, ~best, token))
  expert, _, token = jax.lax.sort(pairs, dimension=1, is_stable=True, num_keys=2)
  # An expert rejects the tokens to which it prefers C others: the pair C positions before is its
  # own, too.
  late, group = expert[:, capacity:], jnp.arange(num_groups)[:, None]
  rejects = (late == expert[:, : late.shape[1]]) & (late < num_experts)
  index = group, token[:, capacity:], jnp.where(rejects, late, num_experts)
  return _Matching(matching.key.at[index].set(_REJECTED, mode='drop'), jnp.any(rejects))


def _best_experts(
  key: Int[Array, 'G S E'], num_selected_experts: int
) -> tuple[Int[Array, 'G S K'], Int[Array, 'G S K']]:
  """Returns the K largest of each token and their experts, of equals the lower first.

  What `jax.lax.top_k` does, which sorts whole rows if they are integers.
  """
  num_experts = key.shape[-1]
  expert = jax.lax.broadcasted_iota(jnp.int32, (1, 1, num_experts), 2)

  def find(
    found: tuple[Int[Array, 'G S 1'], Int[Array, 'G S 1']], _: None
  ) -> tuple[tuple[Int[Array, 'G S 1'], Int[Array, 'G S 1']], tuple[Array, Array]]:
    best, expert_index = found
    # The next in order after the one found last: smaller, or equal with a higher index.
    left = (key < best) | ((key == best) & (expert > expert_index))
    best = jnp.max(jnp.where(left, key, _REJECTED), axis=-1, keepdims=True)
    wanted = left & (key == best)
    expert_index = jnp.min(jnp.where(wanted, expert, num_experts), axis=-1, keepdims=True)
    return (best, expert_index), (best[..., 0], expert_index[..., 0])

  shape = (*key.shape[:2], 1)
  start = jnp.full(shape, selection.LARGEST, jnp.int32), jnp.full(shape, -1, jnp.int32)
  start = router_lib.varying_like(start, key)
  # K passes over the row, each for the largest that is left: K E comparisons, no sort.
  best, expert_index = jax.lax.scan(find, start, None, length=num_selected_experts)[1]
  return jnp.moveaxis(best, 0, -1), jnp.moveaxis(expert_index, 0, -1)


def taken_gates(
  router_logits: Float[Array, 'G S E'],
  router_probs: Float[Array, 'G S E'],
  expert_index: Int[Array, 'G S K'],
  chosen: Bool[Array, 'G S K'],
  renormalize: str,
) -> Float[Array, 'G S K']:
  """Returns the softmax probabilities of the selected experts, 0 for the others.

  With `before_drop` they are divided by their sum. That sum can be as small as floats go when a
  token lost its favourites, so the division is done as a softmax over the selected logits.
  """
  if renormalize not in RENORMALIZATIONS:
    raise ValueError(f'renormalize={renormalize!r}: must be one of {RENORMALIZATIONS}')
  if renormalize != 'before_drop':
    return jnp.where(chosen, jnp.take_along_axis(router_probs, expert_index, axis=-1), 0)
  logits = jnp.take_along_axis(router_logits, expert_index, axis=-1)
  top = jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=-1, keepdims=True)
  # Where nothing is selected, top is -inf; no gradient may pass through the result.
  # Two wheres: the inner one keeps exp of what is not chosen finite. Its NaN would reach the
  # gradient through the outer one, as 0 * NaN.
  weights = jnp.where(chosen, jnp.exp(jnp.where(chosen, logits - jax.lax.stop_gradient(top), 0)), 0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Training: see `greedy_assignment`, with C the capacity of the group. Evaluation: top-k.

  Pairs are in order of the logarithm of the softmax over all experts: the same order as the
  probabilities, without the ties of those that round to 0. Gates are the probabilities; with
  renormalize `before_drop` divided by the sum over the experts the token got, a sum of fewer than K
  where it got fewer. No gradient passes through the assignment.

  Source: none found for the same rule; the greedy 1/2-approximation of the assignment problem, here
  as a router. Nearest is greedy_balanced_assignment of Hunter-DDM/stablemoe (73ea6ef): experts in
  random order take their top T / E tokens. Differs from dropping by priority: a token whose
  favourite is full takes its next best.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  if not options.training:
    return choose_top_k(
      router_logits,
      num_selected_experts=options.num_selected_experts,
      renormalize=options.renormalize,
      gate_scale=options.gate_scale,
    )
  expert_index, chosen = greedy_assignment(
    jax.lax.stop_gradient(jax.nn.log_softmax(router_logits, axis=-1)),
    inputs.valid,
    num_selected_experts=options.num_selected_experts,
    capacity=options.capacity,
  )
  router_probs = jax.nn.softmax(router_logits, axis=-1)
  gates = taken_gates(router_logits, router_probs, expert_index, chosen, options.renormalize)
  return Choice(
    expert_index, gates * options.gate_scale, chosen, router_probs, router_logits, sums={}
  )


def allowed(options: GateScaleOptions) -> tuple[str, str] | None:
  """Rejects gates that are always 1, through which the router would learn nothing."""
  if options.num_selected_experts == 1 and options.renormalize != 'none':
    why = 'with num_selected_experts=1, or the gate is always 1 and the router learns nothing'
    return 'renormalize', f'must be none {why}'
  return None


ROUTER = router_lib.Router(
  name='greedy',
  paper='none',
  summary='best pairs of token and expert first, while neither is full; top-k in evaluation',
  choose=choose,
  options=Options,
  causal=False,
  learns=True,
  by_group=True,
  balance='assignment',
  slots='filled',
  cost='D E multiply-adds, some rounds of top-k of E and a sort of S K',
  allowed=allowed,
)
