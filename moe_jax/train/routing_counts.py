"""Counts of the experts that tokens selected, kept on the devices while an evaluation runs.

One-letter dimensions: L MoE layers, E experts, K assignments of a token, V token ids, B sequences,
T positions. Every device counts its own tokens in tables of its own, in int32, without any
communication; they are added up once, at the end. So the numbers are the same on any mesh.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from moe_jax import routing
from moe_jax.models.task import Selected, Task
from moe_jax.parallel.sharding import batch_sharding, replicated, spec

# Entries of the largest table of token ids: 512 MiB on each device. A larger one is not kept.
MOST_ENTRIES = 2**27


class RoutingCounts(NamedTuple):
  """Counts over valid tokens, before any drop. Padding never counts.

  An assignment is a pair of a token and an expert that it selected, as in `router/load`: a token
  has K of them with token choice, and any number, none too, with ReMoE and expert choice; null
  experts are no experts here. On devices, each array has a dimension of devices in front.

  Attributes:
    tokens: tokens of each id, the model's input at that position.
    by_token: tokens of each id that selected each expert; None if it would be too large.
    together: tokens that selected both experts; on the diagonal, the one.
    by_number: tokens that selected 0, 1, ... E experts.
  """

  tokens: Int[Array, '*device V']
  by_token: Int[Array, '*device L V E'] | None
  together: Int[Array, '*device L E E']
  by_number: Int[Array, '*device L E1']


def why_not(task: Task) -> str:
  """Returns why there is nothing to count, '' if there is."""
  moe = task.moe
  if moe is None:
    return 'a dense model has no experts'
  if routing.ROUTERS[moe.router].keeps_all:
    return f'with router {moe.router} every token goes to every expert'
  return ''


def new_counts(task: Task) -> RoutingCounts | None:
  """Returns counts of nothing, on the devices; None if there will be nothing to count."""
  moe = task.moe
  if moe is None or why_not(task):
    return None
  num_layers, num_experts, vocab_size = task.num_moe_layers, moe.num_experts, task.vocab_size

  def zeros(*shape: int) -> Array:
    shape = (task.mesh.size, *shape)
    return jnp.zeros(shape, jnp.int32, device=batch_sharding(task.mesh))

  is_kept = num_layers * vocab_size * num_experts <= MOST_ENTRIES
  return RoutingCounts(
    tokens=zeros(vocab_size),
    by_token=zeros(num_layers, vocab_size, num_experts) if is_kept else None,
    together=zeros(num_layers, num_experts, num_experts),
    by_number=zeros(num_layers, num_experts + 1),
  )


def add_batch(
  counts: RoutingCounts,
  selected: Selected,
  mesh: Mesh,
) -> RoutingCounts:
  """Returns the counts with those of a batch; for a compiled function.

  Args:
    counts: on the devices.
    selected: experts of a batch, of `Task.loss` of a task `with_selected`.
    mesh: axes ('data', 'expert').
  """
  by_sequence = spec('batch')
  return jax.shard_map(
    _add_local,
    mesh=mesh,
    in_specs=(by_sequence, spec('layers', 'batch'), by_sequence, by_sequence),
    out_specs=by_sequence,
    check_vma=True,
  )(counts, *selected)


def _add_local(counts, choices, inputs, valid):
  ids, ones = inputs.ravel(), valid.ravel().astype(jnp.int32)
  num_layers, num_experts = counts.together.shape[1:3]

  def add_layer(layer, counts):
    is_selected = membership(choices[layer].reshape(-1, choices.shape[-1]), num_experts)
    # Sums of zeros and ones are exact in float32 up to 2**24 tokens of a batch on one device.
    narrow = is_selected.astype(jnp.float32)
    together = jnp.einsum('ne,nf->ef', narrow, narrow).astype(jnp.int32)
    by_token = counts.by_token
    if by_token is not None:
      by_token = by_token.at[0, layer, ids].add(is_selected.astype(jnp.int32))
    return counts._replace(
      by_token=by_token,
      together=counts.together.at[0, layer].add(together),
      by_number=counts.by_number.at[0, layer, jnp.sum(is_selected, -1)].add(ones),
    )

  counts = counts._replace(tokens=counts.tokens.at[0, ids].add(ones))
  return jax.lax.fori_loop(0, num_layers, add_layer, counts)


def membership(choices: Int[Array, '*shape K'], num_experts: int) -> Bool[Array, '*shape E']:
  """Returns the mask of experts that each token selected; -1 is none."""
  experts = jnp.arange(num_experts, dtype=choices.dtype)
  shape = (1,) * (choices.ndim - 1)
  return jnp.any(choices[..., None] == experts.reshape(*shape, 1, num_experts), axis=-2)


def fetch(counts: RoutingCounts, mesh: Mesh) -> RoutingCounts:
  """Returns the counts of all devices together, as NumPy arrays in int64."""
  return jax.tree.map(lambda x: np.asarray(x, np.int64), jax.device_get(_summing(mesh)(counts)))


@functools.cache
def _summing(mesh: Mesh) -> Any:
  def add_devices(counts):
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), counts)

  return jax.jit(add_devices, out_shardings=replicated(mesh))
