"""Lists the routers, or begins a new one: python -m moe_jax.routers [new NAME].

`new NAME` writes a router, its test and its preset from a template, which passes all tests as it
stands; moe_jax/routing/README.md describes the next steps.

Examples:
  python -m moe_jax.routers
  python -m moe_jax.routers --json
  python -m moe_jax.routers new nearest
"""

import keyword
import pathlib
import re
import string
import sys
from typing import Any

from moe_jax import cli
from moe_jax.errors import UserError
from moe_jax.files import write_atomically

_REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_TEMPLATE = pathlib.Path(__file__).parent / 'routing' / 'template'
# So that no line of the template outgrows 100 columns.
_LONGEST_NAME = 24
_NEXT = """
Next, as moe_jax/routing/README.md says more fully:
  python -m tests.golden.regenerate
  ./launch/test tests/routing/routers/test_{name}.py
  python -m moe_jax.train --config=configs/presets/{name}.py --workdir=runs/{name}"""


def rows() -> list[dict[str, Any]]:
  """Returns the entry of each router in the registry, by name."""
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


def new(name: str, repository: pathlib.Path = _REPOSITORY) -> list[str]:
  """Writes the three files of a new router from the template.

  Args:
    name: of the router, a value of `moe.router`.
    repository: the checkout that they are written to.

  Returns:
    Their paths within the checkout.

  Raises:
    UserError: if the name is not one, or taken, or if there is no checkout.
  """
  files = {
    'router': f'moe_jax/routing/routers/{name}.py',
    'test': f'tests/routing/routers/test_{name}.py',
    'preset': f'configs/presets/{name}.py',
  }
  if not re.fullmatch('[a-z][a-z0-9_]*', name) or keyword.iskeyword(name):
    raise UserError('new', name, 'must be a name in Python of a-z, 0-9 and _, as expert_choice is')
  if len(name) > _LONGEST_NAME:
    raise UserError('new', name, f'must have at most {_LONGEST_NAME} letters')
  if not all((repository / path).parent.is_dir() for path in files.values()):
    why = f'needs a checkout, with configs/ and tests/; {repository} is none'
    raise UserError('new', name, why)
  for path in files.values():
    if (repository / path).exists():
      raise UserError('new', name, f'{path} is there already; nothing was written')
  for kind, path in files.items():
    template = (_TEMPLATE / f'{kind}.py.txt').read_text(encoding='utf-8')
    write_atomically(repository / path, string.Template(template).substitute(name=name))
  return list(files.values())


def _begin(words: list[str]) -> None:
  """Writes the files of the one name that is given, and prints the next steps."""
  if len(words) != 1 or _JSON.value:
    raise UserError('new', ' '.join(words), 'must have one name, and no flags: new NAME')
  paths = new(words[0])
  cli.show('\n'.join([*paths, _NEXT.format(name=words[0])]))


def main() -> None:
  """Prints the table, or a list with an object for each router; or writes a new one."""
  if _WORDS:
    _begin(_WORDS[1:])
  elif _JSON.value:
    cli.print_json(rows())
  else:
    cli.show(markdown())


if __name__ == '__main__':
  _WORDS = []
  if sys.argv[1:2] == ['new']:
    while (_WORD := cli.take_word(sys.argv)) is not None:
      _WORDS.append(_WORD)
  _JSON = cli.define_json_flag()
  cli.run(main)
