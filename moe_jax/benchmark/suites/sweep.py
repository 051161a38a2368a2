"""The gain of training several trials as one program.

Examples:
  python -m moe_jax.benchmark sweep --config=configs/debug.py
  python -m moe_jax.benchmark sweep --config=configs/debug.py --num_trials=2,8 --json
"""

from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.benchmark.harness import command, parsers, tables
from moe_jax.benchmark.harness.command import FLAGS
from moe_jax.benchmark.harness.tables import Ratio

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  cli.define_config_flag()
  command.add_list('num_trials', parsers.numbers(2), '2,4,8', 'trials in a pack.')
  flags.DEFINE_integer('seed', 0, 'of tokens and orders.')


def run() -> None:
  """Measures and prints."""
  config = cli.config()
  from moe_jax.benchmark.suites import sweep_rows

  command.show(sweep_rows.rows(config, FLAGS.num_trials, FLAGS.rounds, FLAGS.seed), line)


def line(row: dict[str, Any]) -> str:
  """Returns a line."""
  return (
    f'{row["num_trials"]:>3} trials: one by one / packed {Ratio(**row["gain"])}, null '
    f'{Ratio(**row["null"])}{tables.invalid(row)}'
  )
