"""Benchmarks: python -m moe_jax.benchmark {decode,dispatch,ep,layer,router,step,sweep} [--json].

decode: single tokens that meet many experts: ways of running few of them, and whole decoding steps,
  against dense; tokens per second.
dispatch: moving tokens and the experts' products under a given routing, against dense, the batched
  products alone, one-hot products, lax.ragged_dot, and a copy of the same bytes.
ep: the MoE layer over a mesh against the same work on one device, and the bytes it exchanges.
layer: the MoE layer against a dense layer of the same active FLOPs and its own batched products.
router: choosing and planning, as a share of the experts' products.
step:  where the time of a training step goes, and how long it waits for data (--config=...).
sweep: what it gains to train several trials as one program (--config=...).
"""

import json
import re
import sys
from typing import Any

import jax
from absl import flags

from moe_jax import cli, profiling, routing
from moe_jax.benchmark import decode, dispatch, expert_parallel, layer, router, step, sweep
from moe_jax.benchmark.arms import Shape
from moe_jax.benchmark.timing import Ratio
from moe_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object per row.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds of interleaved calls.')
_STEPS = flags.DEFINE_integer('steps', 20, 'step: real steps with the data pipeline.')
_NUM_EXPERTS = flags.DEFINE_list(
  'num_experts',
  None,
  'Values of E; decode, dispatch, layer: 8,64,256; ep: 8,64; router: 8,64,256,1024.',
)
_NUM_TOKENS = flags.DEFINE_integer(
  'num_tokens', 4096, 'dispatch, layer: tokens, one routing group.'
)
_EMBED_DIM = flags.DEFINE_integer('embed_dim', 512, 'decode, dispatch, layer: D.')
_MLP_DIM = flags.DEFINE_integer('mlp_dim', 1024, 'decode, dispatch, layer: F of one expert.')
_SELECTED = flags.DEFINE_integer('num_selected_experts', 2, 'decode, dispatch, layer: K.')
_CAPACITY_FACTOR = flags.DEFINE_float('capacity_factor', 1.25, 'dispatch, layer: of every E.')
_DISPATCH = flags.DEFINE_enum('dispatch', 'gather', ['gather', 'einsum'], 'layer: dispatcher.')
_ACTIVATION = flags.DEFINE_enum(
  'activation', 'swiglu', ['swiglu', 'gelu'], 'decode, dispatch, layer: of all arms.'
)
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'decode, dispatch, layer: of the products.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights, inputs and orders.')
_ROUTERS = flags.DEFINE_list('routers', sorted(routing.ROUTERS), 'router: which.')
_NUM_TRIALS = flags.DEFINE_list('num_trials', ['2', '4', '8'], 'sweep: trials in a pack.')
_ROUTINGS = flags.DEFINE_list('routings', list(dispatch.ROUTINGS), 'dispatch: which.')
_ARMS = flags.DEFINE_list(
  'arms', list(dispatch.ARMS), 'dispatch: which, beside dense and products.'
)
_TOKENS_PER_EXPERT = flags.DEFINE_integer(
  'tokens_per_expert', 0, 'dispatch: as many tokens as give each expert so many; 0 for num_tokens.'
)
_MESHES = flags.DEFINE_list('meshes', ['1x8', '2x4'], 'ep: data x expert of each.')
_BATCHES = flags.DEFINE_list('batches', ['1', '16', '256'], 'decode: sequences at a time.')
_NUM_LAYERS = flags.DEFINE_integer('num_layers', 4, 'decode: of the model; 0 leaves it out.')
_PROFILE = flags.DEFINE_string(
  'profile', None, 'decode, layer, step: directory for traces and tables of the time by part.'
)
_PROFILED = ('decode', 'layer', 'step')
_COMMANDS = ('decode', 'dispatch', 'ep', 'layer', 'router', 'step', 'sweep')


def main() -> None:
  """Runs the benchmark that the first argument names."""
  if _ROUNDS.value < 9:
    raise UserError('--rounds', _ROUNDS.value, 'must be at least 9')
  if _PROFILE.value is not None:
    if _COMMAND not in _PROFILED:
      raise UserError('--profile', _PROFILE.value, f'only {", ".join(_PROFILED)} can be traced')
    profiling.check_directory('--profile', _PROFILE.value)
  if not _JSON.value:
    print(f'on {jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
  {
    'decode': _decode,
    'dispatch': _dispatch,
    'ep': _ep,
    'layer': _layer,
    'router': _router,
    'step': _step,
    'sweep': _sweep,
  }[_COMMAND]()


def _values_of_e(default: list[int]) -> list[int]:
  if _NUM_EXPERTS.value is None:
    return default
  if not all(n.isdigit() and int(n) >= _SELECTED.value for n in _NUM_EXPERTS.value):
    raise UserError('--num_experts', _NUM_EXPERTS.value, 'must be numbers >= num_selected_experts')
  return [int(n) for n in _NUM_EXPERTS.value]


def _router() -> None:
  unknown = [name for name in _ROUTERS.value if name not in routing.ROUTERS]
  if unknown:
    raise UserError('--routers', unknown[0], f'must be of {", ".join(routing.ROUTERS)}')
  rows = router.rows(
    num_experts=_values_of_e([8, 64, 256, 1024]),
    num_tokens=_NUM_TOKENS.value,
    embed_dim=_EMBED_DIM.value,
    mlp_dim=_MLP_DIM.value,
    num_selected_experts=_SELECTED.value,
    capacity_factor=_CAPACITY_FACTOR.value,
    routers=_ROUTERS.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
  )
  for row in rows:
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    if 'not_measured' in row:
      print(f'E={row["num_experts"]:<5} {row["router"]:<15} not measured: {row["not_measured"]}')
      continue
    share = row['share']
    print(
      f'E={row["num_experts"]:<5} {row["router"]:<15}{share["median"]:>8.1%} '
      f'[{share["low"]:.1%}, {share["high"]:.1%}] of the products'
      f'{"  VOID: restless machine" if row["void"] else ""}',
      flush=True,
    )


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
  for flag, known in ((_ROUTINGS, dispatch.ROUTINGS), (_ARMS, dispatch.ARMS)):
    for name in flag.value:
      if name not in known:
        raise UserError(f'--{flag.name}', name, f'must be of {", ".join(known)}')
  if _TOKENS_PER_EXPERT.value < 0:
    raise UserError('--tokens_per_expert', _TOKENS_PER_EXPERT.value, 'must not be below 0')
  rows = dispatch.rows(
    _shape(),
    num_experts=_values_of_e([8, 64, 256]),
    routings=_ROUTINGS.value,
    arms=_ARMS.value,
    tokens_per_expert=_TOKENS_PER_EXPERT.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
  )
  for row in rows:
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    print(
      f'E={row["num_experts"]} {row["routing"]} {row["pass"]}: {row["num_tokens"]} tokens, '
      f'{row["tokens_per_expert"]:.0f} per expert, fullest {row["max_load"]:.2f} x, '
      f'{row["drop_share"]:.1%} dropped, {row["padding"]:.1%} padding, null '
      f'{Ratio(**row["null"])}{"  VOID: restless machine" if row["void"] else ""}'
    )
    for name, arm in row['arms'].items():
      print(
        f'  {name:<12}dense/arm {Ratio(**arm["eta_dense"])!s:<20}products/arm '
        f'{Ratio(**arm["eta_bmm"])!s:<20}compiled in {arm["compile_seconds"]:.1f} s, '
        f'{arm["temporary_bytes"] / 1e6:,.0f} MB temporary'
      )
    for name, why in row['not_measured'].items():
      print(f'  {name:<12}not measured: {why}')
    sys.stdout.flush()


def _decode() -> None:
  numbers = [re.fullmatch(r'[1-9]\d*', batch) for batch in _BATCHES.value]
  if not numbers or not all(numbers):
    raise UserError('--batches', ','.join(_BATCHES.value), 'must be numbers >= 1')
  if _NUM_LAYERS.value < 0:
    raise UserError('--num_layers', _NUM_LAYERS.value, 'must not be below 0')
  rows = decode.rows(
    _shape(),
    batches=[int(batch) for batch in _BATCHES.value],
    num_experts=_values_of_e([8, 64, 256]),
    num_layers=_NUM_LAYERS.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    profile=_PROFILE.value or '',
  )
  for row in rows:
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    chosen = row['experts_chosen']
    print(
      f'E={row["num_experts"]} batch={row["batch"]} {row["level"]}: decode is {row["way"]} with '
      f'{row["rows_in_block"]} rows in a block'
      f'{f", {chosen} experts chosen" if chosen else ""}, null {Ratio(**row["null"])}'
      f'{"  VOID: restless machine" if row["void"] else ""}'
    )
    for name, arm in row['arms'].items():
      size = arm['weight_bytes']
      weights = f', {size / 1e6:,.1f} MB of experts read' if size is not None else ''
      print(
        f'  {name:<12}{arm["tokens_per_second"]:>10,.1f} tokens/s   dense/arm '
        f'{Ratio(**arm["eta_dense"])!s:<20}compiled in {arm["compile_seconds"]:.1f} s, '
        f'{arm["temporary_bytes"] / 1e6:,.1f} MB temporary{weights}'
      )
    for name, why in row['not_measured'].items():
      print(f'  {name:<12}not measured: {why}')
    _print_profile(row)


def _print_profile(row: dict[str, Any]) -> None:
  if 'profile' in row:
    print(profiling.as_text(row['profile']))
  sys.stdout.flush()


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
  for row in rows:
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    sent = ', '.join(f'{size / 1e6:.2f}' for size in row['exchanged_bytes']) or 'nothing'
    print(
      f'E={row["num_experts"]:<4} data={row["mesh"][0]} expert={row["mesh"][1]} {row["pass"]:<17}'
      f'one device / mesh {Ratio(**row["speed"])}, null {Ratio(**row["null"])}, MB sent by each '
      f'device: {sent} (formula {row["formula_bytes"] / 1e6:.2f} each)'
      f'{"  VOID: restless machine" if row["void"] else ""}',
      flush=True,
    )


def _layer() -> None:
  rows = layer.rows(
    _shape(),
    num_experts=_values_of_e([8, 64, 256]),
    dispatch=_DISPATCH.value,
    rounds=_ROUNDS.value,
    seed=_SEED.value,
    profile=_PROFILE.value or '',
  )
  if not _JSON.value:
    print(
      f'{"E":>5} {"pass":<17}{"dense/MoE":<20}{"products/MoE":<20}{"null":<20}'
      f'{"drops":>7}{"padding":>9}{"tokens/E":>10}{"fullest":>9}{"compile s":>10}{"temporary":>11}'
    )
  for row in rows:
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    eta = {name: str(Ratio(**row[name])) for name in ('eta_dense', 'eta_bmm', 'null')}
    print(
      f'{row["num_experts"]:>5} {row["pass"]:<17}{eta["eta_dense"]:<20}{eta["eta_bmm"]:<20}'
      f'{eta["null"]:<20}{row["drop_share"]:>7.1%}{row["padding"]:>9.1%}'
      f'{row["tokens_per_expert"]:>10.0f}{row["max_load"]:>8.2f}x{row["compile_seconds"]:>10.1f}'
      f'{row["temporary_bytes"] / 1e6:>8,.0f} MB'
      f'{"  VOID: restless machine" if row["void"] else ""}',
    )
    _print_profile(row)


def _step() -> None:
  result = step.shares(_CONFIG(), _ROUNDS.value, _STEPS.value, _PROFILE.value or '')
  if _JSON.value:
    print(json.dumps(result))
    return
  for name in ('forward', 'backward', 'optimizer'):
    print(f'{name:<12}{result[name]:>7.1%} of a step')
  print(f'{"data wait":<12}{result["data_wait"]:>7.2%} of the time of {_STEPS.value} real steps')
  print(f'compilations of the step: {result["compilations"]}')
  _print_profile(result)


def _sweep() -> None:
  numbers = _NUM_TRIALS.value
  if not all(n.isdigit() and int(n) >= 2 for n in numbers):
    raise UserError('--num_trials', numbers, 'must be numbers >= 2')
  for row in sweep.rows(_CONFIG(), [int(n) for n in numbers], _ROUNDS.value, _SEED.value):
    if _JSON.value:
      print(json.dumps(row), flush=True)
      continue
    print(
      f'{row["num_trials"]:>3} trials: one by one / packed {Ratio(**row["gain"])}, null '
      f'{Ratio(**row["null"])}{"  VOID: restless machine" if row["void"] else ""}',
      flush=True,
    )


def _take_command(argv: list[str]) -> str:
  """Takes the command out of the arguments: absl knows flags only."""
  if len(argv) < 2 or argv[1] not in _COMMANDS:
    given = argv[1] if len(argv) > 1 else None
    cli.fail(f'benchmark={given!r}: must be one of {", ".join(_COMMANDS)}')
  return argv.pop(1)


if __name__ == '__main__':
  _COMMAND = _take_command(sys.argv)
  cli.run(main)
