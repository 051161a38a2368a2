"""Causal language models as tasks: p(x_1 .. x_T) by the chain rule, cross-entropy by parts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from moe_jax.layers.cross_entropy import cross_entropy_sum, logits
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models import decoder
from moe_jax.models.decoder import Decoder, DecoderOutput
from moe_jax.models.task import Batch, DecodeHooks, LossTerms, Selected, Task, matmul_params


@dataclasses.dataclass(frozen=True)
class LanguageModel(Task):
  """A decoder with the cross-entropy of the next token.

  Attributes:
    network: the Linen module.
  """

  network: Decoder

  @property
  def moe(self) -> MoeOptions | None:
    """The options of the MoE layers; None for a dense model."""
    return self.network.options.moe

  @property
  def num_moe_layers(self) -> int:
    """L."""
    options = self.network.options
    return options.num_layers // options.every if options.moe else 0

  def init(self, key: Key[Array, '']) -> Any:
    """Returns new parameters, boxed with the names of their dimensions."""
    tokens = jnp.ones((self._num_rows(), 2), jnp.int32)
    return self.network.init({'params': key}, tokens, tokens, tokens)['params']

  def _num_rows(self) -> int:
    """Returns the rows of a smallest batch that the mesh, groups and balance scopes divide."""
    moe = self.moe
    if moe is None:
      return self.mesh.size
    return math.lcm(self.mesh.size, moe.balance_scopes) * moe.group_size

  def init_router_state(self) -> dict[str, Array]:
    """Returns the state of the routers before the first step, each array with L in front."""
    return decoder.init_router_state(self.network.options)

  def forward(
    self,
    params: Any,
    router_state: Any,
    batch: Batch,
    *,
    key: Key[Array, ''] | None = None,
    cache: Any = None,
  ) -> DecoderOutput:
    """Returns the output of the network for a batch, of which `targets` are not read."""
    return decoder.forward(
      self.network,
      params,
      batch['inputs'],
      batch['segment_ids'],
      batch['positions'],
      key=key,
      cache=cache,
      router_state=router_state,
    )

  def loss(
    self, params: Any, router_state: Any, batch: Batch, *, key: Key[Array, ''] | None = None
  ) -> LossTerms:
    """Returns nats summed over the tokens of a batch, and the sums of its routers."""
    out = self.forward(params, router_state, batch, key=key)
    with jax.named_scope('cross_entropy'):
      nats = cross_entropy_sum(
        out.hidden, out.output, batch['targets'], batch['segment_ids'], self.mesh
      )
    selected = None
    if out.choices is not None:
      selected = Selected(out.choices, batch['inputs'], batch['segment_ids'] > 0)
    return LossTerms(nats, out.router_sums, selected)

  def with_selected(self) -> 'LanguageModel':
    """Returns the same model, whose losses also return the experts that tokens selected."""
    if self.moe is None:
      return self
    moe = dataclasses.replace(self.moe, returns_choices=True)
    options = dataclasses.replace(self.network.options, moe=moe)
    return dataclasses.replace(self, network=Decoder(options, self.mesh))

  def expert_weights(self, params: Any) -> list[Float[Array, 'L E ...']]:
    """Returns `w_in` and `w_out` of all experts."""
    if self.moe is None:
      return []
    layer = params['layers'][f'block_{self.network.options.every - 1}']['moe']
    return [layer[name] for name in ('w_in', 'w_out')]

  def flops_per_token(self, sequence_length: int) -> int:
    """Returns multiply-adds x 2 of a token's forward and backward pass in matmuls.

    Forward: 2 for each active matrix parameter (router and output included, embedding look-up not),
    and 4 * T * num_heads * head_dim for scores and mixing in each layer, over all T positions as
    the dense kernel computes them. Backward counts twice the forward. Empty slots of the capacity,
    norms and softmax are not counted.
    """
    options = self.network.options
    scores = 4 * sequence_length * options.num_heads * options.head_dim
    return 3 * (2 * matmul_params(self) + options.num_layers * scores)

  @property
  def decode(self) -> DecodeHooks:
    """Sampling with a key-value cache; the network must be in mode `decode`."""
    return DecodeHooks(self._init_cache, self._read)

  def _init_cache(self, batch_size: int, max_length: int) -> Any:
    return decoder.init_cache(self.network.options, batch_size, max_length)

  def _read(
    self,
    params: Any,
    router_state: Any,
    tokens: Int[Array, 'B T'],
    valid: Any,
    positions: Int[Array, 'B T'],
    cache: Any,
    last: Int[Array, 'B'],
  ) -> tuple[Float[Array, 'B V'], Any]:
    batch = {'inputs': tokens, 'segment_ids': valid.astype(jnp.int32), 'positions': positions}
    out = self.forward(params, router_state, batch, cache=cache)
    hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
    return logits(hidden, out.output), out.cache
