"""Selecting and planning, as a share of the experts' matmuls.

Examples:
  python -m moe_jax.benchmark router
  python -m moe_jax.benchmark router --routers=top_k,expert_choice --num_experts=64 --json
  python -m moe_jax.benchmark router --router_dtype=bfloat16
"""

from typing import Any

from absl import flags

from moe_jax import router_options
from moe_jax.benchmark.harness import command, parsers, tables
from moe_jax.benchmark.harness.command import FLAGS

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  command.add_layer_flags('8,64,256,1024', tokens='tokens of one routing group.')
  known = router_options.router_names()
  command.add_list('routers', parsers.names(known), ','.join(known), 'which.')
  dtypes = ['float32', 'bfloat16']
  flags.DEFINE_enum('router_dtype', 'float32', dtypes, 'moe.router_dtype.')


def run() -> None:
  """Measures and prints."""
  num_experts = command.num_experts()
  from moe_jax.benchmark.suites import router_rows

  rows = router_rows.rows(
    num_experts=num_experts,
    num_tokens=FLAGS.num_tokens,
    embed_dim=FLAGS.embed_dim,
    mlp_dim=FLAGS.mlp_dim,
    num_selected_experts=FLAGS.num_selected_experts,
    capacity_factor=FLAGS.capacity_factor,
    dtype=FLAGS.dtype,
    routers=FLAGS.routers,
    router_dtype=FLAGS.router_dtype,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
  )
  command.show(rows, line)


def line(row: dict[str, Any]) -> str:
  """Returns a line."""
  head = f'E={row["num_experts"]:<5} {row["router"]:<15}'
  if 'not_measured' in row:
    return f'{head} not measured: {row["not_measured"]}'
  share = row['share']
  load = '' if row['tokens_per_expert'] is None else f'{tables.load(row)}, '
  if row['disagreement'] is not None:
    load = f'{row["disagreement"]:.2%} of choices differ from float32, {load}'
  return (
    f'{head}{share["median"]:>8.1%} [{share["low"]:.1%}, {share["high"]:.1%}] of the matmuls; '
    f'{load}{tables.program(row)}{tables.invalid(row)}'
  )
