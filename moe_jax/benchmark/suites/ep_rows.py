"""The MoE layer over a mesh against the same work on one device, and the bytes it exchanges."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.benchmark.harness.cases import (
  ROUTER_INIT_SCALE,
  expert_weights,
  load_statistics,
  options_of,
  timed,
)
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.benchmark.harness.timing import Compiled, compile_arm, is_invalid, measure, ratio
from moe_jax.errors import UserError
from moe_jax.layers.moe_layer import moe_layer
from moe_jax.layers.moe_options import MoeOptions, TokenInfo
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import sharding

_ITEM_BYTES = {'f32': 4, 'bf16': 2}


def rows(
  shape: Shape,
  *,
  num_experts: Sequence[int],
  meshes: Sequence[tuple[int, int]],
  rounds: int,
  seed: int,
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts on each mesh, forward and forward + backward.

  The tokens are as many routing groups as the largest mesh has devices, whatever the mesh.

  Args:
    shape: of all rows; its tokens are those of all devices.
    num_experts: values of E.
    meshes: (data, expert) of each.
    rounds: of interleaved calls.
    seed: of weights, inputs and orders.

  Yields:
    num_experts, mesh, pass, speed (time of one device / time of the mesh), null, void,
    exchanged_bytes (that a device sends in each exchange, read from the program before it is
    compiled), formula_bytes, tokens x K x effective capacity factor x D x bytes x (1 - 1 / R), the
    load (`cases.load_statistics`, tokens_per_expert of one group), compile_seconds and
    temporary_bytes.

  Raises:
    UserError: if there are too few devices for a mesh.
  """
  groups = max(data * expert for data, expert in meshes)
  if groups > jax.device_count():
    raise UserError('--meshes', meshes, f'need {groups} devices, found {jax.device_count()}')
  for experts in num_experts:
    for mesh in meshes:
      for backward in (False, True):
        yield _row(shape, experts, mesh, groups, backward, rounds, seed)


def exchanged_bytes(text: str) -> list[float]:
  """Returns the bytes that a device sends in each all-to-all of a program in StableHLO.

  Of a compiled program they could not be read: XLA on CPUs widens bfloat16 there.
  """
  found = []
  pattern = r'stablehlo\.all_to_all.*?split_count = (\d+).*?\(tensor<([\dx]+)x(f32|bf16)>\)'
  for parts, dims, kind in re.findall(pattern, text):
    size = math.prod(int(n) for n in dims.split('x')) * _ITEM_BYTES[kind]
    # One part of R stays on the device.
    found.append(size * (1 - 1 / int(parts)))
  return found


def _row(
  shape: Shape,
  num_experts: int,
  mesh: tuple[int, int],
  groups: int,
  backward: bool,
  rounds: int,
  seed: int,
) -> dict[str, Any]:
  options = options_of(shape, num_experts, 'gather')
  one, _, _ = _arm(shape, options, (1, 1), groups, backward, seed)
  again, _, _ = _arm(shape, options, (1, 1), groups, backward, seed)
  many, text, counts = _arm(shape, options, mesh, groups, backward, seed)
  sums = counts()
  seconds = measure({'one': one.call, 'again': again.call, 'many': many.call}, rounds, seed)
  null = ratio(seconds['one'], seconds['again'])
  tokens = shape.num_tokens // groups
  capacity = routing.expert_capacity(
    tokens, num_experts, shape.num_selected_experts, shape.capacity_factor
  )
  load = load_statistics(sums.tokens_per_expert, int(sums.kept_per_expert.sum()), int(sums.slots))
  assert load['tokens_per_expert'] is not None
  # tokens x K x effective factor, of the groups of a device.
  slots = num_experts * capacity * groups / math.prod(mesh)
  itemsize = jnp.dtype(shape.dtype).itemsize
  return {
    'num_experts': num_experts,
    'mesh': list(mesh),
    'pass': 'forward+backward' if backward else 'forward',
    'speed': ratio(seconds['one'], seconds['many'])._asdict(),
    'null': null._asdict(),
    'void': is_invalid(null),
    'exchanged_bytes': exchanged_bytes(text),
    'formula_bytes': slots * shape.embed_dim * itemsize * (1 - 1 / mesh[1]),
    **load,
    'tokens_per_expert': load['tokens_per_expert'] / groups,
    'compile_seconds': many.compile_seconds,
    'temporary_bytes': many.temporary_bytes,
  }


def _arm(
  shape: Shape,
  options: MoeOptions,
  sizes: tuple[int, int],
  groups: int,
  backward: bool,
  seed: int,
) -> tuple[Compiled, str, Callable[[], routing.RouterSums]]:
  """Returns the layer on a mesh, compiled; its program before that; a call for its router sums."""
  mesh = make_mesh(*sizes)
  keys = jax.random.split(jax.random.key(seed), 4)

  def put(array: jax.Array, *dims: str) -> jax.Array:
    return jax.device_put(array, sharding(mesh, *dims))

  params = expert_weights(keys[0], shape, options.num_experts)
  router = jax.random.normal(keys[1], (shape.embed_dim, options.num_experts))
  params = params._replace(
    router={'router': put(router * (ROUTER_INIT_SCALE / shape.embed_dim) ** 0.5)},
    w_in=put(params.w_in, 'expert'),
    w_out=put(params.w_out, 'expert'),
  )
  sequences = (groups, shape.num_tokens // groups)
  x = jax.random.normal(keys[2], (*sequences, shape.embed_dim), jnp.dtype(shape.dtype))
  positions = jnp.zeros(sequences, jnp.int32)
  info = TokenInfo(jnp.ones(sequences, bool), positions, positions)
  group_keys = jax.random.split(keys[3], groups)

  def layer(params, x):
    return moe_layer(
      x, info, params, state={}, keys=group_keys, mesh=mesh, options=options, deterministic=True
    )

  function = timed(lambda params, x: layer(params, x).y, backward)
  arguments = params, put(x, 'batch')
  with jax.set_mesh(mesh):
    text = jax.jit(function).lower(*arguments).as_text()
    return compile_arm(function, *arguments), text, lambda: jax.jit(layer)(*arguments).sums
