"""Lists the commands: python -m moe_jax."""

import ast
import pathlib
import sys

from moe_jax import cli
from moe_jax.errors import did_you_mean


def commands() -> dict[str, str]:
  """Returns {name: its first line} of every module here that can be run, without importing it."""
  folder = pathlib.Path(__file__).parent
  files = {path.stem: path for path in folder.glob('*.py') if path.stem[0] != '_'}
  files |= {path.parent.name: path for path in folder.glob('*/__main__.py')}
  found = {}
  for name, path in sorted(files.items()):
    source = path.read_text(encoding='utf-8')
    if "if __name__ == '__main__':" in source:
      text = ast.get_docstring(ast.parse(source)) or ''
      found[name] = text.partition('\n')[0].partition(': python -m ')[0].rstrip('.')
  return found


def as_text() -> str:
  """Returns a line for each command."""
  lines = [f'  {name:<11}{what}' for name, what in commands().items()]
  return '\n'.join(['python -m moe_jax.COMMAND [--help]', '', *lines])


def main(words: list[str]) -> None:
  """Prints the commands; a command is no argument, but part of the module's name."""
  if not words or cli.asks_for_help(words):
    cli.show(as_text())
    return
  name = words[0]
  if name in commands():
    cli.fail(f'command={name!r}: write python -m moe_jax.{name}')
  near = did_you_mean(name, commands(), 'python -m moe_jax.')
  cli.fail(f'command={name!r}: unknown; python -m moe_jax lists the commands{near}')


if __name__ == '__main__':
  main(sys.argv[1:])
