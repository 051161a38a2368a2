"""Moving tokens, and the experts' matmuls, under a given routing, against dense and peers.

The arms: this package's dispatchers, one-hot matmuls among them, lax.ragged_dot, only the batched
matmuls, and a copy of the same bytes.

Examples:
  python -m moe_jax.benchmark dispatch
  python -m moe_jax.benchmark dispatch --arms=gather,dropless --routings=uniform --reuse_memory
  python -m moe_jax.benchmark dispatch --routings=trace --workdir=runs/NAME --json
"""

from typing import Any

from absl import flags

from moe_jax import cli
from moe_jax.benchmark.harness import command, names, parsers, tables
from moe_jax.benchmark.harness.command import FLAGS
from moe_jax.benchmark.harness.shape import with_tokens_per_expert
from moe_jax.benchmark.harness.tables import Ratio
from moe_jax.errors import UserError

flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of this suite."""
  command.add_layer_flags('8,64,256,1024', tokens='tokens of one routing group.')
  command.add_activation_flag()
  command.add_tokens_per_expert_flag()
  routings = parsers.names(names.ROUTINGS)
  text = f'which; {names.TRACE} needs --workdir.'
  command.add_list('routings', routings, ','.join(names.DRAWN), text)
  cli.define_path('workdir', f'run whose routing {names.TRACE} is; num_experts is its E.')
  cli.define_path('data_dir', "where the data of that run is kept; the run's by default.")
  command.add_list(
    'arms',
    parsers.names((*names.ARMS, names.TOKAMAX)),
    ','.join(names.ARMS),
    'which, next to dense and only the matmuls; those over 20 times dense are left out; also '
    f'{names.TOKAMAX}, if that package is there.',
  )
  text = 'also time grouped_mm of torch and transformers, which must be there.'
  flags.DEFINE_bool('peers', False, text)
  command.add_reuse_memory_flag()


def run() -> None:
  """Measures and prints."""
  shape, num_experts, each = command.shape(), command.num_experts(), command.tokens_per_expert()
  if names.TRACE in FLAGS.routings:
    cli.required(FLAGS['workdir'])
  else:
    for flag in (FLAGS['workdir'], FLAGS['data_dir']):
      if flag.value is not None:
        raise UserError(f'--{flag.name}', flag.value, f'only read with --routings={names.TRACE}')
  from moe_jax.benchmark.harness import peers, routings
  from moe_jax.benchmark.suites import dispatch_rows

  trace = None
  if names.TRACE in FLAGS.routings:
    most = with_tokens_per_expert(shape, each, max(num_experts))
    trace = routings.record(FLAGS.workdir, most.num_tokens, FLAGS.data_dir)
    if not FLAGS['num_experts'].present:
      num_experts = [trace.num_experts]
  # Before anything is measured: they refuse if their package is not installed.
  if FLAGS.peers:
    peers.libraries()
  if names.TOKAMAX in FLAGS.arms:
    peers.tokamax_ragged_dot()
  rows = dispatch_rows.rows(
    shape,
    num_experts=num_experts,
    routings=FLAGS.routings,
    arms=FLAGS.arms,
    tokens_per_expert=each,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    trace=trace,
    peers=FLAGS.peers,
    reuse_memory=FLAGS.reuse_memory,
  )
  command.show(rows, line)


def line(row: dict[str, Any]) -> str:
  """Returns a line for the routing, one for each arm, and those of the peers."""
  lines = [
    f'E={row["num_experts"]} {row["routing"]} {row["pass"]}: {row["num_tokens"]} tokens, '
    f'{tables.load(row)}, dense {row["dense_milliseconds"]:,.1f} ms, null {Ratio(**row["null"])}'
    f'{tables.invalid(row)}'
  ]
  peers = row['peers']
  for name, arm in row['arms'].items():
    ahead = ''
    if peers and name in peers['ours']:
      ahead = f'grouped_mm/arm {Ratio(**peers["ours"][name])!s:<20} '
    lines.append(
      f'  {name:<12}dense/arm {Ratio(**arm["eta_dense"])!s:<20}matmuls/arm '
      f'{Ratio(**arm["eta_bmm"])!s:<20}excess {arm["excess"]:<6.2f}balanced/arm '
      f'{Ratio(**arm["eta_balanced"])!s:<20}excess {arm["excess_balanced"]:<6.2f}'
      f'{arm["milliseconds"]:>9,.1f} ms  {ahead}{tables.program(arm)}'
    )
  lines += [f'  {name:<12}not measured: {why}' for name, why in row['not_measured'].items()]
  if peers:
    lines.append(
      f'  {"grouped_mm":<12}dense/arm {Ratio(**peers["eta_dense"])!s:<20}{"":<92}'
      f'{peers["milliseconds"]:>9,.1f} ms  in {peers["versions"]}; its dense '
      f'{peers["dense_milliseconds"]:,.1f} ms, null {Ratio(**peers["null"])}'
      f'{tables.invalid(peers)}'
    )
  return '\n'.join(lines)
