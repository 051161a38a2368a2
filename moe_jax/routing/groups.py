"""Routing groups, the tokens that compete for the same slots, and the keys each group draws by.

B sequences of T tokens form G groups of S = n T tokens, n sequences each. Groups belong to the
config, never to the number of devices. D embed.
"""

import jax
from jaxtyping import Array, Key, Shaped


def to_groups(x: Shaped[Array, 'b T D'], group_size: int) -> Shaped[Array, 'g S D']:
  """Puts `group_size` sequences into each group, position by position: S index t * n + sequence.

  Order of position first makes the `token` priority causal for each sequence and fair to all.
  """
  batch, length, width = x.shape
  # [b T D] -> [g n T D] -> [g T n D] -> [g S D].
  grouped = x.reshape(batch // group_size, group_size, length, width)
  return grouped.swapaxes(1, 2).reshape(batch // group_size, length * group_size, width)


def from_groups(x: Shaped[Array, 'g S D'], group_size: int) -> Shaped[Array, 'b T D']:
  """Returns sequences; the inverse of `to_groups`."""
  groups, tokens, width = x.shape
  length = tokens // group_size
  # [g S D] -> [g T n D] -> [g n T D] -> [b T D].
  split = x.reshape(groups, length, group_size, width)
  return split.swapaxes(1, 2).reshape(groups * group_size, length, width)


def split_keys(keys: Key[Array, 'g']) -> tuple[Key[Array, 'g'], Key[Array, 'g'], Key[Array, 'g']]:
  """Returns each group's keys of jitter, of the router, and of the order of random drops."""
  # [g] -> [3 g]. Three keys, so that a router that draws changes neither jitter nor drops.
  split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
  return split[0], split[1], split[2]
