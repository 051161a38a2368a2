"""Options, inputs and outputs of the mixture-of-experts layer.

B batch, T sequence, D embed, E experts, K selected experts, F hidden units of an expert, F1 columns
of its first matrix, L layers.
"""

import dataclasses
from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from moe_jax import routing


@dataclasses.dataclass(frozen=True)
class MoeOptions:
  """Options of a MoE layer, as plain numbers and names; `moe_jax.schema` documents each.

  `capacity_factor` None never drops a token. `balance_scopes` is the number of scopes of the
  load-balancing loss in the batch, a divisor of its number of groups, or that of its sequences.
  `choice` holds the router's hyperparameters; its `capacity` and `training` are filled in by the
  layer. `returns_choices` also returns which experts each token selected, `returns_routing` all
  that the router computed for it. `exchange` is not read in decoding. Defaults are a plain layer's,
  for a layer built by hand; `models.build` passes every field of a config.
  """

  router: str
  choice: routing.RouterOptions
  mlp_dim: int
  activation: str
  capacity_factor: float | None
  dispatch: str
  router_init_scale: float
  jitter: float = 0.0
  priority: str = 'token'
  balance_scopes: int = 1
  balance_normalization: str = 'one'
  device_balance_parts: int = 1
  returns_choices: bool = False
  exchange: str = 'padded'
  returns_routing: bool = False

  @property
  def num_experts(self) -> int:
    """E."""
    return self.choice.num_experts

  @property
  def num_selected_experts(self) -> int:
    """K of the config; a router's own number of assignments may differ."""
    return self.choice.num_selected_experts

  @property
  def group_size(self) -> int:
    """Sequences in a routing group."""
    return self.choice.group_size


class TokenInfo(NamedTuple):
  """Properties of tokens that a router may read, next to their vectors.

  Attributes:
    valid: False for padding: no slot, no statistics, output 0.
    ids: the model's input tokens.
    positions: within the document.
  """

  valid: Bool[Array, '*shape']
  ids: Int[Array, '*shape']
  positions: Int[Array, '*shape']


class MoeParams(NamedTuple):
  """Weights of one layer. `Router.params` defines those of the router.

  In decoding the experts may be those of all layers, see `moe_layer`.
  """

  router: dict[str, Array]
  w_in: Float[Array, '*L E D F1']
  w_out: Float[Array, '*L E F D']


class TokenRouting(NamedTuple):
  """The routing of every token; that of padding has no meaning.

  Attributes:
    router_probs: the router's probabilities, as in `routing.Choice`.
    experts: those that each token selected, before any drop, in the router's order; -1 for an
      assignment that selected none.
    gates: weight of that expert's output; 0 for none and where the token was dropped.
    kept: True if the expert had a slot for the token.
  """

  router_probs: Float[Array, '*shape E']
  experts: Int[Array, '*shape K']
  gates: Float[Array, '*shape K']
  kept: Bool[Array, '*shape K']


class LayerOutput(NamedTuple):
  """Output of `moe_layer`.

  Attributes:
    y: the experts' weighted outputs.
    sums: over all tokens of all devices.
    choices: the experts that each token selected, before any drop; -1 for an assignment that
      selected none and for padding. None unless `MoeOptions.returns_choices`.
    routed: None unless `MoeOptions.returns_routing`.
  """

  y: Float[Array, 'B T D']
  sums: routing.RouterSums
  choices: Int[Array, 'B T K'] | None
  routed: TokenRouting | None
