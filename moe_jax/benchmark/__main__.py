"""Benchmarks: python -m moe_jax.benchmark COMMAND [--json].

decode: single tokens that meet many experts: ways of running few of them, and whole decoding steps,
  against dense; tokens per second.
dispatch: moving tokens and the experts' products under a given routing, against dense, the batched
  products alone, one-hot products, lax.ragged_dot, and a copy of the same bytes.
ep: the MoE layer over a mesh against the same work on one device, and the bytes it exchanges.
layer: the MoE layer against a dense layer of the same active FLOPs and its own batched products.
products: the experts' products all in one against one expert at a time.
router: choosing and planning, as a share of the experts' products.
step:  where the time of a training step goes, and how long it waits for data (--config=...).
sweep: what it gains to train several trials as one program (--config=...).
"""

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from moe_jax import cli, profiling, routing
from moe_jax import dispatch as dispatch_room
from moe_jax.benchmark import (
  arms,
  decode,
  dispatch,
  expert_parallel,
  layer,
  peers,
  products,
  router,
  routings,
  step,
  sweep,
  text,
  timing,
)
from moe_jax.benchmark.arms import Shape
from moe_jax.errors import UserError

_COMMANDS = ('decode', 'dispatch', 'ep', 'layer', 'products', 'router', 'step', 'sweep')
_OF_TOKENS = 'dispatch ep layer products router'  # compute layers of so many tokens
_LAYERS = f'decode {_OF_TOKENS}'  # compute layers of given sizes
_READERS: dict[str, Collection[str]] = {}  # the commands that read a flag


def _define(define: Callable[..., Any], readers: str, name: str, *rest: Any) -> flags.FlagHolder:
  """Defines a flag that only some commands read; its help, which is last in `rest`, says which."""
  _READERS[name] = readers.split()
  return define(name, *rest[:-1], f'{", ".join(_READERS[name])}: {rest[-1]}')


_CONFIG = cli.define_config_flag()
_READERS['config'] = ('step', 'sweep')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per row.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds of interleaved calls.')
_STEPS = _define(flags.DEFINE_integer, 'step', 'steps', 20, 'real steps with the data pipeline.')
_NUM_EXPERTS = _define(
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
_DISPATCH = _define(
  flags.DEFINE_enum,
  'layer',
  'dispatch',
  'gather',
  sorted(dispatch_room.DISPATCHERS),
  'dispatcher.',
)
_ACTIVATION = _define(
  flags.DEFINE_enum,
  'decode dispatch ep layer products',
  'activation',
  'swiglu',
  ['swiglu', 'gelu'],
  'of all arms.',
)
_DTYPE = _define(
  flags.DEFINE_enum, _LAYERS, 'dtype', 'float32', ['float32', 'bfloat16'], 'of the products.'
)
_SEED = _define(
  flags.DEFINE_integer, f'{_LAYERS} sweep', 'seed', 0, 'of weights, inputs and orders.'
)
_ROUTERS = _define(flags.DEFINE_list, 'router', 'routers', sorted(routing.ROUTERS), 'which.')
_ROUTER_DTYPE = _define(
  flags.DEFINE_enum,
  'router',
  'router_dtype',
  'float32',
  ['float32', 'bfloat16'],
  'moe.router_dtype.',
)
_NUM_TRIALS = _define(
  flags.DEFINE_list, 'sweep', 'num_trials', ['2', '4', '8'], 'trials in a pack.'
)
_ROUTINGS = _define(
  flags.DEFINE_list,
  'dispatch',
  'routings',
  list(routings.DRAWN),
  f'which; {routings.TRACE} needs --workdir.',
)
_WORKDIR = _define(
  flags.DEFINE_string, 'dispatch', 'workdir', None, f'run whose routing {routings.TRACE} is.'
)
_DATA_DIR = _define(
  flags.DEFINE_string,
  'dispatch',
  'data_dir',
  None,
  "where the data of that run is kept; the run's by default.",
)
_PEERS = _define(
  flags.DEFINE_bool,
  'dispatch',
  'peers',
  False,
  'also time grouped_mm of torch and transformers, which must be there.',
)
_ARMS = _define(
  flags.DEFINE_list,
  'dispatch',
  'arms',
  list(dispatch.ARMS),
  f'which, beside dense and products; those over {dispatch.SLOWEST:.0f} times dense are left out; '
  f'also {dispatch.TOKAMAX}, if that package is there.',
)
_TOKENS_PER_EXPERT = _define(
  flags.DEFINE_integer,
  'dispatch layer products',
  'tokens_per_expert',
  0,
  'so many tokens for each expert; 0 for num_tokens.',
)
_NUM_GROUPS = _define(
  flags.DEFINE_integer, 'layer', 'num_groups', 1, 'routing groups that tokens are in.'
)
_REUSE_MEMORY = _define(
  flags.DEFINE_bool,
  'dispatch layer',
  'reuse_memory',
  False,
  'write results over those of the call before, in place of new memory; peers have their own.',
)
_MESHES = _define(flags.DEFINE_list, 'ep', 'meshes', ['1x8', '2x4'], 'data x expert of each.')
_BATCHES = _define(
  flags.DEFINE_list, 'decode', 'batches', ['1', '16', '256'], 'sequences at a time.'
)
_NUM_LAYERS = _define(
  flags.DEFINE_integer, 'decode', 'num_layers', 4, 'of the model; 0 leaves it out.'
)
_PROFILE = _define(
  flags.DEFINE_string,
  'decode layer step',
  'profile',
  None,
  'directory for traces and tables of the time by part.',
)


def main() -> None:
  """Runs the benchmark that the first argument names."""
  if _ROUNDS.value < 9:
    raise UserError('--rounds', _ROUNDS.value, 'must be at least 9')
  _check_readers()
  if _PROFILE.value is not None:
    profiling.check_directory('--profile', _PROFILE.value)
  _check_sizes()
  if not _JSON.value:
    print(f'on {jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
  try:
    _run()
  except jax.errors.JaxRuntimeError as error:
    if not timing.is_out_of_memory(error):
      raise
    why = str(error).splitlines()[0]
    raise UserError('benchmark', _COMMAND, f'the device has not enough memory: {why}') from error


def _run() -> None:
  {
    'decode': _decode,
    'dispatch': _dispatch,
    'ep': _ep,
    'layer': _layer,
    'products': _products,
    'router': _router,
    'step': _step,
    'sweep': _sweep,
  }[_COMMAND]()


def _numbers(flag: flags.FlagHolder, lowest: int) -> list[int]:
  if not flag.value or not all(n.isdigit() and int(n) >= lowest for n in flag.value):
    raise UserError(f'--{flag.name}', flag.value, f'must be numbers >= {lowest}')
  numbers = [int(n) for n in flag.value]
  _check_once(flag, numbers)
  return numbers


def _check_once(flag: flags.FlagHolder, values: Sequence[Any]) -> None:
  twice = [value for value in values if values.count(value) > 1]
  if twice:
    raise UserError(f'--{flag.name}', flag.value, f'names {twice[0]} more than once')


def _names(flag: flags.FlagHolder, known: Collection[str]) -> list[str]:
  if not flag.value:
    raise UserError(f'--{flag.name}', '', f'must name some of {", ".join(known)}')
  _check_once(flag, flag.value)
  for name in flag.value:
    if name not in known:
      raise UserError(f'--{flag.name}', name, f'must be of {", ".join(known)}')
  return flag.value


def _values_of_e(default: list[int]) -> list[int]:
  return default if _NUM_EXPERTS.value is None else _numbers(_NUM_EXPERTS, _SELECTED.value)


def _tokens_per_expert() -> int:
  if _TOKENS_PER_EXPERT.value < 0:
    raise UserError('--tokens_per_expert', _TOKENS_PER_EXPERT.value, 'must not be below 0')
  if _TOKENS_PER_EXPERT.value and flags.FLAGS['num_tokens'].present:
    raise UserError('--num_tokens', _NUM_TOKENS.value, 'is given by --tokens_per_expert; leave one')
  return _TOKENS_PER_EXPERT.value


def _show(rows: Iterable[dict[str, Any]], of_row: Callable[[dict[str, Any]], str]) -> None:
  for row in rows:
    try:
      print(json.dumps(row) if _JSON.value else of_row(row), flush=True)
    except BrokenPipeError:
      cli.end_of_reading()


def _router() -> None:
  rows = router.rows(
    num_experts=_values_of_e([8, 64, 256, 1024]),
    num_tokens=_NUM_TOKENS.value,
    embed_dim=_EMBED_DIM.value,
    mlp_dim=_MLP_DIM.value,
    num_selected_experts=_SELECTED.value,
    capacity_factor=_CAPACITY_FACTOR.value,
    dtype=_DTYPE.value,
    routers=_names(_ROUTERS, routing.ROUTERS),
    router_dtype=_ROUTER_DTYPE.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
  )
  _show(rows, text.of_router)


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


def _shape() -> Shape:
  return Shape(
    num_tokens=_NUM_TOKENS.value,
    embed_dim=_EMBED_DIM.value,
    mlp_dim=_MLP_DIM.value,
    num_selected_experts=_SELECTED.value,
    capacity_factor=_CAPACITY_FACTOR.value,
    activation=_ACTIVATION.value,
    dtype=_DTYPE.value,
  )


def _dispatch() -> None:
  names, shape = _names(_ROUTINGS, routings.ROUTINGS), _shape()
  num_experts, tokens_per_expert = _values_of_e([8, 64, 256, 1024]), _tokens_per_expert()
  trace = None
  if routings.TRACE in names:
    most = arms.with_tokens_per_expert(shape, tokens_per_expert, max(num_experts))
    trace = routings.record(cli.required(_WORKDIR), most.num_tokens, _DATA_DIR.value)
    if _NUM_EXPERTS.value is None:
      num_experts = [trace.num_experts]
  else:
    for flag in (_WORKDIR, _DATA_DIR):
      if flag.value is not None:
        raise UserError(f'--{flag.name}', flag.value, f'only read with --routings={routings.TRACE}')
  if _PEERS.value:
    peers.libraries()
  names_of_arms = _names(_ARMS, (*dispatch.ARMS, dispatch.TOKAMAX))
  if dispatch.TOKAMAX in names_of_arms:
    peers.tokamax_ragged_dot()
  rows = dispatch.rows(
    shape,
    num_experts=num_experts,
    routings=names,
    arms=names_of_arms,
    tokens_per_expert=tokens_per_expert,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    trace=trace,
    peers=_PEERS.value,
    reuse_memory=_REUSE_MEMORY.value,
  )
  _show(rows, text.of_dispatch)


def _decode() -> None:
  if _NUM_LAYERS.value < 0:
    raise UserError('--num_layers', _NUM_LAYERS.value, 'must not be below 0')
  rows = decode.rows(
    _shape(),
    batches=_numbers(_BATCHES, 1),
    num_experts=_values_of_e([8, 64, 256]),
    num_layers=_NUM_LAYERS.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    profile=_PROFILE.value or '',
  )
  _show(rows, lambda row: text.of_decode(row) + _profile_text(row))


def _profile_text(row: dict[str, Any]) -> str:
  return f'\n{profiling.as_text(row["profile"])}' if 'profile' in row else ''


def _ep() -> None:
  if not all(re.fullmatch(r'[1-9]\d*x[1-9]\d*', mesh) for mesh in _MESHES.value):
    raise UserError('--meshes', ','.join(_MESHES.value), 'must read DATAxEXPERT,...')
  meshes = [(int(data), int(expert)) for data, expert in (m.split('x') for m in _MESHES.value)]
  rows = expert_parallel.rows(
    _shape(),
    num_experts=_values_of_e([8, 64]),
    meshes=meshes,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
  )
  _show(rows, text.of_expert_parallel)


def _layer() -> None:
  if _NUM_GROUPS.value < 1:
    raise UserError('--num_groups', _NUM_GROUPS.value, 'must be at least 1')
  rows = layer.rows(
    _shape(),
    num_experts=_values_of_e([8, 64, 256, 1024]),
    dispatch=_DISPATCH.value,
    tokens_per_expert=_tokens_per_expert(),
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    profile=_PROFILE.value or '',
    num_groups=_NUM_GROUPS.value,
    reuse_memory=_REUSE_MEMORY.value,
  )
  if not _JSON.value:
    print(text.LAYER_HEAD)
  _show(rows, lambda row: text.of_layer(row) + _profile_text(row))


def _products() -> None:
  rows = products.rows(
    _shape(),
    num_experts=_values_of_e([8, 64, 256, 1024]),
    tokens_per_expert=_tokens_per_expert(),
    rounds=_ROUNDS.value,
    seed=_SEED.value,
  )
  _show(rows, text.of_products)


def _step() -> None:
  result = step.shares(_CONFIG(), _ROUNDS.value, _STEPS.value, _PROFILE.value or '')
  if _JSON.value:
    print(json.dumps(result))
    return
  for name in ('forward', 'backward', 'optimizer'):
    print(f'{name:<12}{result[name]:>7.1%} of a step')
  print(f'{"data wait":<12}{result["data_wait"]:>7.2%} of the time of {_STEPS.value} real steps')
  print(f'compilations of the step: {result["compilations"]}{_profile_text(result)}')


def _sweep() -> None:
  numbers = _numbers(_NUM_TRIALS, 2)
  _show(sweep.rows(_CONFIG(), numbers, _ROUNDS.value, _SEED.value), text.of_sweep)


def _take_command(argv: list[str]) -> str:
  """Takes the command out of the arguments: absl knows flags only."""
  if argv[1:] and cli.asks_for_help(argv[1:2]):
    cli.print_help(f'{__doc__}\nFlags of a command: python -m moe_jax.benchmark COMMAND --help')
  if len(argv) < 2 or argv[1] not in _COMMANDS:
    given = argv[1] if len(argv) > 1 else None
    cli.fail(f'benchmark={given!r}: must be one of {", ".join(_COMMANDS)}')
  return argv.pop(1)


if __name__ == '__main__':
  _COMMAND = _take_command(sys.argv)
  cli.run(main)
