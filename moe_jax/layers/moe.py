"""The mixture-of-experts layer: one `shard_map` with router, capacity and dispatch inside.

  x -> [router -> plan -> dispatch -> all_to_all -> own experts -> all_to_all -> combine] -> y, sums

Each device routes its own tokens and computes only its own experts. Gradients are taken OUTSIDE the
`shard_map`, with `check_vma=True`: JAX then inserts every cross-device sum of the backward pass.
Taking them inside, or with `check_vma=False`, needs psums by hand and silently scales gradients.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from moe_jax import dispatch as dispatch_room
from moe_jax import routing
from moe_jax.layers import basic
from moe_jax.layers.decode import decode_experts
from moe_jax.layers.experts import gains_from_packing, run_experts
from moe_jax.parallel.mesh import BATCH_AXES, DATA_AXIS, EXPERT_AXIS
from moe_jax.routing.router import Mixture, Weight

# Linen's collection of what routers carry from step to step without a gradient.
ROUTER_STATE = 'router_state'


@dataclasses.dataclass(frozen=True)
class MoeOptions:
  """Every choice of a MoE layer, as plain numbers and names; see `moe_jax.config` for each.

  `capacity_factor` None never drops a token. `balance_scopes` is the number of scopes of the
  load-balancing loss in the batch, a divisor of its number of groups, or that of its sequences.
  `choice` holds the numbers of the router; its `capacity` and `training` are filled in here.
  `returns_choices` also gives back which experts each token asked for, `returns_routing` all that
  the router said of it. `exchange` is not read in decoding.
  """

  router: str
  choice: routing.RouterOptions
  mlp_dim: int
  activation: str
  capacity_factor: float | None
  jitter: float
  priority: str
  balance_scopes: int
  balance_normalization: str
  device_balance_parts: int
  dispatch: str
  router_init_scale: float
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
  """What a router may know of tokens beside their vectors.

  Attributes:
    valid: False for padding: no slot, no statistics, output 0.
    ids: the model's input tokens.
    positions: within the document.
  """

  valid: Bool[Array, '*shape']
  ids: Int[Array, '*shape']
  positions: Int[Array, '*shape']


class MoeParams(NamedTuple):
  """Weights of one layer. What `router` holds is said by `Router.params`.

  In decoding the experts may be those of all layers, see `moe_layer`.
  """

  router: dict[str, Array]
  w_in: Float[Array, '*L E D F1']
  w_out: Float[Array, '*L E F D']


class TokenRouting(NamedTuple):
  """The routing of every token; what it says of padding has no meaning.

  Attributes:
    router_probs: the router's probabilities, as in `routing.Choice`.
    experts: those that each token asked for, before any drop, in the router's order; -1 for an
      assignment that asked for none.
    gates: what multiplies the output of that expert; 0 for none and where the token was dropped.
    kept: whether the expert had a slot for the token.
  """

  router_probs: Float[Array, '*shape E']
  experts: Int[Array, '*shape K']
  gates: Float[Array, '*shape K']
  kept: Bool[Array, '*shape K']


class LayerOutput(NamedTuple):
  """What a layer gives back.

  Attributes:
    y: the experts' weighted outputs.
    sums: over all tokens of all devices.
    choices: the experts that each token asked for, before any drop; -1 for an assignment that asked
      for none and for padding. None unless `MoeOptions.returns_choices`.
    routed: None unless `MoeOptions.returns_routing`.
  """

  y: Float[Array, 'B T D']
  sums: routing.RouterSums
  choices: Int[Array, 'B T K'] | None
  routed: TokenRouting | None


def moe_layer(
  x: Float[Array, 'B T D'],
  info: TokenInfo,
  params: MoeParams,
  state: dict[str, Array],
  keys: Key[Array, 'G'],
  mesh: Mesh,
  options: MoeOptions,
  deterministic: bool,
  layer: Int[Array, ''] | None = None,
) -> LayerOutput:
  """Routes every token to its experts and back.

  Args:
    x: normalised input, sharded over ('data', 'expert') along the batch.
    info: what else there is to know of each token.
    params: expert weights are sharded over 'expert', the router's copied.
    state: of the router, copied.
    keys: one per routing group of the whole batch.
    mesh: axes ('data', 'expert').
    options: static choices.
    deterministic: evaluation: no jitter, and nothing drawn by the router.
    layer: for decoding alone: whose experts are meant, where `params` has those of all layers. It
      reads few of them, and a slice of one layer would copy all of that layer's.

  Raises:
    ValueError: if the mesh does not divide the experts, or mesh and groups the batch, or if its
      devices or the router have no such exchange.
  """
  num_groups = _num_groups(x.shape[0], mesh, options)

  platform = mesh.devices.flat[0].platform
  _check_exchange(options, platform)

  def local(x, info, params, state, keys, layer):
    choices = (options, num_groups, deterministic, platform)
    return _local_layer(x, info, params, state, keys, layer, *choices)

  by_token = PartitionSpec(BATCH_AXES)
  # Over a data axis of one device the experts' gradients need no sum. Unless that axis is named,
  # JAX asks for one all the same, and XLA on CPUs copies all of them for it.
  alone = (DATA_AXIS,) if mesh.shape[DATA_AXIS] == 1 else ()
  by_layer = () if layer is None else (None,)
  by_expert = PartitionSpec(*by_layer, (*alone, EXPERT_AXIS))
  of_params: tuple[Any, ...] = (PartitionSpec(), by_expert, by_expert)
  of_output: tuple[Any, ...] = (by_token, PartitionSpec(), by_token, by_token)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(
      by_token,
      by_token,
      MoeParams(*of_params),
      PartitionSpec(),
      by_token,
      PartitionSpec(),
    ),
    out_specs=LayerOutput(*of_output),
    check_vma=True,
  )(x, info, params, state, keys, layer)


def _num_groups(batch_size: int, mesh: Mesh, options: MoeOptions) -> int:
  """Returns G of the whole batch. Groups belong to the config; the mesh never adjusts them."""
  experts_axis = mesh.shape[EXPERT_AXIS]
  if options.num_experts % experts_axis:
    raise ValueError(
      f'num_experts={options.num_experts}: not divisible by the expert axis of {experts_axis}'
    )
  shards = mesh.shape[DATA_AXIS] * experts_axis
  if batch_size % (shards * options.group_size):
    raise ValueError(
      f'batch_size={batch_size}: not divisible by {shards} devices x {options.group_size} '
      'sequences per routing group'
    )
  num_groups = batch_size // options.group_size
  if num_groups % options.balance_scopes and batch_size != options.balance_scopes:
    raise ValueError(
      f'balance_scopes={options.balance_scopes}: must divide {num_groups} routing groups or be the '
      f'{batch_size} sequences'
    )
  return num_groups


def _check_exchange(options: MoeOptions, platform: str) -> None:
  reason = dispatch_room.why_not(options.exchange, platform)
  if options.exchange == 'ragged' and routing.ROUTERS[options.router].mix:
    reason = f'must be padded with router {options.router}, which fills every slot'
  if reason and options.dispatch != dispatch_room.DECODE:
    raise ValueError(f'exchange={options.exchange!r}: {reason}')


def _local_layer(
  x: Float[Array, 'b T D'],
  info: TokenInfo,
  params: MoeParams,
  state: dict[str, Array],
  keys: Key[Array, 'g'],
  layer: Int[Array, ''] | None,
  options: MoeOptions,
  num_groups: int,
  deterministic: bool,
  platform: str,
) -> LayerOutput:
  """The layer on one device: its tokens, its experts."""
  tokens_GSD = to_groups(x, options.group_size)
  info_GS = TokenInfo(*(to_groups(a[..., None], options.group_size)[..., 0] for a in info))
  valid_GS = info_GS.valid
  local_groups, tokens_in_group, _ = tokens_GSD.shape

  noise_keys, choice_keys, order_keys = split_keys(keys)
  router = routing.ROUTERS[options.router]
  capacity = group_capacity(options, tokens_in_group)
  choice_options = dataclasses.replace(
    options.choice, capacity=capacity, training=not deterministic
  )

  with jax.named_scope('router'):
    router_input = tokens_GSD.astype(jnp.float32)
    if options.jitter and not deterministic:
      router_input = routing.jitter(router_input, noise_keys, options.jitter)
    inputs = routing.RouterInputs(router_input, *info_GS, choice_keys)
    choice = router.choose(params.router, state, inputs, choice_options)
  with jax.named_scope('plan'):
    plan = routing.make_plan(
      choice,
      valid_GS,
      order_keys,
      capacity=capacity,
      priority=options.priority,
      renormalize=options.choice.renormalize,
    )

  weights = (params.w_in, params.w_out)
  if router.mix is None and options.dispatch == dispatch_room.DECODE:
    y_GSD = decode_experts(
      tokens_GSD,
      plan,
      weights,
      options.activation,
      layer=layer,
      axis_name=EXPERT_AXIS,
      platform=platform,
    )
  else:
    mixture = router.mix and router.mix(params.router, state, inputs, choice_options)
    y_GSD = _through_slots(tokens_GSD, plan, mixture, weights, options, capacity, platform)
  y = from_groups(y_GSD, options.group_size)

  device = jax.lax.axis_index(BATCH_AXES)
  parts = -(-options.balance_scopes // num_groups)  # of a group, each in one scope
  part = device * local_groups * parts + jnp.arange(local_groups * parts)
  scope = part.reshape(local_groups, parts) // (num_groups * parts // options.balance_scopes)
  with jax.named_scope('statistics'):
    sums = routing.router_sums(choice, plan, valid_GS, scope, options.balance_scopes)
    if options.capacity_factor is None:
      sums = sums._replace(slots=jnp.sum(sums.kept_per_expert))  # none is set aside
    sums = _sum_over_devices(sums)
  choices = None
  if options.returns_choices:
    choices = from_groups(jnp.where(plan.asked, plan.expert_index, -1), options.group_size)
  routed = None
  if options.returns_routing:
    experts = jnp.where(plan.asked, plan.expert_index, -1)
    of_group = TokenRouting(choice.router_probs, experts, plan.combine_weights, plan.keep)
    routed = TokenRouting(*(from_groups(a, options.group_size) for a in of_group))
  return LayerOutput(y, sums, choices, routed)


def _through_slots(
  tokens: Float[Array, 'G S D'],
  plan: routing.Plan,
  mixture: Mixture | None,
  weights: tuple[Float[Array, 'E D F1'], Float[Array, 'E F D']],
  options: MoeOptions,
  capacity: int,
  platform: str,
) -> Float[Array, 'G S D']:
  """Fills the slots of all experts, crosses the mesh, runs the experts, and comes back."""
  experts = functools.partial(run_experts, activation=options.activation)
  if mixture is None:
    name = _dispatcher(options, capacity, tokens.shape[1])
    mean = _mean_selected(options, capacity, tokens.shape[1])
    ways = options.exchange, gains_from_packing(weights, platform)
    return dispatch_room.run(name, tokens, plan, weights, experts, EXPERT_AXIS, mean, *ways)
  with jax.named_scope('dispatch'):
    slots = mix_tokens(mixture, tokens)
  outputs = dispatch_room.through_experts(slots, weights, experts, EXPERT_AXIS)
  with jax.named_scope('combine'):
    return mix_slots(mixture, outputs)


def mix_tokens(mixture: Mixture, tokens: Float[Array, 'G S D']) -> Float[Array, 'E G P D']:
  """Fills each slot with its mixture of tokens, summed in float32."""
  wide = tokens.astype(jnp.float32)
  slots = jnp.einsum('gsep,gsd->egpd', mixture.dispatch, wide, precision='highest')
  return slots.astype(tokens.dtype)


def mix_slots(mixture: Mixture, expert_outputs: Float[Array, 'E G P D']) -> Float[Array, 'G S D']:
  """Gives each token its mixture of the slots, summed in float32."""
  wide = expert_outputs.astype(jnp.float32)
  y = jnp.einsum('gsep,egpd->gsd', mixture.combine, wide, precision='highest')
  return y.astype(expert_outputs.dtype)


def split_keys(keys: Key[Array, 'g']) -> tuple[Key[Array, 'g'], Key[Array, 'g'], Key[Array, 'g']]:
  """Returns each group's keys of jitter, of the router, and of the order of random drops."""
  split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
  return split[0], split[1], split[2]


def _sum_over_devices(sums: routing.RouterSums) -> routing.RouterSums:
  """Sums over all devices by one psum, the largest number too: each device has a place for its."""
  place = jnp.arange(jax.lax.axis_size(BATCH_AXES)) == jax.lax.axis_index(BATCH_AXES)
  largest = jnp.where(place, sums.logsumexp_max, 0.0)
  total, largest = jax.lax.psum((sums, largest), BATCH_AXES)
  return total._replace(logsumexp_max=jnp.max(largest))


def group_capacity(options: MoeOptions, tokens_in_group: int) -> int:
  """Returns C: at most the S slots one expert can fill, and S when nothing may be dropped."""
  if options.capacity_factor is None or routing.ROUTERS[options.router].keeps_all:
    return tokens_in_group
  capacity = routing.expert_capacity(
    tokens_in_group, options.num_experts, options.num_selected_experts, options.capacity_factor
  )
  return min(capacity, tokens_in_group)


def _dispatcher(options: MoeOptions, capacity: int, tokens_in_group: int) -> str:
  """Returns the dispatcher: where none is dropped, `gather` would give each expert S slots."""
  limited = capacity < tokens_in_group or routing.ROUTERS[options.router].keeps_all
  return options.dispatch if limited or options.dispatch != 'gather' else 'dropless'


def _mean_selected(options: MoeOptions, capacity: int, tokens_in_group: int) -> int | float:
  """Returns the assignments of a token that balanced experts would share."""
  router = routing.ROUTERS[options.router]
  if router.keeps_all:
    return options.num_experts
  if router.fills_slots:
    return capacity * options.num_experts / tokens_in_group
  return options.num_selected_experts


def to_groups(x: Shaped[Array, 'b T D'], group_size: int) -> Shaped[Array, 'g S D']:
  """Puts `group_size` sequences into each group, position by position: S index t * n + sequence.

  Order of position first makes the `token` priority causal for each sequence and fair to all.
  """
  batch, length, width = x.shape
  grouped = x.reshape(batch // group_size, group_size, length, width)
  return grouped.swapaxes(1, 2).reshape(batch // group_size, length * group_size, width)


def from_groups(x: Shaped[Array, 'g S D'], group_size: int) -> Shaped[Array, 'b T D']:
  """The inverse of `to_groups`."""
  groups, tokens, width = x.shape
  length = tokens // group_size
  split = x.reshape(groups, length, group_size, width)
  return split.swapaxes(1, 2).reshape(groups * group_size, length, width)


class Moe(nn.Module):
  """Holds the weights of a MoE layer.

  Attributes:
    options: every choice of the layer.
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
    of_all_layers: tuple[Array, Array] | None = None,
    layer: Int[Array, ''] | None = None,
  ) -> LayerOutput:
    """Returns what `moe_layer` does.

    Args:
      x: normalised input.
      info: what else there is to know of each token.
      deterministic: evaluation.
      of_all_layers: for decoding: `w_in` and `w_out` of all layers, to be read in place of its own.
      layer: the number of this one among them.
    """
    options = self.options
    router = routing.ROUTERS[options.router]
    embed_dim = x.shape[-1]
    columns = basic.hidden_dim(options.mlp_dim, options.activation)
    experts = options.num_experts
    params = MoeParams(
      router={
        name: self.param(name, self._router_init(weight), weight.shape, jnp.float32)
        for name, weight in router.params(options.choice, embed_dim).items()
      },
      w_in=self.param(
        'w_in',
        basic.logical(basic.experts_init, 'expert', 'embed', 'mlp'),
        (experts, embed_dim, columns),
      ),
      w_out=self.param(
        'w_out',
        basic.logical(basic.experts_init, 'expert', 'mlp', 'embed'),
        (experts, options.mlp_dim, embed_dim),
      ),
    )
    if of_all_layers is None:
      layer = None
    else:
      params = MoeParams(params.router, *of_all_layers)
    # Evaluation needs no key: what a policy draws there is drawn from a fixed one, so that the same
    # text always gives the same number.
    key = jax.random.key(0) if deterministic else self.make_rng('routing')
    keys = jax.random.split(key, x.shape[0] // options.group_size)

    def new_state() -> dict[str, Array]:
      return router.state(options.choice, embed_dim, self.vocab_size)

    state = {
      name: self.variable(ROUTER_STATE, name, lambda name=name: new_state()[name]).value
      for name in jax.eval_shape(new_state)
    }
    return moe_layer(x, info, params, state, keys, self.mesh, options, deterministic, layer)

  def _router_init(self, weight: Weight) -> Any:
    init = {
      'scaled': nn.initializers.variance_scaling(
        self.options.router_init_scale, 'fan_in', 'truncated_normal'
      ),
      'zeros': nn.initializers.zeros,
      'ones': nn.initializers.ones,
    }[weight.init]
    return basic.logical(init, *(None for _ in weight.shape))
