"""The mixture-of-experts layer as a Linen module: its weights, its router's state, and its keys.

`moe_layer.py` computes; B batch, T sequence, D embed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_jax import experts as experts_lib
from moe_jax import routing
from moe_jax.layers import basic
from moe_jax.layers.moe_layer import moe_layer
from moe_jax.layers.moe_options import LayerOutput, MoeOptions, MoeParams, TokenInfo
from moe_jax.routing.router import Weight

# Linen's collection of what routers carry from step to step without a gradient.
ROUTER_STATE = 'router_state'


class Moe(nn.Module):
  """Holds the weights of a MoE layer.

  Attributes:
    options: of the layer.
    mesh: axes ('data', 'expert').
    vocab_size: V, for routers that keep a table of token ids.
  """

  options: MoeOptions
  mesh: Mesh
  vocab_size: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    info: TokenInfo,
    deterministic: bool,
    all_layers: tuple[Array, Array] | None = None,
    layer: Int[Array, ''] | None = None,
  ) -> LayerOutput:
    """Returns the output of `moe_layer`.

    Args:
      x: normalised input.
      info: properties of each token.
      deterministic: evaluation.
      all_layers: for decoding: `w_in` and `w_out` of all layers, to be read instead of its own.
      layer: the number of this one among them.
    """
    options = self.options
    router = routing.ROUTERS[options.router]
    embed_dim = x.shape[-1]
    columns = experts_lib.hidden_dim(options.mlp_dim, options.activation)
    num_experts = options.num_experts
    params = MoeParams(
      router={
        name: self.param(name, self._router_init(weight), weight.shape, jnp.float32)
        for name, weight in router.params(options.choice, embed_dim).items()
      },
      # [E D F1] and [E F D]; each expert starts with the variance of its own fan-in.
      w_in=self.param(
        'w_in',
        basic.logical(basic.experts_init, 'expert', 'embed', 'mlp'),
        (num_experts, embed_dim, columns),
      ),
      w_out=self.param(
        'w_out',
        basic.logical(basic.experts_init, 'expert', 'mlp', 'embed'),
        (num_experts, options.mlp_dim, embed_dim),
      ),
    )
    # Unless it decodes, a layer reads its own weights, which have no dimension L to index.
    if all_layers is None:
      layer = None
    else:
      params = MoeParams(params.router, *all_layers)
    # Evaluation needs no key: what a policy draws there is drawn from a fixed one, so that the same
    # text always gives the same number.
    key = jax.random.key(0) if deterministic else self.make_rng('routing')
    # One key per group, split before the batch is: what a group draws does not depend on the mesh.
    keys = jax.random.split(key, x.shape[0] // options.group_size)

    def new_state() -> dict[str, Array]:
      return router.state(options.choice, embed_dim, self.vocab_size)

    # Only shapes are traced here: a state may be as large as the vocabulary.
    state = {
      name: self.variable(ROUTER_STATE, name, lambda name=name: new_state()[name]).value
      for name in jax.eval_shape(new_state)
    }
    return moe_layer(
      x,
      info,
      params,
      state=state,
      keys=keys,
      mesh=self.mesh,
      options=options,
      deterministic=deterministic,
      layer=layer,
    )

  def _router_init(self, weight: Weight) -> Any:
    init = {
      'scaled': nn.initializers.variance_scaling(
        self.options.router_init_scale, 'fan_in', 'truncated_normal'
      ),
      'zeros': nn.initializers.zeros,
      'ones': nn.initializers.ones,
    }[weight.init]
    return basic.logical(init, *(None for _ in weight.shape))
