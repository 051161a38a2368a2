"""Interface of a router, between the choice of experts and everything else.

A router reads the tokens of the routing groups that lie on one device and returns a `Choice`:
which experts each token selects, with what weight. Capacity, dispatch, statistics and the common
losses are the same for all. A new router is one file in `routers/` whose `ROUTER` describes it
and whose `Options` declare its hyperparameters; the registry and `moe_jax.schema` find them there.

Nothing here communicates. What a router must know of other devices, it counts in `Choice.sums`;
the layer adds them up over all devices, and `Router.loss` and `Router.update` read the totals. So
losses and states are the same on any mesh.

One-letter dimensions: G routing groups, S tokens of a group, D embed, E experts, K assignments of a
token, P slots of an expert, N columns of a matrix.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.router_options import MatrixOptions, RouterOptions, own_fields

Params = dict[str, Array]
State = dict[str, Array]


class RouterInputs(NamedTuple):
  """Inputs that a router may read.

  Attributes:
    tokens: float32, jittered if the config says so.
    valid: False for padding.
    token_ids: of the vocabulary; the input tokens of the model.
    positions: of the token in its document, the same in training and decoding.
    keys: one per group, for what a router draws in training. In evaluation they are fixed and a
      router must not draw.
  """

  tokens: Float[Array, 'G S D']
  valid: Bool[Array, 'G S']
  token_ids: Int[Array, 'G S']
  positions: Int[Array, 'G S']
  keys: Key[Array, 'G']


class Choice(NamedTuple):
  """Decision of a router, before any capacity.

  K is the number of assignments of a token, all E where a token may select any number of experts.

  Attributes:
    expert_index: the expert of each assignment, none twice among the selected ones of a token; best
      first where the router has an order.
    gates: the weight of each selected expert's output, before any drop. Carries gradient.
    chosen: True if the assignment requests a slot at all. Its value for padding is ignored.
    router_probs: what losses and statistics read, non-negative, summing to at most 1. Carries
      gradient.
    router_logits: what z-loss and entropy read, before anything bounds them: a weight that is no
      number must show in the loss. Carries gradient.
    sums: the router's own sums over the valid tokens of each group; float32. May carry gradient.
  """

  expert_index: Int[Array, 'G S K']
  gates: Float[Array, 'G S K']
  chosen: Bool[Array, 'G S K']
  router_probs: Float[Array, 'G S E']
  router_logits: Float[Array, 'G S E']
  sums: dict[str, Float[Array, 'G ...']]


class Mixture(NamedTuple):
  """Slots that are mixtures of tokens.

  Attributes:
    dispatch: the weight of each token in each slot.
    combine: the weight of each slot in each token's output.
  """

  dispatch: Float[Array, 'G S E P']
  combine: Float[Array, 'G S E P']


class Weight(NamedTuple):
  """One array of parameters: its shape, and how it starts.

  Attributes:
    shape: of one layer.
    init: `scaled` draws from a truncated normal of variance moe.router_init_scale / shape[0];
      `zeros`; `ones`.
  """

  shape: tuple[int, ...]
  init: str = 'scaled'


def one_matrix(options: RouterOptions, embed_dim: int) -> dict[str, Weight]:
  """Returns the parameters of most routers: `router`, from tokens to logits."""
  return {'router': Weight((embed_dim, options.num_experts))}


def no_params(options: RouterOptions, embed_dim: int) -> dict[str, Weight]:
  """Returns the parameters of a router that learns nothing by gradient."""
  del options, embed_dim
  return {}


def no_state(options: RouterOptions, embed_dim: int, vocab_size: int) -> State:
  """Returns the state of a router without one."""
  del options, embed_dim, vocab_size
  return {}


def logits(
  params: Params, tokens: Float[Array, 'G S D'], options: MatrixOptions
) -> Float[Array, 'G S E']:
  """Returns the logits of a router of one matrix, in float32."""
  return matmul(tokens, params['router'], options)


def matmul(
  tokens: Float[Array, 'G S D'], matrix: Float[Array, 'D N'], options: MatrixOptions
) -> Float[Array, 'G S N']:
  """Multiplies tokens with the matrix of a router, in float32.

  At full precision by `router_dtype`: a rounded logit selects another expert. As `bfloat16`,
  tokens, matrix and the incoming gradient are rounded to it, and the matmul sums in float32,
  as the matrix units of GPUs and TPUs do. `evaluate --compare_router_dtype` measures how many
  assignments of a run differ.
  """
  if options.router_dtype == 'bfloat16':
    # The custom gradient is each device's own; this mark makes JAX add them up.
    return _narrow_matmul(tokens, varying_like(matrix, tokens))
  # [G S D] -> [G S N]. Without `highest` GPUs and TPUs round float32 factors to TF32 or bfloat16.
  return jnp.einsum('gsd,dn->gsn', tokens, matrix, precision='highest')


# A custom gradient, so that both matmuls of the backward pass take bfloat16 factors, too.
@jax.custom_vjp
def _narrow_matmul(tokens, matrix):
  return _summed_wide('gsd,dn->gsn', tokens, matrix)


def _summed_wide(spec: str, *factors: Array) -> Array:
  narrow = (factor.astype(jnp.bfloat16) for factor in factors)
  return jnp.einsum(spec, *narrow, preferred_element_type=jnp.float32)


def _narrow_matmul_fwd(tokens, matrix):
  # The tokens are kept as the backward pass reads them, at half the size.
  return _narrow_matmul(tokens, matrix), (tokens.astype(jnp.bfloat16), matrix)


def _narrow_matmul_bwd(residuals, d_logits):
  tokens, matrix = residuals
  return _summed_wide('gsn,dn->gsd', d_logits, matrix), _summed_wide(
    'gsd,gsn->dn', tokens, d_logits
  )


_narrow_matmul.defvjp(_narrow_matmul_fwd, _narrow_matmul_bwd)


@dataclasses.dataclass(frozen=True)
class Router:
  """A router: how experts are chosen, and what follows from it.

  Attributes:
    name: value of `moe.router`.
    paper: where it comes from, with arXiv number.
    summary: one line for the table.
    choose: (params, state, inputs, options) -> Choice.
    causal: True if no token's choice depends on later tokens of its group, in training.
    learns: whether the language-model loss reaches its parameters.
    balance: what keeps the experts balanced: `loss`, `state`, `assignment`, `fixed` or `none`.
    cost: per token, besides the experts; for the table.
    options: the class of its options, declared in its file: `RouterOptions` and what else its
      functions read. Presets must set these fields, and no config may change another router's.
    reads_tokens: True if it reads the tokens' vectors, not only at their ids and positions.
    by_group: whether what it chooses, draws or counts for a token depends on its routing group.
    always: its effective value of a field that it does not read, where that is not the default: the
      one other value that a config may give. `allowed` may read it, if the options have it.
    params: (options, embed_dim) -> arrays trained by gradient.
    state: (options, embed_dim, vocab_size) -> float32 arrays that are not trained by gradient, as
      they start. Part of the training state, checkpointed, the same on every device.
    update: (state, sums, options) -> state after a step, from the sums over the whole batch: every
      field of `RouterSums` without scopes. None where the state never changes.
    from_counts: (state, tokens of each id in the training text, options) -> state before the first
      step. None where the state does not depend on the text.
    loss: (sums, state, options) -> unweighted auxiliary loss of one layer, weighted by
      moe.router_loss_weight. None without one.
    mix: (params, state, inputs, options) -> `Mixture`, where slots are mixtures of tokens instead
      of single tokens; `choose` then serves only the statistics. None for all but Soft MoE.
    slots: number of slots of an expert. `limited`: those of the capacity factor; assignments beyond
      them are dropped. `filled`: as many, and the router never selects more tokens than that
      (`options.capacity`). `all`: one for every token, whatever the capacity factor.
    allowed: options -> the first error in them as (field, what is allowed), None if there is none.
  """

  name: str
  paper: str
  summary: str
  choose: Callable[[Params, State, RouterInputs, Any], Choice]
  causal: bool
  learns: bool
  balance: str
  cost: str
  options: type[RouterOptions] = RouterOptions
  reads_tokens: bool = True
  by_group: bool = False
  always: Mapping[str, str] = dataclasses.field(default_factory=dict)
  params: Callable[[Any, int], dict[str, Weight]] = one_matrix
  state: Callable[[Any, int, int], State] = no_state
  update: Callable[[State, Any, Any], State] | None = None
  from_counts: Callable[[State, Any, Any], State] | None = None
  loss: Callable[[Any, State, Any], Float[Array, '']] | None = None
  mix: Callable[[Params, State, RouterInputs, Any], 'Mixture'] | None = None
  slots: Literal['limited', 'filled', 'all'] = 'limited'
  allowed: Callable[[Any], tuple[str, str] | None] = lambda options: None

  @property
  def reads(self) -> tuple[str, ...]:
    """The hyperparameters that decide anything in it: fields of `moe`, by name."""
    return tuple(name for name in own_fields(self.options) if name not in self.always)

  @property
  def keeps_all(self) -> bool:
    """True if every expert takes every token, whatever the capacity factor."""
    return self.slots == 'all'

  @property
  def fills_slots(self) -> bool:
    """True if it reads the capacity and never selects more tokens than there are slots."""
    return self.slots == 'filled'

  @property
  def rejected(self) -> str:
    """The reason why no causal language model can have it; empty if one can."""
    return 'every token reads slots that later tokens have mixed into' if self.mix else ''


def masked_sum(
  values: Float[Array, 'G S *rest'], valid: Bool[Array, 'G S']
) -> Float[Array, 'G *rest']:
  """Sums over the valid tokens of each group, in float32."""
  # [G S] -> [G S 1 ..]. A where, not a product: padding may be infinite, and 0 * inf is NaN.
  mask = valid.reshape(*valid.shape, *(1,) * (values.ndim - 2))
  return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0), axis=1)


def squared_variation(values: Float[Array, '*any E']) -> Float[Array, '*any']:
  """Returns the squared coefficient of variation: population variance over squared mean.

  Never through a standard deviation, whose gradient is NaN at perfect balance.
  """
  mean = jnp.mean(values, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(values - mean), axis=-1)
  return variance / jnp.maximum(jnp.square(mean[..., 0]), 1e-10)


def varying_like(values: Any, reference: Array) -> Any:
  """Returns a tree of arrays marked as differing between devices where a reference does.

  Inside `shard_map`, a loop that starts from constants and continues with data of the device needs
  this for its start, and so does a gradient of our own for weights that are the same on several
  devices: marking sums their gradient over these. Outside it changes nothing.
  """

  def mark(value):
    # The axes along which the reference differs and the value does not; none outside a shard_map.
    missing = jax.typeof(reference).mat.varying - jax.typeof(value).mat.varying
    return jax.lax.pcast(value, tuple(sorted(missing)), to='varying') if missing else value

  return jax.tree.map(mark, values)


def per_group(function: Callable, *arrays: Any) -> Any:
  """Maps a function of one group over all groups."""
  # A group is routed by itself, so it does not matter which device holds it.
  return jax.vmap(function)(*arrays)
