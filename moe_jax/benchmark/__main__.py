"""Times the layer, its parts and whole steps: python -m moe_jax.benchmark COMMAND [--json].

decode: single tokens that meet many experts: ways of running few of them, and whole decoding steps,
  against dense; tokens per second.
dispatch: moving tokens and the experts' products under a given routing, against dense, the batched
  products alone, one-hot products, lax.ragged_dot, and a copy of the same bytes.
ep: the MoE layer over a mesh against the same work on one device, and the bytes it exchanges.
layer: the MoE layer against a dense layer of the same active FLOPs and its own batched products.
router: choosing and planning, as a share of the experts' products.
step: where the time of a training step goes, and how long it waits for data (--config=...).
sweep: what it gains to train several trials as one program (--config=...).
"""

import math
import re
import sys
from collections.abc import Callable, Collection
from typing import Any

from absl import flags
from ml_collections import config_flags

from moe_jax import cli, schema
from moe_jax.benchmark import names
from moe_jax.errors import UserError, did_you_mean

_COMMANDS = ('decode', 'dispatch', 'ep', 'layer', 'router', 'step', 'sweep')
_OF_TOKENS = 'dispatch ep layer router'  # compute layers of so many tokens
_LAYERS = f'decode {_OF_TOKENS}'  # compute layers of given sizes
_READERS: dict[str, Collection[str]] = {}  # the commands that read a flag


def _define(define: Callable[..., Any], readers: str, name: str, *rest: Any) -> flags.FlagHolder:
  """Defines a flag that only some commands read."""
  _READERS[name] = readers.split()
  return define(name, *rest)


_CONFIG = cli.define_config_flag()
_READERS['config'] = ('step', 'sweep')
flags.DEFINE_bool('json', False, 'Print one JSON object per row.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds of interleaved calls.')
_define(flags.DEFINE_integer, 'step', 'steps', 20, 'real steps with the data pipeline.')
_define(
  flags.DEFINE_list,
  _LAYERS,
  'num_experts',
  None,
  'values of E; by default 8,64,256,1024, decode 8,64,256, ep 8,64.',
)
_NUM_TOKENS = _define(
  flags.DEFINE_integer,
  _OF_TOKENS,
  'num_tokens',
  4096,
  'tokens; one routing group but for layer and ep.',
)
_EMBED_DIM = _define(flags.DEFINE_integer, _LAYERS, 'embed_dim', 512, 'D.')
_MLP_DIM = _define(flags.DEFINE_integer, _LAYERS, 'mlp_dim', 1024, 'F of one expert.')
_SELECTED = _define(flags.DEFINE_integer, _LAYERS, 'num_selected_experts', 2, 'K.')
_CAPACITY_FACTOR = _define(flags.DEFINE_float, _OF_TOKENS, 'capacity_factor', 1.25, 'of every E.')
_define(
  flags.DEFINE_enum,
  'layer',
  'dispatch',
  'gather',
  sorted(schema.SCHEMA['moe']['dispatch'].choices),
  'dispatcher.',
)
_define(
  flags.DEFINE_enum,
  'decode dispatch ep layer',
  'activation',
  'swiglu',
  ['swiglu', 'gelu'],
  'of all arms.',
)
_define(flags.DEFINE_enum, _LAYERS, 'dtype', 'float32', ['float32', 'bfloat16'], 'of the products.')
_define(flags.DEFINE_integer, f'{_LAYERS} sweep', 'seed', 0, 'of weights, inputs and orders.')
_define(flags.DEFINE_list, 'router', 'routers', list(schema.router_names()), 'which.')
_define(
  flags.DEFINE_enum,
  'router',
  'router_dtype',
  'float32',
  ['float32', 'bfloat16'],
  'moe.router_dtype.',
)
_define(flags.DEFINE_list, 'sweep', 'num_trials', ['2', '4', '8'], 'trials in a pack.')
_define(
  flags.DEFINE_list,
  'dispatch',
  'routings',
  list(names.DRAWN),
  f'which; {names.TRACE} needs --workdir.',
)
_define(cli.define_path, 'dispatch', 'workdir', f'run whose routing {names.TRACE} is.')
_define(
  cli.define_path,
  'dispatch',
  'data_dir',
  "where the data of that run is kept; the run's by default.",
)
_define(
  flags.DEFINE_bool,
  'dispatch',
  'peers',
  False,
  'also time grouped_mm of torch and transformers, which must be there.',
)
_define(
  flags.DEFINE_list,
  'dispatch',
  'arms',
  list(names.ARMS),
  f'which, beside dense and products; those over 20 times dense are left out; '
  f'also {names.TOKAMAX}, if that package is there.',
)
_define(
  flags.DEFINE_integer,
  'dispatch layer',
  'tokens_per_expert',
  0,
  'so many tokens for each expert; 0 for num_tokens.',
)
_define(flags.DEFINE_integer, 'layer', 'num_groups', 1, 'routing groups that tokens are in.')
_define(
  flags.DEFINE_bool,
  'dispatch layer',
  'reuse_memory',
  False,
  'write results over those of the call before, in place of new memory; peers have their own.',
)
_define(flags.DEFINE_list, 'ep', 'meshes', ['1x8', '2x4'], 'data x expert of each.')
_define(flags.DEFINE_list, 'decode', 'batches', ['1', '16', '256'], 'sequences at a time.')
_define(flags.DEFINE_integer, 'decode', 'num_layers', 4, 'of the model; 0 leaves it out.')
_define(
  cli.define_path,
  'decode layer step',
  'profile',
  'directory for traces and tables of the time by part.',
)


def main() -> None:
  """Runs the benchmark that the first argument names."""
  if _ROUNDS.value < 9:
    raise UserError('--rounds', _ROUNDS.value, 'must be at least 9')
  _check_readers()
  _check_sizes()
  from moe_jax.benchmark import commands

  commands.run(_COMMAND, _CONFIG)


def _check_readers() -> None:
  """Refuses what was given on the command line and would not be read."""
  for name, readers in _READERS.items():
    flag = flags.FLAGS[name]
    if flag.present and _COMMAND not in readers:
      # The value of --config is all that it says.
      value = config_flags.get_config_filename(flag) if name == 'config' else flag.value
      what = f'not read by benchmark {_COMMAND}; only by {", ".join(readers)}'
      raise UserError(f'--{name}', value, what)


def _check_sizes() -> None:
  for flag in (_NUM_TOKENS, _EMBED_DIM, _MLP_DIM, _SELECTED):
    if flag.value < 1:
      raise UserError(f'--{flag.name}', flag.value, 'must be at least 1')
  if not 0 < _CAPACITY_FACTOR.value < math.inf:
    raise UserError('--capacity_factor', _CAPACITY_FACTOR.value, 'must be above 0 and finite')


def _take_command(argv: list[str]) -> str:
  """Takes the command out of the arguments: absl knows flags only."""
  if argv[1:] and cli.asks_for_help(argv[1:2]):
    cli.print_help(f'{__doc__}\nFlags of a command: python -m moe_jax.benchmark COMMAND --help')
  if len(argv) < 2 or argv[1] not in _COMMANDS:
    given = argv[1] if len(argv) > 1 else None
    near = did_you_mean(given or '', _COMMANDS)
    cli.fail(f'benchmark={given!r}: must be one of {", ".join(_COMMANDS)}{near}')
  return argv.pop(1)


def _help(command: str) -> str:
  """Returns what this module's docstring says of a command, and an example."""
  found = re.search(rf'^{command}: (.*?)(?=^\S|\Z)', __doc__ or '', re.MULTILINE | re.DOTALL)
  assert found is not None
  what = ' '.join(found[1].split())
  example = f'python -m moe_jax.benchmark {command}'
  if command in _READERS['config']:
    example += ' --config=configs/debug.py'
  return f'{what[0].upper()}{what[1:]}\n\nExamples:\n  {example}\n  {example} --json'


if __name__ == '__main__':
  _COMMAND = _take_command(sys.argv)
  _NAMES = [name for name in flags.FLAGS if _COMMAND in _READERS.get(name, _COMMANDS)]
  cli.run(main, _help(_COMMAND), _NAMES)
