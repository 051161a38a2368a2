"""Token choice: each token selects its K best experts by its router logits.

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.router_options import SCORES, SOFTMAX_ORDERS, SoftmaxOrderOptions, TopKOptions
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State

RENORMALIZATIONS = ('none', 'before_drop', 'after_drop')


@dataclasses.dataclass(frozen=True)
class Options(TopKOptions):
  """Hyperparameters of this router."""


def choose_top_k(
  router_logits: Float[Array, 'G S E'],
  *,
  num_selected_experts: int,
  score: str = 'softmax',
  softmax_order: str = 'before',
  renormalize: str = 'before_drop',
  gate_scale: float = 1.0,
) -> Choice:
  """Selects the K experts with the largest logits; equal logits go to the lower expert index.

  Args:
    router_logits: float32; the caller keeps the router out of lower precision.
    num_selected_experts: K.
    score: what gates are read from: `softmax` over the experts, `sigmoid` of each logit, or
      `sqrt_softplus`, the square root of softplus of each logit. All rise with the logit, so the
      selection is the same. `router_probs` are the scores divided by their sum over all experts.
    softmax_order: `before` reads the gates from the scores of all E experts; `after` takes the
      softmax over only the K selected logits (gates sum to 1); only with `softmax`.
    renormalize: `none`; `before_drop` divides the K gates by their sum; `after_drop` leaves that to
      `make_plan`, which divides by the sum over the experts that kept the token.
    gate_scale: multiplies the gates last (with `after_drop`, before the division).

  Raises:
    ValueError: for an unknown name, K outside 1..E, or logits that are not float32.

  Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 (`after`, without the noise); Lepikhin et
  al. 2020, arXiv:2006.16668, algorithm 1 (`before`, renormalised before the capacity is applied);
  Fedus et al. 2021, arXiv:2101.03961, eq. 2 (`before`, K = 1, `none`); DeepSeek-AI 2024,
  arXiv:2412.19437, eq. 13-15 (`sigmoid`, `before_drop`, gate_scale 2.5, without bias and groups).
  """
  if score not in SCORES:
    raise ValueError(f'score={score!r}: must be one of {SCORES}')
  if softmax_order not in SOFTMAX_ORDERS:
    raise ValueError(f'softmax_order={softmax_order!r}: must be one of {SOFTMAX_ORDERS}')
  if softmax_order == 'after' and score != 'softmax':
    raise ValueError(f'softmax_order={softmax_order!r}: must be before with score={score!r}')
  if router_logits.dtype != jnp.float32:
    raise ValueError(f'router_logits.dtype={router_logits.dtype}: must be float32')
  num_experts = router_logits.shape[-1]
  if not 1 <= num_selected_experts <= num_experts:
    raise ValueError(
      f'num_selected_experts={num_selected_experts!r}: must be in 1..num_experts={num_experts}'
    )
  # Select on the logits in all cases: two logits can share a rounded score, never an order.
  top_logits, expert_index = jax.lax.top_k(router_logits, num_selected_experts)
  scores, router_probs = scores_and_probs(router_logits, score)
  # `after` is `before` divided by the sum over the selected, exact where those probabilities
  # underflow.
  if softmax_order == 'after':
    gates = jax.nn.softmax(top_logits, axis=-1)
  else:
    gates = gates_of(scores, expert_index, renormalize)
  chosen: Bool[Array, 'G S K'] = jnp.ones(expert_index.shape, bool)
  return Choice(expert_index, gates * gate_scale, chosen, router_probs, router_logits, {})


def scores_and_probs(
  router_logits: Float[Array, 'G S E'], score: str
) -> tuple[Float[Array, 'G S E'], Float[Array, 'G S E']]:
  """Returns the scores that gates are read from, and the same divided by their sum over experts."""
  if score == 'softmax':
    probs = jax.nn.softmax(router_logits, axis=-1)
    return probs, probs
  if score == 'sigmoid':
    scores = jax.nn.sigmoid(router_logits)
  else:
    # The tiny number keeps the slope of the root finite where softplus underflows.
    scores = jnp.sqrt(jax.nn.softplus(router_logits) + 1e-20)
  return scores, scores / _at_least(jnp.sum(scores, axis=-1, keepdims=True))


def gates_of(
  scores: Float[Array, 'G S E'], expert_index: Int[Array, 'G S K'], renormalize: str
) -> Float[Array, 'G S K']:
  """Returns the scores of the selected experts, divided by their sum if that is `before_drop`."""
  if renormalize not in RENORMALIZATIONS:
    raise ValueError(f'renormalize={renormalize!r}: must be one of {RENORMALIZATIONS}')
  gates = jnp.take_along_axis(scores, expert_index, axis=-1)
  if renormalize == 'before_drop':
    gates = gates / _at_least(jnp.sum(gates, axis=-1, keepdims=True))
  return gates


def _at_least(total: Float[Array, 'G S 1']) -> Float[Array, 'G S 1']:
  """Bounds a divisor away from 0, so that its square, in the gradient, does not underflow."""
  return jnp.maximum(total, 1e-12)


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """See `choose_top_k`."""
  del state
  return choose_top_k(
    router_lib.logits(params, inputs.tokens, options),
    num_selected_experts=options.num_selected_experts,
    score=options.score,
    softmax_order=options.softmax_order,
    renormalize=options.renormalize,
    gate_scale=options.gate_scale,
  )


def gates_allowed(options: SoftmaxOrderOptions) -> tuple[str, str] | None:
  """Rejects gates that are always 1, through which the router would learn nothing."""
  if options.num_selected_experts == 1:
    why = 'with num_selected_experts=1, or the gate is always 1 and the router learns nothing'
    if options.renormalize != 'none':
      return 'renormalize', f'must be none {why}'
    if options.softmax_order != 'before':
      return 'softmax_order', f'must be before {why}'
  return None


def allowed(options: TopKOptions) -> tuple[str, str] | None:
  """Rejects a softmax over the selected of other scores, and gates that are always 1."""
  if options.softmax_order == 'after' and options.score != 'softmax':
    return 'softmax_order', f'must be before with score={options.score}'
  return gates_allowed(options)


ROUTER = router_lib.Router(
  name='top_k',
  paper='Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961',
  summary='K largest logits; softmax, sigmoid or sqrt-softplus gates',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  balance='loss',
  cost='D E multiply-adds, top-k of E',
  allowed=allowed,
)
