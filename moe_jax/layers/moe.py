"""The mixture-of-experts layer: one `shard_map` with router, capacity and dispatch inside.

  x -> [router -> plan -> dispatch -> all_to_all -> own experts -> all_to_all -> combine] -> y, sums

Each device routes its own tokens and computes only its own experts. Gradients are taken OUTSIDE the
`shard_map`, with `check_vma=True`: JAX then inserts every cross-device sum of the backward pass.
Taking them inside, or with `check_vma=False`, needs psums by hand and silently scales gradients.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Key, Shaped

from moe_jax import dispatch as dispatch_room
from moe_jax import routing
from moe_jax.layers import basic
from moe_jax.parallel.mesh import BATCH_AXES, DATA_AXIS, EXPERT_AXIS


@dataclasses.dataclass(frozen=True)
class MoeOptions:
  """Every choice of a MoE layer, as plain numbers and names; see `moe_jax.config` for each.

  `capacity_factor` None never drops a token. `group_size` is in sequences. `balance_scopes` is the
  number of scopes of the load-balancing loss in the batch, a divisor of its number of groups.
  """

  num_experts: int
  num_selected_experts: int
  mlp_dim: int
  activation: str
  capacity_factor: float | None
  softmax_order: str
  renormalize: str
  jitter: float
  priority: str
  group_size: int
  balance_scopes: int
  dispatch: str
  router_init_scale: float


class MoeParams(NamedTuple):
  """Weights of one layer; `None` never occurs."""

  router: Float[Array, 'D E']
  w_in: Float[Array, 'E D F1']
  w_out: Float[Array, 'E F D']


def moe_layer(
  x: Float[Array, 'B T D'],
  valid: Bool[Array, 'B T'],
  params: MoeParams,
  keys: Key[Array, 'G'],
  mesh: Mesh,
  options: MoeOptions,
  deterministic: bool,
) -> tuple[Float[Array, 'B T D'], routing.RouterSums]:
  """Routes every token to its experts and back.

  Args:
    x: normalised input, sharded over ('data', 'expert') along the batch.
    valid: False for padding: no slot, no statistics, output 0.
    params: expert weights are sharded over 'expert', the router's copied.
    keys: one per routing group of the whole batch.
    mesh: axes ('data', 'expert').
    options: static choices.
    deterministic: no jitter.

  Returns:
    The experts' weighted outputs, and sums over all tokens of all devices.

  Raises:
    ValueError: if the mesh does not divide the experts, or mesh and groups the batch.
  """
  num_groups = _num_groups(x.shape[0], mesh, options)

  def local(x, valid, params, keys):
    return _local_layer(x, valid, params, keys, options, num_groups, deterministic)

  by_token = PartitionSpec(BATCH_AXES)
  by_expert = PartitionSpec(EXPERT_AXIS)
  of_params: tuple[Any, ...] = (PartitionSpec(), by_expert, by_expert)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_token, by_token, MoeParams(*of_params), by_token),
    out_specs=(by_token, PartitionSpec()),
    check_vma=True,
  )(x, valid, params, keys)


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
  if num_groups % options.balance_scopes:
    raise ValueError(
      f'balance_scopes={options.balance_scopes}: does not divide {num_groups} routing groups'
    )
  return num_groups


def _local_layer(
  x: Float[Array, 'b T D'],
  valid: Bool[Array, 'b T'],
  params: MoeParams,
  keys: Key[Array, 'g'],
  options: MoeOptions,
  num_groups: int,
  deterministic: bool,
) -> tuple[Float[Array, 'b T D'], routing.RouterSums]:
  """The layer on one device: its tokens, its experts."""
  tokens_GSD = to_groups(x, options.group_size)
  valid_GS = to_groups(valid[..., None], options.group_size)[..., 0]
  local_groups, tokens_in_group, _ = tokens_GSD.shape

  noise_keys, order_keys = jax.vmap(jax.random.split, out_axes=1)(keys)

  router_input = tokens_GSD.astype(jnp.float32)
  if options.jitter and not deterministic:
    router_input = routing.jitter(router_input, noise_keys, options.jitter)
  # float32 at full precision: a rounded logit sends a token to another expert.
  router_logits = jnp.einsum('gsd,de->gse', router_input, params.router, precision='highest')
  choice = routing.choose_top_k(
    router_logits,
    num_selected_experts=options.num_selected_experts,
    softmax_order=options.softmax_order,
    renormalize=options.renormalize,
  )
  plan = routing.make_plan(
    choice,
    valid_GS,
    order_keys,
    capacity=group_capacity(options, tokens_in_group),
    priority=options.priority,
    renormalize=options.renormalize,
  )

  dispatcher = dispatch_room.DISPATCHERS[options.dispatch]
  expert_inputs = dispatcher.dispatch(tokens_GSD, plan)
  exchanged = dispatch_room.to_experts(expert_inputs, EXPERT_AXIS)
  expert_outputs = run_experts(exchanged, params, options.activation)
  returned = dispatch_room.from_experts(expert_outputs, EXPERT_AXIS)
  y = from_groups(dispatcher.combine(returned, plan), options.group_size)

  device = jax.lax.axis_index(BATCH_AXES)
  group = device * local_groups + jnp.arange(local_groups)
  scope = group // (num_groups // options.balance_scopes)
  sums = routing.router_sums(
    router_logits, choice.router_probs, plan, valid_GS, scope, options.balance_scopes
  )
  return y, jax.lax.psum(sums, BATCH_AXES)


def group_capacity(options: MoeOptions, tokens_in_group: int) -> int:
  """Returns C: at most the S slots one expert can fill, and S when nothing may be dropped."""
  if options.capacity_factor is None:
    return tokens_in_group
  capacity = routing.expert_capacity(
    tokens_in_group, options.num_experts, options.num_selected_experts, options.capacity_factor
  )
  return min(capacity, tokens_in_group)


def to_groups(x: Shaped[Array, 'b T D'], group_size: int) -> Shaped[Array, 'g S D']:
  """Puts `group_size` sequences into each group, position by position: S index t * n + sequence.

  Order of position first makes the `token` priority causal for each sequence and fair to all.
  """
  batch, length, width = x.shape
  grouped = x.reshape(batch // group_size, group_size, length, width)
  return grouped.swapaxes(1, 2).reshape(batch // group_size, length * group_size, width)


def from_groups(x: Float[Array, 'g S D'], group_size: int) -> Float[Array, 'b T D']:
  """The inverse of `to_groups`."""
  groups, tokens, width = x.shape
  length = tokens // group_size
  split = x.reshape(groups, length, group_size, width)
  return split.swapaxes(1, 2).reshape(groups * group_size, length, width)


def run_experts(
  expert_inputs: Float[Array, 'E G C D'], params: MoeParams, activation: str
) -> Float[Array, 'E G C D']:
  """Runs each expert on its own slots, as two batched products."""
  experts, groups, capacity, width = expert_inputs.shape
  rows = expert_inputs.reshape(experts, groups * capacity, width)
  hidden = jnp.einsum('ecd,edf->ecf', rows, params.w_in.astype(rows.dtype))
  hidden = basic.activate(hidden, activation)
  outputs = jnp.einsum('ecf,efd->ecd', hidden, params.w_out.astype(rows.dtype))
  return outputs.reshape(expert_inputs.shape)


class Moe(nn.Module):
  """Holds the weights of a MoE layer.

  Attributes:
    options: every choice of the layer.
    mesh: axes ('data', 'expert').
  """

  options: MoeOptions
  mesh: Mesh

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B T D'], valid: Bool[Array, 'B T'], deterministic: bool
  ) -> tuple[Float[Array, 'B T D'], routing.RouterSums]:
    """Returns the output and the router's sums; see `moe_layer`."""
    options = self.options
    embed_dim = x.shape[-1]
    columns = basic.hidden_dim(options.mlp_dim, options.activation)
    experts = options.num_experts
    router_init = nn.initializers.variance_scaling(
      options.router_init_scale, 'fan_in', 'truncated_normal'
    )
    params = MoeParams(
      router=self.param(
        'router', basic.logical(router_init, 'embed', 'router'), (embed_dim, experts), jnp.float32
      ),
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
    # Evaluation needs no key: what a policy draws there is drawn from a fixed one, so that the same
    # text always gives the same number.
    key = jax.random.key(0) if deterministic else self.make_rng('routing')
    keys = jax.random.split(key, x.shape[0] // options.group_size)
    return moe_layer(x, valid, params, keys, self.mesh, options, deterministic)
