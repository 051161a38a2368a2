"""Control: experts in rotation, in the order of the positions of a text.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, RouterOptions, State


def fixed_choice(expert_index: Int[Array, 'G S K'], num_experts: int) -> Choice:
  """Returns the choice of a router with experts but no scores: gates 1 / K.

  `router_probs` are 1 / K for the selected experts and 0 for the others; nothing carries gradient.
  `router_logits` are 0, so the z-loss is the constant (log E)^2.
  """
  num_groups, num_tokens, num_selected = expert_index.shape
  gates = jnp.full(expert_index.shape, 1 / num_selected, jnp.float32)
  experts = jnp.arange(num_experts, dtype=expert_index.dtype)[None, None, None, :]
  # [G S K E]; the K experts are distinct, so the sum over K is 0 or 1.
  is_chosen = (expert_index[..., None] == experts).astype(jnp.float32)
  return Choice(
    expert_index=expert_index,
    gates=gates,
    chosen=jnp.ones(expert_index.shape, bool),
    router_probs=jnp.sum(is_chosen, axis=2) / num_selected,
    router_logits=jnp.zeros((num_groups, num_tokens, num_experts), jnp.float32),
    sums={},
  )


def choose(params: Params, state: State, inputs: RouterInputs, options: RouterOptions) -> Choice:
  """Sends position p to the experts (p K + i) mod E for i = 0..K-1, gate 1 / K each.

  A control, of no paper. Over E consecutive positions every expert gets exactly K tokens of a
  sequence. All sequences of a group stand at the same expert at the same position. The position is
  that in the document, so a packed text starts again at expert 0 with every document, and decoding
  sees the experts of training. Of `renormalize` only `after_drop` does anything, in the plan.
  torchtitan's moe.py (b5bcd76) has the same over flat tokens, with gates from the scores.
  """
  del params, state
  num_experts, num_selected = options.num_experts, options.num_selected_experts
  # p K mod E from p mod E, lest a long text leave int32.
  first = (inputs.positions.astype(jnp.int32) % num_experts) * num_selected
  turn = jnp.arange(num_selected, dtype=jnp.int32)[None, None, :]
  return fixed_choice((first[..., None] + turn) % num_experts, num_experts)


ROUTER = router_lib.Router(
  name='round_robin',
  paper='a control, of no paper',
  summary='position p takes the experts p K .. p K + K - 1, modulo E',
  choose=choose,
  causal=True,
  learns=False,
  reads_tokens=False,
  balance='fixed',
  cost='none',
  params=router_lib.no_params,
)
