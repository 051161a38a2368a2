"""Control: K distinct experts drawn uniformly for each token.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import jax
from jaxtyping import Array, Int, Key

from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, RouterOptions, State
from moe_jax.routing.routers.round_robin import fixed_choice

# The key of evaluation, whatever the run's seed.
EVALUATION_SEED = 0


def distinct_experts(
  key: Key[Array, ''], num_rows: int, num_experts: int, num_selected_experts: int
) -> Int[Array, 'rows K']:
  """Returns K distinct experts for each row, every ordered K-tuple equally likely.

  They are the K largest of E uniform numbers. Two of a row are equal once in 2**23; the lower index
  then wins.
  """
  scores = jax.random.uniform(key, (num_rows, num_experts))
  return jax.lax.top_k(scores, num_selected_experts)[1]


def choose(params: Params, state: State, inputs: RouterInputs, options: RouterOptions) -> Choice:
  """Draws K distinct experts for each token, gate 1 / K each.

  In training from the key of the group, again in every step. In evaluation only from the token's
  position in its document and a constant: all tokens at one position, of whatever sequence, group
  or layer, go to the same experts every time, in training's evaluation and in decoding.

  A control, of no paper; random routing that never changes for a token id is `hash`. Nearest is
  apply_random_logits of Megatron-LM (005742f); THOR draws one expert for all tokens of a layer's
  call. Of `renormalize` only `after_drop` does anything, in the plan.
  """
  del params, state
  num_tokens = inputs.valid.shape[1]
  experts = (options.num_experts, options.num_selected_experts)
  if options.training:
    expert_index = router_lib.per_group(
      lambda key: distinct_experts(key, num_tokens, *experts), inputs.keys
    )
  else:
    key = jax.random.key(EVALUATION_SEED)
    # A key for each position, so that decoding, which sees one at a time, draws the same.
    at_position = jax.vmap(
      lambda position: distinct_experts(jax.random.fold_in(key, position), 1, *experts)[0]
    )
    expert_index = jax.vmap(at_position)(inputs.positions)
  return fixed_choice(expert_index, options.num_experts)


ROUTER = router_lib.Router(
  name='random_choice',
  paper='a control, of no paper',
  summary='K distinct experts at random, drawn again in every step',
  choose=choose,
  causal=True,
  learns=False,
  reads_tokens=False,
  by_group=True,
  balance='fixed',
  cost='E random numbers, top-k of E',
  params=router_lib.no_params,
)
