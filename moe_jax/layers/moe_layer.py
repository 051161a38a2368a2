"""The mixture-of-experts layer: one `shard_map` with router, capacity and dispatch inside.

  x -> [router -> plan -> dispatch -> all_to_all -> own experts -> all_to_all -> combine] -> y, sums

Each device routes its own tokens and computes only its own experts. Gradients are taken OUTSIDE the
`shard_map`, with `check_vma=True`: JAX then inserts every cross-device sum of the backward pass.
Taking them inside, or with `check_vma=False`, needs psums by hand and silently scales gradients.

B sequences of the batch, b on this device; T tokens of a sequence; G groups, g on this device; S
tokens in a group; D embed; E experts; K selected experts; F hidden units, F1 columns of the first
matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from moe_jax import dispatch as dispatch_lib
from moe_jax import experts as experts_lib
from moe_jax import routing
from moe_jax.dispatch.mixture import mix_slots, mix_tokens
from moe_jax.layers.moe_options import LayerOutput, MoeOptions, MoeParams, TokenInfo, TokenRouting
from moe_jax.parallel.mesh import BATCH_AXES, DATA_AXIS, EXPERT_AXIS
from moe_jax.parallel.sharding import expert_spec, spec
from moe_jax.routing.groups import from_groups, split_keys, to_groups
from moe_jax.routing.router import Mixture
from moe_jax.routing.sizes import Sizes, group_sizes


def moe_layer(
  x: Float[Array, 'B T D'],
  info: TokenInfo,
  params: MoeParams,
  *,
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
    info: properties of each token.
    params: expert weights are sharded over 'expert', the router's copied.
    state: of the router, copied.
    keys: one per routing group of the whole batch.
    mesh: axes ('data', 'expert').
    options: static.
    deterministic: evaluation: no jitter, and nothing drawn by the router.
    layer: only for decoding: index of the layer, where `params` has the experts of all layers. It
      reads few of them, and a slice of one layer would copy all of that layer's.

  Raises:
    ValueError: if the mesh does not divide the experts, or mesh and groups the batch, or if its
      devices or the router have no such exchange.
  """
  # Groups are those of the whole batch: they never depend on the number of devices.
  num_groups = _num_groups(x.shape[0], mesh, options)
  platform = mesh.devices.flat[0].platform
  _check_exchange(options, platform)
  local = functools.partial(
    _local_layer,
    options=options,
    num_groups=num_groups,
    deterministic=deterministic,
    platform=platform,
  )

  # Tokens are split over both axes, experts only over `expert`, router and state are copied. The
  # sums leave as copies because `_sum_over_devices` summed them over both axes.
  by_token: Any = spec('batch')
  copied: Any = spec()
  by_expert: Any = expert_spec(mesh, has_layers=layer is not None)
  params_specs = MoeParams(router=copied, w_in=by_expert, w_out=by_expert)
  output_specs = LayerOutput(y=by_token, sums=copied, choices=by_token, routed=by_token)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_token, by_token, params_specs, copied, by_token, copied),
    out_specs=output_specs,
    # Never False: JAX would no longer know which values differ between devices, and the gradients
    # of what enters copied would be scaled silently.
    check_vma=True,
  )(x, info, params, state, keys, layer)


def _local_layer(
  x: Float[Array, 'b T D'],
  info: TokenInfo,
  params: MoeParams,
  state: dict[str, Array],
  keys: Key[Array, 'g'],
  layer: Int[Array, ''] | None,
  *,
  options: MoeOptions,
  num_groups: int,
  deterministic: bool,
  platform: str,
) -> LayerOutput:
  """Runs the layer on one device: its tokens, its experts."""
  # [b T D] -> [g S D]. A group lies whole on one device, so that routing needs no communication.
  tokens_GSD = to_groups(x, options.group_size)
  # [b T] -> [g S], through a last dimension of 1.
  info_GS = TokenInfo(*(to_groups(a[..., None], options.group_size)[..., 0] for a in info))
  router = routing.ROUTERS[options.router]
  sizes = sizes_of(options, tokens_GSD.shape[1])
  # What a router may read of the mode and the capacity is filled in here, and nowhere else.
  choice_options = dataclasses.replace(
    options.choice, capacity=sizes.capacity, training=not deterministic
  )
  # Keys belong to groups, so what is drawn for a token is the same on any mesh.
  noise_keys, choice_keys, order_keys = split_keys(keys)

  with jax.named_scope('router'):
    # In float32 whatever the model's dtype: a rounded logit selects another expert.
    router_input = tokens_GSD.astype(jnp.float32)
    # The experts read `tokens_GSD`, without this noise.
    if options.jitter and not deterministic:
      router_input = routing.jitter(router_input, noise_keys, options.jitter)
    inputs = routing.RouterInputs(router_input, *info_GS, choice_keys)
    choice = router.choose(params.router, state, inputs, choice_options)

  with jax.named_scope('plan'):
    plan = routing.make_plan(
      choice,
      info_GS.valid,
      order_keys,
      capacity=sizes.capacity,
      priority=options.priority,
      renormalize=options.choice.renormalize,
    )

  # Only Soft MoE: slots hold mixtures of tokens, and the plan serves the statistics.
  mixture = router.mix and router.mix(params.router, state, inputs, choice_options)
  weights = (params.w_in, params.w_out)
  y_GSD = _run_experts(
    tokens_GSD,
    plan,
    mixture,
    weights=weights,
    options=options,
    sizes=sizes,
    layer=layer,
    platform=platform,
  )

  with jax.named_scope('statistics'):
    scope = _balance_scopes(len(tokens_GSD), num_groups, options.balance_scopes)
    sums = routing.router_sums(choice, plan, info_GS.valid, scope, options.balance_scopes)
    # Without a capacity no slot is set aside, so none can be empty.
    if options.capacity_factor is None:
      sums = sums._replace(slots=jnp.sum(sums.kept_per_expert))
    # Before this line a device knows its own groups; losses and updates of state read totals.
    sums = _sum_over_devices(sums)

  y = from_groups(y_GSD, options.group_size)
  return LayerOutput(y, sums, *_routing_of_tokens(choice, plan, options))


def _run_experts(
  tokens: Float[Array, 'g S D'],
  plan: routing.Plan,
  mixture: Mixture | None,
  *,
  weights: tuple[Array, Array],
  options: MoeOptions,
  sizes: Sizes,
  layer: Int[Array, ''] | None,
  platform: str,
) -> Float[Array, 'g S D']:
  """Dispatches, crosses the mesh, runs this device's experts, and comes back."""
  experts = functools.partial(experts_lib.run_experts, activation=options.activation)
  if mixture is not None:
    with jax.named_scope('dispatch'):
      slots = mix_tokens(mixture, tokens)
    # All slots are filled and cross the mesh; there is no plan to follow and nothing to drop.
    outputs = dispatch_lib.through_experts(slots, weights, experts, axis_name=EXPERT_AXIS)
    with jax.named_scope('combine'):
      return mix_slots(mixture, outputs)
  if options.dispatch == dispatch_lib.DECODE:
    return dispatch_lib.run_decode(
      tokens,
      plan,
      weights,
      activation=options.activation,
      layer=layer,
      axis_name=EXPERT_AXIS,
      platform=platform,
    )
  # Where nothing is dropped, `gather` would give each expert S slots.
  gives_all_slots = options.dispatch == 'gather' and not sizes.limited
  return dispatch_lib.run_plan(
    'dropless' if gives_all_slots else options.dispatch,
    tokens,
    plan,
    weights=weights,
    experts=experts,
    axis_name=EXPERT_AXIS,
    num_selected=sizes.mean_selected,
    exchange=options.exchange,
    packs=experts_lib.should_pack(weights, platform),
  )


def sizes_of(options: MoeOptions, tokens_in_group: int) -> Sizes:
  """Returns the static sizes of a routing group of S tokens."""
  return group_sizes(
    routing.ROUTERS[options.router],
    tokens_in_group,
    num_experts=options.num_experts,
    num_selected_experts=options.num_selected_experts,
    capacity_factor=options.capacity_factor,
  )


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
  reason = dispatch_lib.why_not(options.exchange, platform)
  if options.exchange == 'ragged' and routing.ROUTERS[options.router].mix:
    reason = f'must be padded with router {options.router}, which fills every slot'
  if reason and options.dispatch != dispatch_lib.DECODE:
    raise ValueError(f'exchange={options.exchange!r}: {reason}')


def _balance_scopes(local_groups: int, num_groups: int, num_scopes: int) -> Int[Array, 'g parts']:
  """Returns the scope of the load-balancing loss that each part of each local group is in.

  A scope holds whole groups, or, where there are as many scopes as sequences, a group has several
  parts, each in a scope of its own. Scopes are numbered over the whole batch.
  """
  # One part a group, unless scopes are sequences: then as many as a group has. Parts that follow
  # one another share a scope.
  device = jax.lax.axis_index(BATCH_AXES)
  parts = -(-num_scopes // num_groups)
  part = device * local_groups * parts + jnp.arange(local_groups * parts)
  return part.reshape(local_groups, parts) // (num_groups * parts // num_scopes)


def _sum_over_devices(sums: routing.RouterSums) -> routing.RouterSums:
  """Sums over all devices by one psum, the largest logit, too: each device has an entry."""
  # A pmax would be a second collective. Here the maximum travels with the sums, each device's in
  # an entry of its own, [devices].
  own = jnp.arange(jax.lax.axis_size(BATCH_AXES)) == jax.lax.axis_index(BATCH_AXES)
  largest = jnp.where(own, sums.logsumexp_max, 0.0)
  total, largest = jax.lax.psum((sums, largest), BATCH_AXES)
  return total._replace(logsumexp_max=jnp.max(largest))


def _routing_of_tokens(
  choice: routing.Choice, plan: routing.Plan, options: MoeOptions
) -> tuple[Int[Array, 'b T K'] | None, TokenRouting | None]:
  """Returns the two optional outputs of `LayerOutput`: choices and routed."""
  experts = jnp.where(plan.requested, plan.expert_index, -1)
  choices, routed = None, None
  if options.returns_choices:
    choices = from_groups(experts, options.group_size)
  if options.returns_routing:
    grouped = TokenRouting(choice.router_probs, experts, plan.combine_weights, plan.keep)
    routed = TokenRouting(*(from_groups(a, options.group_size) for a in grouped))
  return choices, routed
