"""The exchange between the devices of a mesh axis, each of which holds its own experts.

Called inside `jax.shard_map`. Before: every device holds slots for ALL experts, filled from its own
groups. After: every device holds the slots of ITS experts, filled from all devices of the axis.

          device 0   device 1                     device 0       device 1
  expert 0   a          c       to_experts          a c
  expert 1   b          d      ------------>                       b d

A buffer crosses by one of two exchanges, with the same result bit for bit:

  padded  `to_experts`, `from_experts`: every slot, by a tiled all-to-all
  ragged  `send_slices`, along `slices_of`: of each expert and group the slots up to the last that
          holds a token, by `jax.lax.ragged_all_to_all`, which XLA has only for GPUs and TPUs

When decoding, tokens are fewer than slots would be: `to_everyone` gives each device the tokens of
all, and `sum_of_parts` adds up what the devices' experts made of each token.

One-letter dimensions: E experts, G routing groups, S tokens of a group, C slots of an expert, D
embed, R devices of the axis, N rows of a buffer, K = E G slices, X rows for each device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe_jax.routing.router import varying_like

EXCHANGES = ('padded', 'ragged')
# As JAX names them. XLA on CPUs: "UNIMPLEMENTED: HLO opcode ragged-all-to-all".
RAGGED_PLATFORMS = ('gpu', 'tpu')


def why_not(way: str, platform: str) -> str | None:
  """Returns why a platform cannot run one of `EXCHANGES`; None if it can."""
  if way == 'padded' or platform in RAGGED_PLATFORMS:
    return None
  return f'must be padded on {platform}: XLA has no ragged all-to-all there, only on GPUs and TPUs'


class Slices(NamedTuple):
  """The arguments of `jax.lax.ragged_all_to_all`: K = E * G slices, in order of the other device.

  Attributes:
    input_offsets: first row of each slice that is sent.
    send_sizes: rows in it.
    output_offsets: its first row where it arrives.
    recv_sizes: rows of each slice that arrives.
  """

  input_offsets: Int[Array, 'K']
  send_sizes: Int[Array, 'K']
  output_offsets: Int[Array, 'K']
  recv_sizes: Int[Array, 'K']


def slices_of(
  filled: Int[Array, 'E G'],
  received: Int[Array, 'E G'],
  capacity: int,
  device: int | Int[Array, ''],
  num_devices: int,
) -> tuple[Slices, Slices]:
  """Returns the slices that one device sends and receives towards the experts, and back.

  Rows are those of the flat buffers: [E * G * C] before, [E_local * (R * G) * C] at the experts.

  Args:
    filled: slots that this device fills, of each expert and group, from slot 0 on.
    received: the same of every device for the experts here, [R * E_local, G]: `swap(filled)`.
    capacity: C.
    device: this one's index along the axis.
    num_devices: R.
  """
  num_experts, groups = filled.shape
  # Experts on each device. Slice (e, g) is one expert's slots of one group, filled from the first
  # on, so an offset and a number of rows describe it.
  each = num_experts // num_devices
  expert, group = jnp.arange(num_experts)[:, None], jnp.arange(groups)[None, :]
  # Of slices for others: row e here, and at its device behind those of devices before this one.
  home = (expert * groups + group) * capacity
  away = (((expert % each) * num_devices + device) * groups + group) * capacity
  # Of slices of others, device by device: row here, and where they came from.
  here = (((expert % each) * num_devices + expert // each) * groups + group) * capacity
  origin = ((device * each + expert % each) * groups + group) * capacity
  there = Slices(*(a.ravel() for a in (home, filled, away, received)))
  back = Slices(*(a.ravel() for a in (here, received, origin, filled)))
  return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def send_slices(
  axis_name: str, rows: Float[Array, 'N D'], there: Slices, back: Slices
) -> Float[Array, 'N D']:
  """Sends slices of rows to other devices of the axis; where none arrives, rows are zero.

  Its gradient is one such exchange, too. JAX's own also makes the gradient of what was in the rows
  before, which is of no use here.

  Args:
    axis_name: of the mesh.
    rows: of a flat buffer; what lies outside the slices stays behind.
    there: the slices.
    back: the slices that return them.
  """
  nothing = varying_like(jnp.zeros(rows.shape, rows.dtype), rows)
  return jax.lax.ragged_all_to_all(rows, nothing, *there, axis_name=axis_name)


def _send_slices_fwd(axis_name, rows, there, back):
  return send_slices(axis_name, rows, there, back), (there, back)


def _send_slices_bwd(axis_name, residuals, grad):
  there, back = residuals
  return send_slices(axis_name, grad, back, there), None, None


send_slices.defvjp(_send_slices_fwd, _send_slices_bwd)


def to_experts(
  expert_inputs: Float[Array, 'E G C D'], axis_name: str
) -> Float[Array, 'E_local G_axis C D']:
  """Sends each expert's slots to the device that holds the expert: one tiled all-to-all.

  Returns:
    E / R experts and R * G groups in order of the sending device, R the size of the axis.
  """
  return jax.lax.all_to_all(expert_inputs, axis_name, split_axis=0, concat_axis=1, tiled=True)


def from_experts(
  expert_outputs: Float[Array, 'E_local G_axis C D'], axis_name: str
) -> Float[Array, 'E G C D']:
  """Sends each slot back to the device it came from: the inverse of `to_experts`."""
  return jax.lax.all_to_all(expert_outputs, axis_name, split_axis=1, concat_axis=0, tiled=True)


def swap(rows: Shaped[Array, 'R_X D'], axis_name: str) -> Shaped[Array, 'R_X D']:
  """Sends part r of R equal parts of the rows to device r: its own inverse."""
  return jax.lax.all_to_all(rows, axis_name, split_axis=0, concat_axis=0, tiled=True)


def to_everyone(x: Shaped[Array, 'G *rest'], axis_name: str) -> Shaped[Array, 'G_axis *rest']:
  """Returns the groups of all devices of the axis, in order of the device."""
  return jax.lax.all_gather(x, axis_name, axis=0, tiled=True)


def sum_of_parts(y: Float[Array, 'G_axis S D'], axis_name: str) -> Float[Array, 'G S D']:
  """Sums the devices' parts and gives each device its own groups: the inverse of `to_everyone`."""
  return jax.lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)
