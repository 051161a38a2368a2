"""Token choice: each token selects its K best experts by the softmax of its router logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

SOFTMAX_ORDERS = ('before', 'after')
RENORMALIZATIONS = ('none', 'before_drop', 'after_drop')


class Choice(NamedTuple):
  """What a router decided, before any capacity.

  Attributes:
    expert_index: the K selected experts, best first.
    gates: the weight of each selected expert's output, before any drop.
    router_probs: softmax over all experts; what losses and statistics read.
  """

  expert_index: Int[Array, 'G S K']
  gates: Float[Array, 'G S K']
  router_probs: Float[Array, 'G S E']


def jitter(
  tokens: Float[Array, 'G S D'], keys: Key[Array, 'G'], epsilon: float
) -> Float[Array, 'G S D']:
  """Multiplies the router's input by noise from U(1 - epsilon, 1 + epsilon), drawn per element.

  One key per group, so that the noise does not depend on which device holds the group. Training
  only; the experts see the tokens without noise.

  Source: Fedus et al. 2021, arXiv:2101.03961, sec. 2.4 and Mesh TensorFlow's Switch router.
  """
  draw = jax.vmap(
    lambda key: jax.random.uniform(
      key, tokens.shape[1:], tokens.dtype, minval=1.0 - epsilon, maxval=1.0 + epsilon
    )
  )
  return tokens * draw(keys)


def choose_top_k(
  router_logits: Float[Array, 'G S E'],
  *,
  num_selected_experts: int,
  softmax_order: str = 'before',
  renormalize: str = 'before_drop',
) -> Choice:
  """Selects the K experts with the largest logits; equal logits go to the lower expert index.

  Args:
    router_logits: float32; the caller keeps the router out of lower precision.
    num_selected_experts: K.
    softmax_order: `before` reads the gates from the softmax over all E experts; `after` takes the
      softmax over the K selected logits alone (gates sum to 1).
    renormalize: `none`; `before_drop` divides the K gates by their sum; `after_drop` leaves that to
      `make_plan`, which divides by the sum over the experts that kept the token.

  Raises:
    ValueError: for an unknown `softmax_order` or `renormalize`, K outside 1..E, or logits that are
      not float32.

  Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5 (`after`, without the noise); Lepikhin et
  al. 2020, arXiv:2006.16668, algorithm 1 (`before`, renormalised before the capacity is applied);
  Fedus et al. 2021, arXiv:2101.03961, eq. 2 (`before`, K = 1, `none`).
  """
  if softmax_order not in SOFTMAX_ORDERS:
    raise ValueError(f'softmax_order={softmax_order!r}: must be one of {SOFTMAX_ORDERS}')
  if renormalize not in RENORMALIZATIONS:
    raise ValueError(f'renormalize={renormalize!r}: must be one of {RENORMALIZATIONS}')
  if router_logits.dtype != jnp.float32:
    raise ValueError(f'router_logits.dtype={router_logits.dtype}: must be float32')
  num_experts = router_logits.shape[-1]
  if not 1 <= num_selected_experts <= num_experts:
    raise ValueError(
      f'num_selected_experts={num_selected_experts!r}: must be in 1..num_experts={num_experts}'
    )
  router_probs = jax.nn.softmax(router_logits, axis=-1)
  # Select on the logits in both orders: two logits can share a rounded probability, never an order.
  top_logits, expert_index = jax.lax.top_k(router_logits, num_selected_experts)
  if softmax_order == 'after':
    gates = jax.nn.softmax(top_logits, axis=-1)
  else:
    gates = jnp.take_along_axis(router_probs, expert_index, axis=-1)
    if renormalize == 'before_drop':
      gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
  return Choice(expert_index, gates, router_probs)
