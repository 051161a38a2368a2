"""`jax.lax.ragged_all_to_all` out of gathers, for devices without it, from its docstring."""

import jax
import jax.numpy as jnp


def ragged_all_to_all(
  operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
  """Each device fetches the slices meant for it; NaN where sender and receiver are not agreed."""

  def of_all(x):
    return jax.lax.all_gather(x, axis_name)

  num_devices, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  each = input_offsets.size // num_devices

  def for_me(x):
    mine = jax.lax.dynamic_slice_in_dim(of_all(x), device * each, each, axis=1)
    return mine.ravel()[:, None]

  starts, sizes, places = for_me(input_offsets), for_me(send_sizes), for_me(output_offsets)
  rows = operand.shape[0]
  row = jnp.arange(rows)[None, :]
  sender = jnp.repeat(jnp.arange(num_devices), each)[:, None]
  source = jnp.where(row < sizes, sender * rows + starts + row, num_devices * rows)
  target = jnp.where(row < sizes, places + row, output.shape[0])
  sent = of_all(operand).reshape(-1, operand.shape[1])
  sent = jnp.where((sizes == recv_sizes[:, None]).all(), sent, jnp.nan)
  arrived = sent.at[source.ravel()].get(mode='fill', fill_value=jnp.nan)
  return output.at[target.ravel()].set(arrived, mode='drop')
