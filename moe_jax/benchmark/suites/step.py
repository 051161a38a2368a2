"""The parts of a training step as shares of its time, and its wait for data.

Examples:
  python -m moe_jax.benchmark step --config=configs/debug.py
  python -m moe_jax.benchmark step --config=configs/debug.py --config.moe.num_experts=4 --json
"""

from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.benchmark.harness import command
from moe_jax.benchmark.harness.command import FLAGS

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  cli.define_config_flag()
  flags.DEFINE_integer('steps', 20, 'real steps with the data pipeline.', lower_bound=1)
  command.add_profile_flag()


def run() -> None:
  """Measures and prints."""
  config, profile = cli.config(), command.profile()
  from moe_jax.benchmark.suites import step_rows

  rows = (step_rows.shares(c, FLAGS.rounds, FLAGS.steps, profile) for c in [config])
  command.show(rows, lambda row: text(row, FLAGS.steps))


def text(row: dict[str, Any], steps: int) -> str:
  """Returns a line for each part.

  Args:
    row: of `step_rows.shares`.
    steps: that were done with the data pipeline.
  """
  lines = [
    f'{name:<12}{row[name]:>7.1%} of a step' for name in ('forward', 'backward', 'optimizer')
  ]
  lines.append(f'{"data wait":<12}{row["data_wait"]:>7.2%} of the time of {steps} real steps')
  return '\n'.join([*lines, f'compilations of the step: {row["compilations"]}'])
