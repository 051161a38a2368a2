"""Greedy assignment: the best pairs of token and expert first, as long as both have room."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, RouterOptions, State
from moe_jax.routing.routers.top_k import RENORMALIZATIONS, choose_top_k


class _Matching(NamedTuple):
  """One group between two rounds: what the experts have said no to for good."""

  rejected: Bool[Array, 'S E']
  changed: Bool[Array, '']


def greedy_assignment(
  scores: Float[Array, 'G S E'],
  valid: Bool[Array, 'G S'],
  *,
  num_selected_experts: int,
  capacity: int,
) -> tuple[Int[Array, 'G S K'], Bool[Array, 'G S K']]:
  """Takes the pairs (token, expert) of a group in descending score while both have room.

  A pair is taken if the token has fewer than K experts and the expert fewer than C tokens by then.
  Equal scores: the lower token first, then the lower expert. Padding takes no place.

  A token t that ends with fewer than K experts has found all others full: at least E - K + 1
  experts with C tokens each, none of them t. The other valid tokens fill at most K (T - 1) places.
  So everyone gets K experts if (E - K + 1) C > K (T - 1), or C >= T; K T <= E C is not enough.

  Returns:
    expert_index: the experts of each token, best first.
    chosen: False for what a token did not get.
  """
  num_tokens, num_experts = scores.shape[1:]
  capacity = min(capacity, num_tokens)

  def assign(group_scores, group_valid):
    # The place of each pair in the order of the definition. From here on no two are equal.
    order = jnp.argsort(-group_scores.ravel(), stable=True)
    place = jnp.arange(order.size, dtype=jnp.int32)
    rank = jnp.zeros_like(place).at[order].set(place, unique_indices=True)
    rank = rank.reshape(num_tokens, num_experts)
    return _deferred_acceptance(rank, group_valid, num_selected_experts, capacity)

  return router_lib.per_group(assign, scores, valid)


def _deferred_acceptance(
  rank: Int[Array, 'S E'], valid: Bool[Array, 'S'], num_selected_experts: int, capacity: int
) -> tuple[Int[Array, 'S K'], Bool[Array, 'S K']]:
  """Returns the greedy assignment by few rounds in which all tokens and experts act at once.

  In a round each token proposes to its K best experts that have not rejected it, and each expert
  rejects all but the best C of its proposals. It ends when no one is rejected.

  Why that is the greedy assignment. Greedy takes a pair exactly if fewer than K better pairs of its
  token and fewer than C better pairs of its expert are taken; by induction along the order of all
  pairs, only one set of pairs M satisfies this. Let M be the pairs proposed in the last round. A
  token proposes to at most K, and an expert that rejects no one has at most C, so each pair of M
  has fewer than K and C better ones. Take a pair not in M. If its expert rejected it, the expert
  had C better proposals then and has C better ones at the end, since a proposal it did not reject
  is made again and it replaces one only by a better one. If it was never rejected, the token
  proposes to K better ones. So the condition fails for every pair that is not in M.

  Each round but the last rejects someone, so there are at most S E + 1; as a rule a few.
  """
  num_pairs = rank.size

  def proposals(rejected: Bool[Array, 'S E']) -> tuple[Int[Array, 'S K'], Bool[Array, 'S K']]:
    best, expert_index = jax.lax.top_k(jnp.where(rejected, -num_pairs, -rank), num_selected_experts)
    return expert_index.astype(jnp.int32), best > -num_pairs

  def play(state: _Matching) -> _Matching:
    expert_index, made = proposals(state.rejected)
    token = jnp.arange(rank.shape[0])[:, None]
    proposed = jnp.zeros(rank.shape, bool).at[token, expert_index].set(made, unique_indices=True)
    standing = jnp.where(proposed, rank, num_pairs)
    # The rank of the C-th best proposal of each expert; num_pairs if it has fewer.
    last = jnp.sort(standing, axis=0)[capacity - 1]
    rejects = proposed & (standing > last[None, :])
    return _Matching(state.rejected | rejects, jnp.any(rejects))

  start = _Matching(jnp.broadcast_to(~valid[:, None], rank.shape), jnp.bool_(True))
  start = router_lib.varying_like(start, valid)
  return proposals(jax.lax.while_loop(lambda state: state.changed, play, start).rejected)


def taken_gates(
  router_logits: Float[Array, 'G S E'],
  router_probs: Float[Array, 'G S E'],
  expert_index: Int[Array, 'G S K'],
  chosen: Bool[Array, 'G S K'],
  renormalize: str,
) -> Float[Array, 'G S K']:
  """Returns the softmax probabilities of the chosen experts, 0 for the others.

  With `before_drop` they are divided by their sum. That sum can be as small as floats go when a
  token lost its favourites, so the division is done as a softmax over the chosen logits.
  """
  if renormalize not in RENORMALIZATIONS:
    raise ValueError(f'renormalize={renormalize!r}: must be one of {RENORMALIZATIONS}')
  if renormalize != 'before_drop':
    return jnp.where(chosen, jnp.take_along_axis(router_probs, expert_index, axis=-1), 0)
  logits = jnp.take_along_axis(router_logits, expert_index, axis=-1)
  top = jnp.max(jnp.where(chosen, logits, -jnp.inf), axis=-1, keepdims=True)
  # Where nothing is chosen, top is -inf; no gradient may pass through what comes of it.
  weights = jnp.where(chosen, jnp.exp(jnp.where(chosen, logits - jax.lax.stop_gradient(top), 0)), 0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def choose(params: Params, state: State, inputs: RouterInputs, options: RouterOptions) -> Choice:
  """Training: see `greedy_assignment`, with C the capacity of the group. Evaluation: top-k.

  Pairs are in order of the logarithm of the softmax over all experts: the same order as the
  probabilities, without the ties of those that round to 0. Gates are the probabilities; with
  renormalize `before_drop` divided by the sum over the experts the token got, a sum of fewer than K
  where it got fewer. No gradient passes through the assignment.

  Source: none found for the same rule; the greedy 1/2-approximation of the assignment problem, here
  as a router. Nearest is greedy_balanced_assignment of Hunter-DDM/stablemoe (73ea6ef): experts in
  random order take their top T / E tokens. Differs from dropping by priority: a token whose
  favourite is full goes on to its next best.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens)
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


def allowed(options: RouterOptions) -> tuple[str, str] | None:
  """Rejects gates that are always 1, through which the router would learn nothing."""
  if options.num_selected_experts == 1 and options.renormalize != 'none':
    why = 'with num_selected_experts=1, or the gate is always 1 and the router learns nothing'
    return 'renormalize', f'must be none {why}'
  return None


ROUTER = router_lib.Router(
  name='greedy',
  paper='none',
  summary='best pairs of token and expert first, while both have room; top-k in evaluation',
  choose=choose,
  causal=False,
  learns=True,
  balance='assignment',
  cost='D E products, a sort of S E, some rounds of top-k of E and a sort of S for each expert',
  allowed=allowed,
)
