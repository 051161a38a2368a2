"""Lists the routers, by what they do and where they come from: python -m moe_jax.routers.

Examples:
  python -m moe_jax.routers
  python -m moe_jax.routers --json
"""

from typing import Any

from moe_jax import cli

_JSON = cli.define_json_flag()


def rows() -> list[dict[str, Any]]:
  """Returns what the registry says of each router, by name."""
  from moe_jax import routing

  return [
    {
      'name': router.name,
      'summary': router.summary,
      'paper': router.paper,
      'causal': router.causal,
      'in_causal_lm': not router.rejected,
      'learns': router.learns,
      'balance': router.balance,
      'own_loss': router.loss is not None,
      'state': sorted(router.state(router.options(4, 2), 8, 16)),
      'cost': router.cost,
      'preset': f'configs/presets/{router.name}.py',
    }
    for router in routing.ROUTERS.values()
  ]


def markdown() -> str:
  """Returns the table of the README."""
  lines = [
    '| router | what it does | paper | causal | balance by | state | cost per token |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows():
    cells = [
      f'`{row["name"]}`',
      row['summary'],
      row['paper'],
      'yes' if row['causal'] else 'no',
      row['balance'] + (' (own)' if row['own_loss'] else ''),
      ', '.join(row['state']) or '-',
      row['cost'],
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  """Prints the table, or a list with an object for each router."""
  if _JSON.value:
    cli.print_json(rows())
  else:
    cli.show(markdown())


if __name__ == '__main__':
  cli.run(main)
