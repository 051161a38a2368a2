"""Prints mesh overrides that fit the devices found, or nothing if the config's own mesh fits.

For ./launch/quickstart alone: every other command takes the mesh of its config as it is.
"""

import jax

from configs import quickstart


def overrides(num_devices: int) -> str:
  """Returns `--config.mesh...` flags for a number of devices, '' where the config's mesh fits.

  The largest power of two that divides the batch is used, experts first.
  """
  config = quickstart.get_config()
  if config.mesh.data * config.mesh.expert <= num_devices:
    return ''
  used = 1
  while used * 2 <= num_devices and config.data.batch_size % (used * 2) == 0:
    used *= 2
  expert = min(used, config.moe.num_experts)
  return f'--config.mesh.data={used // expert} --config.mesh.expert={expert}'


if __name__ == '__main__':
  print(overrides(jax.device_count()))
