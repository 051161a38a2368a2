"""Token choice of two experts, the second of which may be left out at random (GShard).

One-letter dimensions: G routing groups, S tokens of a group, E experts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax import fields
from moe_jax.router_options import GateScaleOptions, MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers import top_k
from moe_jax.routing.stats import RouterSums

SECOND_CHOICES = ('random', 'threshold', 'all')

# Of `threshold`: a second gate of at least this always requests a slot.
SECOND_GATE_THRESHOLD = 0.2


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  second_choice: str = hyperparameter(
    fields.one_of(
      'random',
      SECOND_CHOICES,
      'In training, the second choice requests a slot with probability 2 g2, with '
      'min(1, g2 / 0.2), or always.',
    )
  )

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns the one renormalization of its gates that it allows."""
    del num_experts, num_selected_experts
    return {'renormalize': 'before_drop'}


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the two largest logits; the second requests a slot the likelier, the larger its gate.

  Gates are g_i / (g_1 + g_2), g the softmax over all experts, before any capacity. They stay so
  when the second choice is left out or dropped: the first gate is not raised to 1. Equal logits go
  to the lower expert index.

  In training the second choice requests a slot if one U(0, 1) per token lies below 2 g_2 (`random`)
  or g_2 / 0.2 (`threshold`), g_2 being the gate above and so at most 1/2; with `all`, always. In
  evaluation always, and nothing is drawn. Assignments that request no slot are not counted as load.

  Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1 (`random`). `threshold` is what Mesh
  TensorFlow (da90793) calls `random`, with its threshold of 0.2. Lingvo's `random`
  (lingvo/core/gshard_layers.py, 01ededf) has a free threshold, of which 0.5 is the paper's draw;
  its default policy is `all`. Both apply their policy in evaluation too, and what Mesh TensorFlow
  calls `threshold`, a hard limit, is not here.

  In algorithm 1 a second choice that is left out uses up a slot all the same, and first choices
  over capacity still count in c_e; in Mesh TensorFlow, Lingvo and here neither does. Differs from
  all: the order in which capacity is given out is `moe.priority`, GShard's is `choice`.
    `gate_scale` multiplies the gates last, after the draw.
  """
  del state
  if options.second_choice not in SECOND_CHOICES:
    raise ValueError(f'second_choice={options.second_choice!r}: must be one of {SECOND_CHOICES}')
  if options.num_selected_experts != 2:
    raise ValueError(f'num_selected_experts={options.num_selected_experts!r}: must be 2')
  # Divided by their sum here, before the draw: a first choice without a second keeps its gate below
  # 1.
  choice = top_k.choose_top_k(
    router_lib.logits(params, inputs.tokens, options),
    num_selected_experts=2,
    renormalize='before_drop',
  )
  second: Bool[Array, 'G S'] = jnp.ones(inputs.valid.shape, bool)
  if options.training and options.second_choice != 'all':
    limit = 0.5 if options.second_choice == 'random' else SECOND_GATE_THRESHOLD
    # The second choice requests a slot with probability min(1, g_2 / limit): one number per token,
    # drawn from the key of its group.
    draw = router_lib.per_group(
      lambda key: jax.random.uniform(key, inputs.valid.shape[1:]), inputs.keys
    )
    second = draw < choice.gates[..., 1] / limit
  # Not a slice of the top-k: see `selection.smallest_selected`.
  first = jnp.argmax(choice.router_logits, axis=-1)
  # [G S E]. Counted apart: `tokens_per_expert` has second choices in it.
  first_choices = jax.nn.one_hot(first, options.num_experts)
  return choice._replace(
    gates=choice.gates * options.gate_scale,
    chosen=jnp.stack([jnp.ones_like(second), second], axis=-1),
    sums={'first_choices': router_lib.masked_sum(first_choices, inputs.valid)},
  )


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns E * sum_e f_e P_e with f_e the share of FIRST choices of expert e: 1 at balance.

  f has no gradient, P_e is the mean router probability of e. E if one expert wins all.

  Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1. Differs: times E^2, as usual in code
  (the paper takes the mean over experts of f_e P_e, 1 / E^2 at balance), and f and P are means over
  the valid tokens of the whole (micro-)batch, where the paper forms one loss per group.
  """
  del state
  num_experts = options.num_experts
  tokens = jnp.maximum(jnp.sum(sums.tokens), 1)
  # c_e / S and m_e of algorithm 1.
  first_share = jax.lax.stop_gradient(sums.own['first_choices']) / tokens
  mean_prob = jnp.sum(sums.prob_sum.reshape(-1, num_experts), axis=0) / tokens
  return num_experts * jnp.sum(first_share * mean_prob)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects all options other than those of GShard's gating."""
  if options.num_selected_experts != 2:
    return 'num_selected_experts', 'must be 2: a first and a second choice'
  if options.renormalize != 'before_drop':
    return 'renormalize', 'must be before_drop: gates are normalised before the second is left out'
  return None


ROUTER = router_lib.Router(
  name='gshard',
  paper='Lepikhin et al. 2020, arXiv:2006.16668',
  summary='top-2; the second choice at random, in proportion to its gate',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='loss',
  cost='D E multiply-adds, top-2 of E, 1 random number',
  loss=loss,
  allowed=allowed,
)
