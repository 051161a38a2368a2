"""Single tokens that meet many experts: tokens per second, against dense.

For the implementations of the experts by themselves, and for whole decoding steps.

Examples:
  python -m moe_jax.benchmark decode
  python -m moe_jax.benchmark decode --num_experts=8,64 --batches=1,16 --rounds=11
  python -m moe_jax.benchmark decode --num_layers=0 --json
"""

from typing import Any

from absl import flags

from moe_jax.benchmark.harness import command, parsers, tables
from moe_jax.benchmark.harness.command import FLAGS
from moe_jax.benchmark.harness.tables import Ratio

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  command.add_layer_flags('8,64,256')
  command.add_activation_flag()
  command.add_list('batches', parsers.numbers(1), '1,16,256', 'sequences at a time.')
  flags.DEFINE_integer('num_layers', 4, 'of the model; 0 leaves it out.', lower_bound=0)
  command.add_profile_flag()


def run() -> None:
  """Measures and prints."""
  num_experts, profile = command.num_experts(), command.profile()
  from moe_jax.benchmark.suites import decode_rows

  rows = decode_rows.rows(
    command.shape(),
    batches=FLAGS.batches,
    num_experts=num_experts,
    num_layers=FLAGS.num_layers,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    profile=profile,
  )
  command.show(rows, line)


def line(row: dict[str, Any]) -> str:
  """Returns a line for the layer or the model at one batch, and one for each arm."""
  chosen = row['experts_chosen']
  lines = [
    f'E={row["num_experts"]} batch={row["batch"]} {row["level"]}: decode is {row["way"]} with '
    f'{row["rows_in_block"]} rows in a block{f", {chosen} experts chosen" if chosen else ""}, null '
    f'{Ratio(**row["null"])}{tables.invalid(row)}'
  ]
  for name, arm in row['arms'].items():
    size = arm['weight_bytes']
    weights = f', {size / 1e6:,.1f} MB of experts read' if size is not None else ''
    lines.append(
      f'  {name:<12}{arm["tokens_per_second"]:>10,.1f} tokens/s   dense/arm '
      f'{Ratio(**arm["eta_dense"])!s:<20}{tables.program(arm)}{weights}'
    )
  lines += [f'  {name:<12}not measured: {why}' for name, why in row['not_measured'].items()]
  return '\n'.join(lines)
