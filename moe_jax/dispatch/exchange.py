"""The exchange between the devices of a mesh axis, each of which holds its own experts.

Called inside `jax.shard_map`. Before: every device holds slots for ALL experts, filled from its own
groups. After: every device holds the slots of ITS experts, filled from all devices of the axis.

          device 0   device 1                     device 0       device 1
  expert 0   a          c       to_experts          a c
  expert 1   b          d      ------------>                       b d

When decoding, tokens are fewer than slots would be: `to_everyone` gives each device the tokens of
all, and `sum_of_parts` adds up what the devices' experts made of each token.
"""

import jax
from jaxtyping import Array, Float, Shaped


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
  """Sums the devices' parts and gives each device its own groups: the way back."""
  return jax.lax.psum_scatter(y, axis_name, scatter_dimension=0, tiled=True)
