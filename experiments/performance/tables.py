"""Writes the tables of experiments/performance/README.md from the results next to it.

python -m experiments.performance.tables

A file results/NAME.json holds the command, hardware, environment, commit, shape, number of rounds
and `rows`, each as `python -m moe_jax.benchmark ... --json` prints it; fields that were not kept
are shown as '-'. `transcribed` marks rows copied from a printed table, where the JSON was not kept.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = '<!-- begin tables -->', '<!-- end tables -->'

Row = dict[str, Any]


def main() -> None:
  """Rewrites the README's part between the two marks."""
  path = FOLDER / 'README.md'
  path.write_text(with_tables(path.read_text(encoding='utf-8')), encoding='utf-8')


def with_tables(readme: str) -> str:
  """Returns the text of the README with the tables of all committed results.

  Args:
    readme: the text, with each of the two marks once.
  """
  before, rest = readme.split(BEGIN)
  _, after = rest.split(END)
  parts = [_part(*section) for section in SECTIONS]
  return f'{before}{BEGIN}\n\n' + '\n\n'.join(parts) + f'\n\n{END}{after}'


def load(name: str) -> dict[str, Any]:
  """Returns one committed result by its name."""
  return json.loads((FOLDER / 'results' / f'{name}.json').read_text(encoding='utf-8'))


def _part(title: str, name: str, table: Callable[[Sequence[Row]], str]) -> str:
  result = load(name)
  versions = f'; {result["versions"]}' if result.get('versions') else ''
  commit = f', commit {result["git_commit"]}' if result['git_commit'] else ''
  environment = f'{result["environment"]} \\\n  ' if result['environment'] else ''
  lines = [
    f'### {title}',
    '',
    f'{result["shape"]}. Medians [quartiles] of {result["rounds"]} interleaved rounds on '
    f'{result["hardware"]}{versions}{commit}.',
    '',
    f'```\n{environment}{result["command"]}\n```',
    '',
    table(result['rows']),
  ]
  if result.get('note'):
    lines += ['', result['note']]
  return '\n'.join(lines)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _ratio(value: Row | None) -> str:
  if value is None:
    return '-'
  text = f'{value["median"]:.2f}'
  return f'{text} [{value["low"]:.2f}, {value["high"]:.2f}]' if 'low' in value else text


def _number(value: float | None, form: str = '.2f') -> str:
  return '-' if value is None else format(value, form)


def _pass(row: Row) -> str:
  return row['pass'].replace('+', ' + ')


def _control(row: Row) -> str:
  return _ratio(row.get('null')) + (' (invalid)' if row['void'] else '')


def _dispatch(rows: Sequence[Row]) -> str:
  head = ('E', 'pass', 'arm', 'speedup vs dense', 'fraction of matmuls', 'of balanced matmuls')
  cells = []
  for row in rows:
    for name, arm in row['arms'].items():
      ratios = (_ratio(arm.get(key)) for key in ('eta_dense', 'eta_bmm', 'eta_balanced'))
      cells.append((f'{row["num_experts"]:,}', _pass(row), f'`{name}`', *ratios, _control(row)))
  return _markdown((*head, 'A/A control'), cells)


def _peers(rows: Sequence[Row]) -> str:
  head = ('E', 'pass', 'arm', 'speedup vs grouped_mm', 'ours vs dense', 'grouped_mm vs dense')
  cells = []
  for row in rows:
    peers = row['peers']
    controls = ', '.join(_control(part) for part in (row, peers) if 'null' in part)
    for name, arm in row['arms'].items():
      ratios = (peers['ours'][name], arm['eta_dense'], peers.get('eta_dense'))
      cells.append(
        (f'{row["num_experts"]:,}', _pass(row), f'`{name}`', *map(_ratio, ratios), controls)
      )
  return _markdown((*head, 'A/A controls'), cells)


def _layer(rows: Sequence[Row]) -> str:
  head = ('E', 'pass', 'speedup vs dense', 'fraction of matmuls', 'of batched matmuls', 'dropped')
  return _markdown(
    (*head, 'A/A control'),
    (
      (
        f'{row["num_experts"]:,}',
        _pass(row),
        *(_ratio(row[key]) for key in ('eta_dense', 'eta_bmm', 'eta_batched')),
        _number(row['drop_share'], '.1%'),
        _control(row),
      )
      for row in rows
    ),
  )


def _expert_parallel(rows: Sequence[Row]) -> str:
  cells = (
    (f'{row["mesh"][0]} x {row["mesh"][1]}', str(row['num_experts']), _pass(row))
    + (_ratio(row['speed']),)
    for row in rows
  )
  return _markdown(('mesh (data x expert)', 'E', 'pass', 'time of 1 device / of 8'), cells)


def _decode(rows: Sequence[Row]) -> str:
  cells = (
    (str(row['num_experts']), str(row['batch']))
    + tuple(_ratio(row['arms'].get(arm, {}).get('eta_dense')) for arm in ('decode', 'slots'))
    for row in rows
  )
  return _markdown(('E', 'batch', 'speedup vs dense', 'with a slot for every token'), cells)


def _router(rows: Sequence[Row]) -> str:
  by_router: dict[str, dict[int, str]] = {}
  for row in rows:
    text = _number(row['share']['median'], '.1%') + (' (invalid)' if row['void'] else '')
    by_router.setdefault(row['router'], {})[row['num_experts']] = text
  sizes = sorted({row['num_experts'] for row in rows})
  cells = ((f'`{n}`', *(of.get(e, '-') for e in sizes)) for n, of in by_router.items())
  return _markdown(('router', *(f'E = {e:,}' for e in sizes)), cells)


SECTIONS: tuple[tuple[str, str, Callable[[Sequence[Row]], str]], ...] = (
  ('The layer on a CPU: `gather`, capacity factor 1.25', 'layer_gather', _layer),
  ('The layer on a CPU: `dropless`', 'layer_dropless', _layer),
  ('Dispatch alone on a CPU, routing given', 'dispatch_cpu', _dispatch),
  ("Next to transformers' `grouped_mm` on a CPU", 'peers_cpu', _peers),
  ("On one H100, next to transformers' `grouped_mm`", 'dispatch_h100', _peers),
  ('The same run: fraction of the matmuls', 'dispatch_h100', _dispatch),
  ('8 simulated devices and one, the same work', 'ep_cpu', _expert_parallel),
  ('Decoding', 'decode_cpu', _decode),
  ('Routers: time of choosing and planning as a share of the dense matmuls', 'router_cpu', _router),
)


if __name__ == '__main__':
  main()
