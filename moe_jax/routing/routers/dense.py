"""Dense mixture: every token goes to every expert, weighted by a softmax gate.

One-letter dimensions: G routing groups, S tokens of a group, E experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.router_options import MatrixOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the one K that it allows."""
    del num_selected_experts
    return {'num_selected_experts': num_experts}


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects all E experts with the softmax of the router logits as gates: y = sum_e p_e f_e(x).

  Assignment e of a token is expert e, whatever the logits; equal logits have equal gates.

  Source: Jacobs et al. 1991 (Neural Computation 3); Jordan & Jacobs 1994 (Neural Computation 6),
  one level of it. Neither paper was reached; both are known from descriptions. Differs: experts
  are trained through the weighted sum by the model's loss, not by a mixture likelihood, and the
  gate sees the same input as the experts. `num_selected_experts` is not read; the gates sum to 1
  already, and `renormalize` changes nothing.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  router_probs = jax.nn.softmax(router_logits, axis=-1)
  # [1 1 E] -> [G S E]: assignment e is expert e.
  experts = jnp.arange(options.num_experts, dtype=jnp.int32)[None, None, :]
  return Choice(
    expert_index=jnp.broadcast_to(experts, router_logits.shape),
    gates=router_probs,
    chosen=jnp.ones(router_logits.shape, bool),
    router_probs=router_probs,
    router_logits=router_logits,
    sums={},
  )


def allowed(options: Options) -> tuple[str, str] | None:
  """Wants K = E: losses, capacities and active parameters are counted from it."""
  if options.num_selected_experts != options.num_experts:
    return 'num_selected_experts', f'must be {options.num_experts}, all experts'
  return None


ROUTER = router_lib.Router(
  name='dense',
  paper='Jacobs et al. 1991; Jordan & Jacobs 1994',
  summary='all experts, softmax weights',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='none',
  cost='D E multiply-adds; every token pays for all E experts',
  slots='all',
  allowed=allowed,
)
