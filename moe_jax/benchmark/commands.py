"""The benchmarks as the flags ask for them: sizes to rows, rows to lines."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import ml_collections
from absl import flags

from moe_jax import cli, profiling, routing
from moe_jax.benchmark import (
  arms,
  decode,
  dispatch,
  expert_parallel,
  layer,
  names,
  peers,
  router,
  routings,
  step,
  sweep,
  text,
  timing,
)
from moe_jax.benchmark.arms import Shape
from moe_jax.errors import UserError, did_you_mean

# Defined by the module that is run.
FLAGS = flags.FLAGS


def run(command: str, config: Callable[[], ml_collections.ConfigDict]) -> None:
  """Runs a benchmark and prints its rows.

  Args:
    command: its name.
    config: gives that of --config.

  Raises:
    UserError: if a flag is wrong, or the device has not enough memory.
  """
  if FLAGS.profile is not None:
    profiling.check_directory('--profile', FLAGS.profile)
  if not FLAGS.json:
    print(f'on {jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
  benchmark = {
    'decode': _decode,
    'dispatch': _dispatch,
    'ep': _ep,
    'layer': _layer,
    'router': _router,
    'step': lambda: _step(config()),
    'sweep': lambda: _sweep(config()),
  }[command]
  try:
    benchmark()
  except jax.errors.JaxRuntimeError as error:
    if not timing.is_out_of_memory(error):
      raise
    why = str(error).splitlines()[0]
    raise UserError('benchmark', command, f'the device has not enough memory: {why}') from error


def _numbers(name: str, lowest: int) -> list[int]:
  flag = FLAGS[name]
  if not flag.value or not all(n.isdigit() and int(n) >= lowest for n in flag.value):
    raise UserError(f'--{flag.name}', flag.value, f'must be numbers >= {lowest}')
  numbers = [int(n) for n in flag.value]
  _check_once(flag, numbers)
  return numbers


def _check_once(flag: flags.Flag, values: Sequence[Any]) -> None:
  twice = [value for value in values if values.count(value) > 1]
  if twice:
    raise UserError(f'--{flag.name}', flag.value, f'names {twice[0]} more than once')


def _names(name: str, known: Collection[str]) -> list[str]:
  flag = FLAGS[name]
  if not flag.value:
    raise UserError(f'--{flag.name}', '', f'must name some of {", ".join(known)}')
  _check_once(flag, flag.value)
  for word in flag.value:
    if word not in known:
      near = did_you_mean(word, known)
      raise UserError(f'--{name}', word, f'must be of {", ".join(known)}{near}')
  return flag.value


def _values_of_e(default: list[int]) -> list[int]:
  return (
    default if FLAGS.num_experts is None else _numbers('num_experts', FLAGS.num_selected_experts)
  )


def _tokens_per_expert() -> int:
  if FLAGS.tokens_per_expert < 0:
    raise UserError('--tokens_per_expert', FLAGS.tokens_per_expert, 'must not be below 0')
  if FLAGS.tokens_per_expert and FLAGS['num_tokens'].present:
    raise UserError('--num_tokens', FLAGS.num_tokens, 'is given by --tokens_per_expert; leave one')
  return FLAGS.tokens_per_expert


def _show(rows: Iterable[dict[str, Any]], of_row: Callable[[dict[str, Any]], str]) -> None:
  for row in rows:
    try:
      print(json.dumps(row) if FLAGS.json else of_row(row), flush=True)
    except BrokenPipeError:
      cli.end_of_reading()


def _router() -> None:
  rows = router.rows(
    num_experts=_values_of_e([8, 64, 256, 1024]),
    num_tokens=FLAGS.num_tokens,
    embed_dim=FLAGS.embed_dim,
    mlp_dim=FLAGS.mlp_dim,
    num_selected_experts=FLAGS.num_selected_experts,
    capacity_factor=FLAGS.capacity_factor,
    dtype=FLAGS.dtype,
    routers=_names('routers', routing.ROUTERS),
    router_dtype=FLAGS.router_dtype,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
  )
  _show(rows, text.of_router)


def _shape() -> Shape:
  return Shape(
    num_tokens=FLAGS.num_tokens,
    embed_dim=FLAGS.embed_dim,
    mlp_dim=FLAGS.mlp_dim,
    num_selected_experts=FLAGS.num_selected_experts,
    capacity_factor=FLAGS.capacity_factor,
    activation=FLAGS.activation,
    dtype=FLAGS.dtype,
  )


def _dispatch() -> None:
  chosen, shape = _names('routings', names.ROUTINGS), _shape()
  num_experts, tokens_per_expert = _values_of_e([8, 64, 256, 1024]), _tokens_per_expert()
  trace = None
  if names.TRACE in chosen:
    most = arms.with_tokens_per_expert(shape, tokens_per_expert, max(num_experts))
    trace = routings.record(cli.required(FLAGS['workdir']), most.num_tokens, FLAGS.data_dir)
    if FLAGS.num_experts is None:
      num_experts = [trace.num_experts]
  else:
    for flag in (FLAGS['workdir'], FLAGS['data_dir']):
      if flag.value is not None:
        raise UserError(f'--{flag.name}', flag.value, f'only read with --routings={names.TRACE}')
  if FLAGS.peers:
    peers.libraries()
  names_of_arms = _names('arms', (*names.ARMS, names.TOKAMAX))
  if names.TOKAMAX in names_of_arms:
    peers.tokamax_ragged_dot()
  rows = dispatch.rows(
    shape,
    num_experts=num_experts,
    routings=chosen,
    arms=names_of_arms,
    tokens_per_expert=tokens_per_expert,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    trace=trace,
    peers=FLAGS.peers,
    reuse_memory=FLAGS.reuse_memory,
  )
  _show(rows, text.of_dispatch)


def _decode() -> None:
  if FLAGS.num_layers < 0:
    raise UserError('--num_layers', FLAGS.num_layers, 'must not be below 0')
  rows = decode.rows(
    _shape(),
    batches=_numbers('batches', 1),
    num_experts=_values_of_e([8, 64, 256]),
    num_layers=FLAGS.num_layers,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    profile=FLAGS.profile or '',
  )
  _show(rows, lambda row: text.of_decode(row) + _profile_text(row))


def _profile_text(row: dict[str, Any]) -> str:
  return f'\n{profiling.as_text(row["profile"])}' if 'profile' in row else ''


def _ep() -> None:
  if not all(re.fullmatch(r'[1-9]\d*x[1-9]\d*', mesh) for mesh in FLAGS.meshes):
    raise UserError('--meshes', ','.join(FLAGS.meshes), 'must read DATAxEXPERT,...')
  meshes = [(int(data), int(expert)) for data, expert in (m.split('x') for m in FLAGS.meshes)]
  rows = expert_parallel.rows(
    _shape(),
    num_experts=_values_of_e([8, 64]),
    meshes=meshes,
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
  )
  _show(rows, text.of_expert_parallel)


def _layer() -> None:
  if FLAGS.num_groups < 1:
    raise UserError('--num_groups', FLAGS.num_groups, 'must be at least 1')
  rows = layer.rows(
    _shape(),
    num_experts=_values_of_e([8, 64, 256, 1024]),
    dispatch=FLAGS.dispatch,
    tokens_per_expert=_tokens_per_expert(),
    rounds=FLAGS.rounds,
    seed=FLAGS.seed,
    profile=FLAGS.profile or '',
    num_groups=FLAGS.num_groups,
    reuse_memory=FLAGS.reuse_memory,
  )
  if not FLAGS.json:
    print(text.LAYER_HEAD)
  _show(rows, lambda row: text.of_layer(row) + _profile_text(row))


def _step(config: ml_collections.ConfigDict) -> None:
  result = step.shares(config, FLAGS.rounds, FLAGS.steps, FLAGS.profile or '')
  if FLAGS.json:
    print(json.dumps(result))
    return
  for name in ('forward', 'backward', 'optimizer'):
    print(f'{name:<12}{result[name]:>7.1%} of a step')
  print(f'{"data wait":<12}{result["data_wait"]:>7.2%} of the time of {FLAGS.steps} real steps')
  print(f'compilations of the step: {result["compilations"]}{_profile_text(result)}')


def _sweep(config: ml_collections.ConfigDict) -> None:
  numbers = _numbers('num_trials', 2)
  _show(sweep.rows(config, numbers, FLAGS.rounds, FLAGS.seed), text.of_sweep)
