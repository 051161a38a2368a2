"""Spill-over: tokens in order of position, each takes its best experts that are not full.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token, C
slots of an expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import GateScaleOptions, MatrixOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers.greedy import allowed, taken_gates


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""


def spill_assignment(
  router_logits: Float[Array, 'G S E'],
  valid: Bool[Array, 'G S'],
  *,
  num_selected_experts: int,
  capacity: int,
) -> tuple[Int[Array, 'G S K'], Bool[Array, 'G S K']]:
  """Serves the tokens of a group one after the other.

  Each takes the K experts with the largest logits among those that have fewer than C tokens so far;
  all of them if they are fewer than K. Equal logits go to the lower expert index. Padding takes no
  slot.

  Returns:
    expert_index: the experts of each token, best first.
    chosen: False for the experts that a token did not get.
  """
  num_tokens, num_experts = router_logits.shape[1:]
  if capacity >= num_tokens:
    # No expert can be full before the last token: no need to go one by one.
    expert_index = jax.lax.top_k(router_logits, num_selected_experts)[1].astype(jnp.int32)
    return expert_index, jnp.ones(expert_index.shape, bool)

  def serve(
    count: Int[Array, 'E'], token: tuple[Float[Array, 'E'], Bool[Array, '']]
  ) -> tuple[Int[Array, 'E'], tuple[Int[Array, 'K'], Bool[Array, 'K']]]:
    # A token sees the loads that those before it left, and nothing of those after it: causal, but
    # S steps that cannot run at once.
    logits, is_valid = token
    is_free = count < capacity
    _, expert_index = jax.lax.top_k(jnp.where(is_free, logits, -jnp.inf), num_selected_experts)
    # Fewer than K that are not full: top-k continues with full ones, which are not selected.
    chosen = is_free[expert_index]
    # Padding selects like any token, but takes no slot.
    count = count.at[expert_index].add((chosen & is_valid).astype(jnp.int32), unique_indices=True)
    return count, (expert_index.astype(jnp.int32), chosen)

  def serve_all(group_logits, group_valid):
    count = router_lib.varying_like(jnp.zeros((num_experts,), jnp.int32), group_logits)
    return jax.lax.scan(serve, count, (group_logits, group_valid))[1]

  return router_lib.per_group(serve_all, router_logits, valid)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """See `spill_assignment`, with C the capacity of the group, in training and evaluation alike.

  Gates are the softmax probabilities over all experts; with renormalize `before_drop` divided by
  the sum over the experts the token got. No gradient passes through the assignment.

  A choice depends on the tokens before it in the group. With group_size 1 these are the earlier
  tokens of its sequence. With more, the other sequences of the group take slots, too: by position
  first, so earlier and equal positions only, but a sequence then depends on its neighbours.
  Decoding step by step starts each step with empty experts.

  Source: none; the greedy assignment (router `greedy`) made causal. Nearest is No-Token-Left-Behind
  (Fedus et al. 2021, arXiv:2101.03961, appendix), which reroutes what overflows in stages; here it
  is token by token, hence causal.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  expert_index, chosen = spill_assignment(
    jax.lax.stop_gradient(router_logits),
    inputs.valid,
    num_selected_experts=options.num_selected_experts,
    capacity=options.capacity,
  )
  router_probs = jax.nn.softmax(router_logits, axis=-1)
  gates = taken_gates(router_logits, router_probs, expert_index, chosen, options.renormalize)
  return Choice(
    expert_index, gates * options.gate_scale, chosen, router_probs, router_logits, sums={}
  )


ROUTER = router_lib.Router(
  name='spill',
  paper='none',
  summary='each token in order takes its best experts that are not full; causal',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='assignment',
  slots='filled',
  cost='D E multiply-adds, top-k of E, in S sequential steps',
  allowed=allowed,
)
