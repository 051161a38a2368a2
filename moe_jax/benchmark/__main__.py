"""Times the layer, its parts and whole steps: python -m moe_jax.benchmark SUITE [--json].

Ratios, measured side by side in one process. SUITE --help lists the flags of a suite. On a GPU or
TPU, ./launch/accelerator runs the suites that matter there.
"""

import ast
import importlib
import pathlib
import sys
import types

from moe_jax import cli
from moe_jax.benchmark.harness import command
from moe_jax.errors import UserError, did_you_mean

_FOLDER = pathlib.Path(__file__).with_name('suites')


def suites() -> dict[str, str]:
  """Returns {name: first line of its docstring} of every suite, without importing it."""
  paths = {p.stem: p for p in sorted(_FOLDER.glob('[a-z]*.py')) if not p.stem.endswith('_rows')}
  sources = {name: ast.parse(path.read_text(encoding='utf-8')) for name, path in paths.items()}
  return {
    name: (ast.get_docstring(source) or '').partition('\n')[0].rstrip('.')
    for name, source in sources.items()
  }


def as_text() -> str:
  """Returns a line for each suite."""
  lines = [f'  {name:<10}{what}' for name, what in suites().items()]
  return '\n'.join([__doc__ or '', 'Suites:', *lines])


def take_suite(argv: list[str]) -> types.ModuleType:
  """Takes the suite's name out of the command line, as absl knows flags only, and imports it."""
  if not argv[1:] or cli.asks_for_help(argv[1:2]):
    cli.print_help(as_text())
  name = argv[1]
  if name not in suites():
    near = did_you_mean(name, suites())
    cli.fail(f'benchmark={name!r}: must be one of {", ".join(suites())}{near}')
  return importlib.import_module(f'moe_jax.benchmark.suites.{argv.pop(1)}')


def main() -> None:
  """Runs the suite."""
  try:
    SUITE.run()
  except RuntimeError as error:
    from moe_jax.benchmark.harness import timing

    if not timing.is_out_of_memory(error):
      raise
    name, why = SUITE.__name__.rpartition('.')[2], str(error).splitlines()[0]
    raise UserError('benchmark', name, f'the device has not enough memory: {why}') from error


if __name__ == '__main__':
  SUITE = take_suite(sys.argv)
  command.add_flags()
  SUITE.add_flags()
  cli.run(main, SUITE.__doc__ or '')
