"""Rows of the benchmarks as lines to read."""

from typing import Any

from moe_jax.benchmark.timing import Ratio

LAYER_HEAD = (
  f'{"E":>5} {"pass":<17}{"dense/MoE":<20}{"products/MoE":<20}{"excess":<8}{"batched/MoE":<20}'
  f'{"excess":<8}{"null":<20}{"ms":>7}'
  f'{"drops":>7}{"padding":>9}{"tokens/E":>10}{"fullest":>9}{"compile s":>11}{"temporary":>11}'
)


def of_layer(row: dict[str, Any]) -> str:
  """Returns a line of the table under `LAYER_HEAD`."""
  names = ('eta_dense', 'eta_bmm', 'eta_batched', 'null')
  eta = {name: str(Ratio(**row[name])) for name in names}
  return (
    f'{row["num_experts"]:>5} {row["pass"]:<17}{eta["eta_dense"]:<20}{eta["eta_bmm"]:<20}'
    f'{row["excess"]:<8.2f}{eta["eta_batched"]:<20}{row["excess_batched"]:<8.2f}'
    f'{eta["null"]:<20}{row["milliseconds"]:>7,.0f}{row["drop_share"]:>7.1%}'
    f'{_share(row["padding"]):>9}{row["tokens_per_expert"]:>10.0f}{row["max_load"]:>8.2f}x'
    f'{row["compile_seconds"]:>11.1f}{_megabytes(row["temporary_bytes"]):>11}{_void(row)}'
  )


def of_dispatch(row: dict[str, Any]) -> str:
  """Returns a line for the routing, one for each arm, and those of the peers."""
  lines = [
    f'E={row["num_experts"]} {row["routing"]} {row["pass"]}: {row["num_tokens"]} tokens, '
    f'{_load(row)}, dense {row["dense_milliseconds"]:,.1f} ms, null {Ratio(**row["null"])}'
    f'{_void(row)}'
  ]
  peers = row['peers']
  for name, arm in row['arms'].items():
    ahead = ''
    if peers and name in peers['ours']:
      ahead = f'grouped_mm/arm {Ratio(**peers["ours"][name])!s:<20} '
    lines.append(
      f'  {name:<12}dense/arm {Ratio(**arm["eta_dense"])!s:<20}products/arm '
      f'{Ratio(**arm["eta_bmm"])!s:<20}excess {arm["excess"]:<6.2f}balanced/arm '
      f'{Ratio(**arm["eta_balanced"])!s:<20}excess {arm["excess_balanced"]:<6.2f}'
      f'{arm["milliseconds"]:>9,.1f} ms  {ahead}{_program(arm)}'
    )
  lines += [f'  {name:<12}not measured: {why}' for name, why in row['not_measured'].items()]
  if peers:
    lines.append(
      f'  {"grouped_mm":<12}dense/arm {Ratio(**peers["eta_dense"])!s:<20}{"":<92}'
      f'{peers["milliseconds"]:>9,.1f} ms  in {peers["versions"]}; its dense '
      f'{peers["dense_milliseconds"]:,.1f} ms, null {Ratio(**peers["null"])}{_void(peers)}'
    )
  return '\n'.join(lines)


def of_decode(row: dict[str, Any]) -> str:
  """Returns a line for the layer or the model at one batch, and one for each arm."""
  chosen = row['experts_chosen']
  lines = [
    f'E={row["num_experts"]} batch={row["batch"]} {row["level"]}: decode is {row["way"]} with '
    f'{row["rows_in_block"]} rows in a block{f", {chosen} experts chosen" if chosen else ""}, null '
    f'{Ratio(**row["null"])}{_void(row)}'
  ]
  for name, arm in row['arms'].items():
    size = arm['weight_bytes']
    weights = f', {size / 1e6:,.1f} MB of experts read' if size is not None else ''
    lines.append(
      f'  {name:<12}{arm["tokens_per_second"]:>10,.1f} tokens/s   dense/arm '
      f'{Ratio(**arm["eta_dense"])!s:<20}{_program(arm)}{weights}'
    )
  lines += [f'  {name:<12}not measured: {why}' for name, why in row['not_measured'].items()]
  return '\n'.join(lines)


def of_router(row: dict[str, Any]) -> str:
  """Returns a line."""
  head = f'E={row["num_experts"]:<5} {row["router"]:<15}'
  if 'not_measured' in row:
    return f'{head} not measured: {row["not_measured"]}'
  share = row['share']
  load = '' if row['tokens_per_expert'] is None else f'{_load(row)}, '
  if row['disagreement'] is not None:
    load = f'{row["disagreement"]:.2%} of choices differ from float32, {load}'
  return (
    f'{head}{share["median"]:>8.1%} [{share["low"]:.1%}, {share["high"]:.1%}] of the products; '
    f'{load}{_program(row)}{_void(row)}'
  )


def of_expert_parallel(row: dict[str, Any]) -> str:
  """Returns a line."""
  sent = ', '.join(f'{size / 1e6:.2f}' for size in row['exchanged_bytes']) or 'nothing'
  return (
    f'E={row["num_experts"]:<4} data={row["mesh"][0]} expert={row["mesh"][1]} {row["pass"]:<17}'
    f'one device / mesh {Ratio(**row["speed"])}, null {Ratio(**row["null"])}, MB sent by each '
    f'device: {sent} (formula {row["formula_bytes"] / 1e6:.2f} each), {_load(row)}, '
    f'{_program(row)}{_void(row)}'
  )


def of_sweep(row: dict[str, Any]) -> str:
  """Returns a line."""
  return (
    f'{row["num_trials"]:>3} trials: one by one / packed {Ratio(**row["gain"])}, null '
    f'{Ratio(**row["null"])}{_void(row)}'
  )


def _load(row: dict[str, Any]) -> str:
  return (
    f'{row["tokens_per_expert"]:.0f} per expert, fullest {row["max_load"]:.2f} x, '
    f'{row["drop_share"]:.1%} dropped, {_share(row["padding"])} padding'
  )


def _program(arm: dict[str, Any]) -> str:
  return (
    f'compiled in {arm["compile_seconds"]:.1f} s, {_megabytes(arm["temporary_bytes"])} temporary'
  )


def _void(row: dict[str, Any]) -> str:
  return '  VOID: restless machine' if row['void'] else ''


def _share(share: float | None) -> str:
  return '-' if share is None else f'{share:.1%}'


def _megabytes(size: int) -> str:
  return f'{size / 1e6:,.0f} MB'
