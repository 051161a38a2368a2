"""The MoE layer against a dense layer of the same active FLOPs and its own batched matmuls.

Examples:
  python -m moe_jax.benchmark layer
  python -m moe_jax.benchmark layer --reuse_memory --dispatch=dropless
  python -m moe_jax.benchmark layer --num_experts=8,64 --tokens_per_expert=512 --json
"""

from typing import Any

from absl import flags

from moe_jax import schema
from moe_jax.benchmark.harness import command, tables
from moe_jax.benchmark.harness.command import FLAGS
from moe_jax.benchmark.harness.tables import Ratio

HEAD = (
  f'{"E":>5} {"pass":<17}{"dense/MoE":<20}{"matmuls/MoE":<20}{"excess":<8}{"batched/MoE":<20}'
  f'{"excess":<8}{"null":<20}{"ms":>7}'
  f'{"drops":>7}{"padding":>9}{"tokens/E":>10}{"fullest":>9}{"compile s":>11}{"temporary":>11}'
)

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  command.add_layer_flags('8,64,256,1024', tokens='tokens of all routing groups.')
  command.add_activation_flag()
  dispatchers = sorted(schema.SCHEMA['moe']['dispatch'].choices)
  flags.DEFINE_enum('dispatch', 'gather', dispatchers, 'dispatcher.')
  command.add_tokens_per_expert_flag()
  text = 'routing groups that tokens are in.'
  flags.DEFINE_integer('num_groups', 1, text, lower_bound=1)
  command.add_reuse_memory_flag()
  command.add_profile_flag()


def run() -> None:
  """Measures and prints."""
  num_experts, each = command.num_experts(), command.tokens_per_expert()
  profile = command.profile()
  from moe_jax.benchmark.suites import layer_rows

  rows = layer_rows.rows(
    command.shape(),
    num_experts=num_experts,
    dispatch=FLAGS.dispatch,
    tokens_per_expert=each,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    profile=profile,
    num_groups=FLAGS.num_groups,
    reuse_memory=FLAGS.reuse_memory,
  )
  command.show(rows, line, HEAD)


def line(row: dict[str, Any]) -> str:
  """Returns a line of the table under `HEAD`."""
  names = ('eta_dense', 'eta_bmm', 'eta_batched', 'null')
  eta = {name: str(Ratio(**row[name])) for name in names}
  return (
    f'{row["num_experts"]:>5} {row["pass"]:<17}{eta["eta_dense"]:<20}{eta["eta_bmm"]:<20}'
    f'{row["excess"]:<8.2f}{eta["eta_batched"]:<20}{row["excess_batched"]:<8.2f}'
    f'{eta["null"]:<20}{row["milliseconds"]:>7,.0f}{row["drop_share"]:>7.1%}'
    f'{tables.share(row["padding"]):>9}{row["tokens_per_expert"]:>10.0f}{row["max_load"]:>8.2f}x'
    f'{row["compile_seconds"]:>11.1f}{tables.megabytes(row["temporary_bytes"]):>11}'
    f'{tables.invalid(row)}'
  )
