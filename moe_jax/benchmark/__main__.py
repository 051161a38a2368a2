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
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
from absl import flags

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
)
from moe_jax.benchmark.arms import Shape
from moe_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per row.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds of interleaved calls.')
_STEPS = flags.DEFINE_integer('steps', 20, 'step: real steps with the data pipeline.')
_NUM_EXPERTS = flags.DEFINE_list(
  'num_experts',
  None,
  'Values of E; decode: 8,64,256; dispatch, layer, products, router: 8,64,256,1024; ep: 8,64.',
)
_NUM_TOKENS = flags.DEFINE_integer(
  'num_tokens', 4096, 'dispatch, layer, products: tokens; one routing group but for layer.'
)
_EMBED_DIM = flags.DEFINE_integer('embed_dim', 512, 'decode, dispatch, layer, products: D.')
_MLP_DIM = flags.DEFINE_integer(
  'mlp_dim', 1024, 'decode, dispatch, layer, products: F of one expert.'
)
_SELECTED = flags.DEFINE_integer('num_selected_experts', 2, 'decode, dispatch, layer, products: K.')
_CAPACITY_FACTOR = flags.DEFINE_float(
  'capacity_factor', 1.25, 'dispatch, layer, products: of every E.'
)
_DISPATCH = flags.DEFINE_enum(
  'dispatch', 'gather', sorted(dispatch_room.DISPATCHERS), 'layer: dispatcher.'
)
_ACTIVATION = flags.DEFINE_enum(
  'activation', 'swiglu', ['swiglu', 'gelu'], 'decode, dispatch, layer, products: of all arms.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'All but ep, step, sweep: of the products.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights, inputs and orders.')
_ROUTERS = flags.DEFINE_list('routers', sorted(routing.ROUTERS), 'router: which.')
_ROUTER_DTYPE = flags.DEFINE_enum(
  'router_dtype', 'float32', ['float32', 'bfloat16'], 'router: moe.router_dtype.'
)
_NUM_TRIALS = flags.DEFINE_list('num_trials', ['2', '4', '8'], 'sweep: trials in a pack.')
_ROUTINGS = flags.DEFINE_list(
  'routings', list(routings.DRAWN), f'dispatch: which; {routings.TRACE} needs --workdir.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, f'dispatch: run whose routing {routings.TRACE} is.')
_DATA_DIR = flags.DEFINE_string(
  'data_dir', None, "dispatch: where the data of that run is kept; the run's by default."
)
_PEERS = flags.DEFINE_bool(
  'peers', False, 'dispatch: also time grouped_mm of torch and transformers, which must be there.'
)
_ARMS = flags.DEFINE_list(
  'arms', list(dispatch.ARMS), 'dispatch: which, beside dense and products.'
)
_TOKENS_PER_EXPERT = flags.DEFINE_integer(
  'tokens_per_expert',
  0,
  'dispatch, layer, products: so many tokens for each expert; 0 for num_tokens.',
)
_NUM_GROUPS = flags.DEFINE_integer('num_groups', 1, 'layer: routing groups that tokens are in.')
_REUSE_MEMORY = flags.DEFINE_bool(
  'reuse_memory',
  False,
  'dispatch, layer: write results over those of the call before, in place of new memory. Peers '
  'cannot.',
)
_MESHES = flags.DEFINE_list('meshes', ['1x8', '2x4'], 'ep: data x expert of each.')
_BATCHES = flags.DEFINE_list('batches', ['1', '16', '256'], 'decode: sequences at a time.')
_NUM_LAYERS = flags.DEFINE_integer('num_layers', 4, 'decode: of the model; 0 leaves it out.')
_PROFILE = flags.DEFINE_string(
  'profile', None, 'decode, layer, step: directory for traces and tables of the time by part.'
)
_PROFILED = ('decode', 'layer', 'step')
_COMMANDS = ('decode', 'dispatch', 'ep', 'layer', 'products', 'router', 'step', 'sweep')


def main() -> None:
  """Runs the benchmark that the first argument names."""
  if _ROUNDS.value < 9:
    raise UserError('--rounds', _ROUNDS.value, 'must be at least 9')
  if _PROFILE.value is not None:
    if _COMMAND not in _PROFILED:
      raise UserError('--profile', _PROFILE.value, f'only {", ".join(_PROFILED)} can be traced')
    profiling.check_directory('--profile', _PROFILE.value)
  _check_sizes()
  if not _JSON.value:
    print(f'on {jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
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
  return [int(n) for n in flag.value]


def _names(flag: flags.FlagHolder, known: Collection[str]) -> list[str]:
  for name in flag.value:
    if name not in known:
      raise UserError(f'--{flag.name}', name, f'must be of {", ".join(known)}')
  return flag.value


def _values_of_e(default: list[int]) -> list[int]:
  return default if _NUM_EXPERTS.value is None else _numbers(_NUM_EXPERTS, _SELECTED.value)


def _tokens_per_expert() -> int:
  if _TOKENS_PER_EXPERT.value < 0:
    raise UserError('--tokens_per_expert', _TOKENS_PER_EXPERT.value, 'must not be below 0')
  return _TOKENS_PER_EXPERT.value


def _show(rows: Iterable[dict[str, Any]], of_row: Callable[[dict[str, Any]], str]) -> None:
  for row in rows:
    print(json.dumps(row) if _JSON.value else of_row(row), flush=True)


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
  if _PEERS.value:
    if _REUSE_MEMORY.value:
      raise UserError('--reuse_memory', True, 'other libraries have no such thing; leave --peers')
    peers.libraries()
  rows = dispatch.rows(
    shape,
    num_experts=num_experts,
    routings=names,
    arms=_names(_ARMS, dispatch.ARMS),
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
  if len(argv) < 2 or argv[1] not in _COMMANDS:
    given = argv[1] if len(argv) > 1 else None
    cli.fail(f'benchmark={given!r}: must be one of {", ".join(_COMMANDS)}')
  return argv.pop(1)


if __name__ == '__main__':
  _COMMAND = _take_command(sys.argv)
  cli.run(main)
