"""Expert parallelism: the layer over a mesh against one device, and the bytes it exchanges.

Examples:
  XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m moe_jax.benchmark ep
  python -m moe_jax.benchmark ep --meshes=1x8,4x2 --num_experts=64 --json
"""

import re
from typing import Any

from absl import flags

from moe_jax.benchmark.harness import command, parsers, tables
from moe_jax.benchmark.harness.command import FLAGS
from moe_jax.benchmark.harness.tables import Ratio

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  tokens = 'tokens, in as many routing groups as the largest mesh has devices.'
  command.add_layer_flags('8,64', tokens=tokens)
  command.add_activation_flag()
  meshes = parsers.ListOf(_mesh, 'of the form DATAxEXPERT,...')
  command.add_list('meshes', meshes, '1x8,2x4', 'data x expert of each.')


def _mesh(word: str) -> str:
  if not re.fullmatch(r'[1-9]\d*x[1-9]\d*', word):
    raise ValueError
  return word


def run() -> None:
  """Measures and prints."""
  num_experts = command.num_experts()
  from moe_jax.benchmark.suites import ep_rows

  rows = ep_rows.rows(
    command.shape(),
    num_experts=num_experts,
    meshes=[(int(data), int(expert)) for data, expert in (m.split('x') for m in FLAGS.meshes)],
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
  )
  command.show(rows, line)


def line(row: dict[str, Any]) -> str:
  """Returns a line."""
  sent = ', '.join(f'{size / 1e6:.2f}' for size in row['exchanged_bytes']) or 'nothing'
  return (
    f'E={row["num_experts"]:<4} data={row["mesh"][0]} expert={row["mesh"][1]} {row["pass"]:<17}'
    f'one device / mesh {Ratio(**row["speed"])}, null {Ratio(**row["null"])}, MB sent by each '
    f'device: {sent} (formula {row["formula_bytes"] / 1e6:.2f} each), {tables.load(row)}, '
    f'{tables.program(row)}{tables.invalid(row)}'
  )
