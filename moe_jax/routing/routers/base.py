"""BASE: each training group is dealt out so that every expert gets the same number of tokens.

One-letter dimensions: G routing groups, S tokens of a group, E experts, P = E C tokens of a group
with fillers, C slots of an expert.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import GateScaleOptions, MatrixOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State

# Each phase of the auction bids with a smaller increment: range / 4, / 16, ... down to the last.
EPSILON_STEP = 4.0
# Of all phases of a group together. A guard: S = 512 random tokens and E = 64 need 400 to 1,200.
MAX_ROUNDS = 2000


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the one K that it allows."""
    del num_experts, num_selected_experts
    return {'num_selected_experts': 1}


class _Auction(NamedTuple):
  """One group in the middle of the auction. P = E * C tokens, fillers included.

  Attributes:
    expert: that holds the token; E if none does.
    bid: of a token that is held.
    start: the price of an empty slot in this phase.
    price: of a slot at each expert now: the lowest bid held if it is full, else `start`.
    epsilon: by how much at least a bid is above the price.
    complete: the assignment at the end of the last finished phase; E before the first.
    rounds: so far.
    done: whether the phase with the last epsilon has ended.
  """

  expert: Int[Array, 'P']
  bid: Float[Array, 'P']
  start: Float[Array, 'E']
  price: Float[Array, 'E']
  epsilon: Float[Array, '']
  complete: Int[Array, 'P']
  rounds: Int[Array, '']
  done: Bool[Array, '']


def balanced_assignment(
  scores: Float[Array, 'G S E'], valid: Bool[Array, 'G S'], max_rounds: int = MAX_ROUNDS
) -> Int[Array, 'G S']:
  """Gives each token an expert, ceil(S / E) tokens at most to each, for the largest sum of scores.

  Padding takes slots, too, with the same score everywhere; so do the tokens that S lacks to a
  multiple of E. With E dividing S and no padding, each expert gets exactly S / E tokens.

  The sum over a group is below its maximum by at most max(1/2, P * range / 2**18), where P = E *
  ceil(S / E) and range is the largest gap between two scores of one token: for integer scores
  with the first of the two it is the maximum. Of several optima any may come out; the same input
  gives the same one.

  The method is the auction of Bertsekas with P slots of which those of one expert are alike, all
  tokens without a slot bidding at once. A token t bids for the expert with the largest score -
  price, and raises its bid until this is epsilon less than at its second expert. An expert holds
  the C highest bids. Its price never falls in a phase, so that at the end

    scores[t, a_t] - price[a_t] >= max_e (scores[t, e] - price[e]) - epsilon   for all t,

  and the sum over t, with every slot taken, is the bound P * epsilon by linear duality. Phases
  with falling epsilon start from the prices of the one before.

  Args:
    scores: non-finite ones are read as 0 or the largest finite number; nothing hangs on them.
    valid: False for padding.
    max_rounds: after these the assignment of the last finished phase stands, with its larger
      epsilon; if there is none, the tokens without a slot get the free ones in order.
  """
  group_size, num_experts = scores.shape[1:]
  if num_experts == 1:
    return jnp.zeros(valid.shape, jnp.int32)
  capacity = -(-group_size // num_experts)
  num_fillers = num_experts * capacity - group_size
  # A constant added to all scores of a token changes no comparison of assignments.
  scores = jnp.nan_to_num(scores, nan=0.0, posinf=1e30, neginf=-1e30)
  scores = jnp.where(valid[..., None], scores - jnp.max(scores, axis=-1, keepdims=True), 0)
  scores = jnp.pad(scores, ((0, 0), (0, num_fillers), (0, 0)))
  expert = router_lib.per_group(lambda z: _assign_group(z, capacity, max_rounds), scores)
  return expert[:, :group_size]


def _assign_group(scores: Float[Array, 'P E'], capacity: int, max_rounds: int) -> Int[Array, 'P']:
  num_tokens, num_experts = scores.shape
  score_range = -jnp.min(scores)
  # Below range / 2**18 a float32 price would no longer rise by epsilon.
  last_epsilon = jnp.maximum(0.5 / num_tokens, score_range / 2**18)
  nobody = jnp.full((num_tokens,), num_experts, jnp.int32)
  free = jnp.zeros((num_experts,), jnp.float32)
  auction = _Auction(
    expert=nobody,
    bid=jnp.zeros((num_tokens,), jnp.float32),
    start=free,
    price=free,
    epsilon=jnp.maximum(score_range / EPSILON_STEP, last_epsilon),
    complete=nobody,
    rounds=jnp.int32(0),
    done=jnp.bool_(False),
  )
  # A round: all tokens without a slot bid, and each expert keeps its C highest bids. A phase is
  # rounds until no token waits; a smaller epsilon then starts over, from the prices reached.
  auction = jax.lax.while_loop(
    lambda state: ~state.done & (state.rounds < max_rounds),
    lambda state: _end_phase(_bid(state, scores, capacity), last_epsilon),
    router_lib.varying_like(auction, scores),
  )
  finished = auction.complete[0] < num_experts
  return jnp.where(finished, auction.complete, _fill(auction.expert, num_experts, capacity))


def _bid(auction: _Auction, scores: Float[Array, 'P E'], capacity: int) -> _Auction:
  """Lets all tokens without a slot bid once."""
  num_tokens, num_experts = scores.shape
  # Each waiting token bids for its favourite, up to where it gains epsilon less than at its second.
  waiting = auction.expert == num_experts
  values = scores - auction.price[None, :]
  favourite = jnp.argmax(values, axis=-1).astype(jnp.int32)
  # [P E] without the favourite: the largest that is left is the value of the second.
  others = jnp.where(jnp.arange(num_experts)[None, :] == favourite[:, None], -jnp.inf, values)
  lead = jnp.max(values, axis=-1) - jnp.max(others, axis=-1)
  # Without epsilon two tokens that like the same two experts equally could bid the same price
  # forever. With it every bid is above the price, so a phase ends.
  offer = auction.price[favourite] + lead + auction.epsilon
  expert = jnp.where(waiting, favourite, auction.expert)
  bid = jnp.where(waiting, offer, auction.bid)
  # Tokens in order of expert, then of bid from the highest; equal bids in order of position.
  index = jnp.arange(num_tokens, dtype=jnp.int32)
  sorted_expert, _, token = jax.lax.sort((expert, -bid, index), num_keys=2)
  starts = jnp.searchsorted(sorted_expert, jnp.arange(num_experts)).astype(jnp.int32)
  rank = index - starts[sorted_expert]
  # An expert keeps its C highest bids; the others wait again.
  held = jnp.zeros((num_tokens,), bool).at[token].set(rank < capacity, unique_indices=True)
  expert = jnp.where(held, expert, num_experts)
  # The price of a full expert is its lowest bid, that of another what it was when the phase began.
  count = jax.ops.segment_sum(held.astype(jnp.int32), expert, num_experts + 1)[:-1]
  lowest = jax.ops.segment_min(bid, expert, num_experts + 1)[:-1]
  return auction._replace(
    expert=expert,
    bid=bid,
    price=jnp.where(count == capacity, lowest, auction.start),
    rounds=auction.rounds + 1,
  )


def _end_phase(auction: _Auction, last_epsilon: Float[Array, '']) -> _Auction:
  """Proceeds to the next epsilon when every token has a slot."""
  num_experts = auction.price.shape[0]
  over = jnp.all(auction.expert < num_experts)
  # All prices less a constant are the same prices; so they stay small and epsilon is not rounded
  # away.
  start = jnp.where(over, auction.price - jnp.min(auction.price), auction.start)
  return auction._replace(
    complete=jnp.where(over, auction.expert, auction.complete),
    done=over & (auction.epsilon <= last_epsilon),
    epsilon=jnp.where(
      over, jnp.maximum(auction.epsilon / EPSILON_STEP, last_epsilon), auction.epsilon
    ),
    expert=jnp.where(over, num_experts, auction.expert),
    start=start,
    price=jnp.where(over, start, auction.price),
  )


def _fill(expert: Int[Array, 'P'], num_experts: int, capacity: int) -> Int[Array, 'P']:
  """Gives the tokens without an expert the free slots, both in order."""
  taken = jax.ops.segment_sum(jnp.ones_like(expert), expert, num_experts + 1)[:-1]
  waiting = expert == num_experts
  index = jnp.cumsum(waiting.astype(jnp.int32)) - 1
  free = jnp.searchsorted(jnp.cumsum(capacity - taken), index, side='right')
  return jnp.where(waiting, jnp.minimum(free, num_experts - 1), expert).astype(jnp.int32)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Training: the balanced assignment of each group. Evaluation: the largest logit.

  The gate is sigmoid(router_logits) of the expert, which is all that the router learns from; no
  gradient passes through the assignment.

  Source: Lewis et al. 2021, arXiv:2103.16716, and fairseq's modules/base_layer.py (26d62ae):
  balanced assignment by an auction in training, the best expert in evaluation, sigmoid gate.
  Differs: balance is within the routing groups of the config, whichever devices hold them. In
  fairseq each worker solves its own share, after it has sent random tokens to the others if
  args.base_shuffle is set; here nothing is shuffled, so tokens of one group, which are of few
  sequences, compete with one another. There the router reads the tokens before the expert's own
  norm, here after the layer's norm. There non-finite scores become the smallest finite one; for
  ours, and for padding, see `balanced_assignment`. `gate_scale` is not of the source. Equal logits
  in evaluation go to the lower expert index.

  The assignment leaves each expert at most ceil(S / E) tokens; a capacity below that still drops.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  # The assignment weighs tokens against later ones, so evaluation must do without it.
  if options.training:
    expert_index = balanced_assignment(jax.lax.stop_gradient(router_logits), inputs.valid)
  else:
    expert_index = jnp.argmax(router_logits, axis=-1).astype(jnp.int32)
  expert_index = expert_index[..., None]
  # Not a softmax: the gate measures how much this expert helps the token, whether or not the token
  # would rather have another.
  gates = jax.nn.sigmoid(jnp.take_along_axis(router_logits, expert_index, axis=-1))
  return Choice(
    expert_index=expert_index,
    gates=gates * options.gate_scale,
    chosen=jnp.ones(expert_index.shape, bool),
    router_probs=jax.nn.softmax(router_logits, axis=-1),
    router_logits=router_logits,
    sums={},
  )


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects several experts, and gates that are always 1."""
  if options.num_selected_experts != 1:
    return 'num_selected_experts', 'must be 1 with router=base'
  if options.renormalize != 'none':
    return 'renormalize', 'must be none with router=base, or the gate is always 1'
  return None


ROUTER = router_lib.Router(
  name='base',
  paper='Lewis et al. 2021, arXiv:2103.16716',
  summary='balanced assignment of the largest total logit; sigmoid gate; argmax in evaluation',
  choose=choose,
  options=Options,
  causal=False,
  learns=True,
  by_group=True,
  balance='assignment',
  cost='D E multiply-adds; an auction: tens to hundreds of rounds of E and a sort of S',
  allowed=allowed,
  always={'score': 'sigmoid'},
)
