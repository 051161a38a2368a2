"""Checks and times the MoE layer on an accelerator within ten minutes.

  ./launch/accelerator [--peers] [--minutes=10] [--out=FILE]     sets up what is missing, then runs
  python launch/accelerator.py ...                               this, where everything is there

First y and all gradients of each dispatcher on the accelerator against one-hot products on the CPU,
in float32 at full precision, under a skewed router; a difference, or a NaN, ends it with exit code
1. Then what the product of the router costs in float32 and in bfloat16, and `moe_jax.benchmark
dispatch` in bfloat16 on the shapes below, until the time is up, with tokamax's `ragged_dot` beside
ours where it is installed; at the end each of our arms beside what it should reach. A benchmark
that fails is named and the others go on; then, and where nothing was measured, the exit code is 1,
too. Ctrl-C and SIGTERM end it with 130 and 143, after what was reached so far.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Layers(NamedTuple):
  """Layers that are timed in one call: tokens, D, F, E (or several), K."""

  tokens: int
  width: int
  hidden: int
  experts: str
  selected: int


# The first four are layers of published models.
SHAPES = (
  Layers(32_768, 2_048, 1_024, '64', 8),
  Layers(32_768, 2_048, 768, '128', 8),
  Layers(16_384, 4_096, 14_336, '8', 2),
  Layers(32_768, 1_536, 256, '512', 8),
  Layers(32_768, 1_024, 512, '8,64,256,1024', 8),
)
CASES = (('gather', 1.0), ('gather', None), ('dropless', 1.0), ('dropless', None))
TOLERANCE = 1e-5
# Products / arm that is asked for, where experts have at least so many tokens.
TARGETS = {'forward': 0.85, 'forward+backward': 0.75}
LEAST_TOKENS = 512
MOST_MINUTES = 24 * 60
ARMS = ('gather', 'dropless')


def check() -> float:
  """Prints and returns the largest relative error (norm of the difference over the norm)."""
  import dataclasses

  import jax
  import jax.numpy as jnp
  import numpy as np

  from moe_jax.benchmark import layer
  from moe_jax.benchmark.arms import Shape, expert_weights
  from moe_jax.layers.moe_layer import moe_layer
  from moe_jax.layers.moe_options import TokenInfo
  from moe_jax.parallel.mesh import make_mesh

  tokens, width, experts = 2048, 256, 16
  shape = Shape(tokens, width, 256, 2, 1.0, 'swiglu', 'float32')
  cpu, device = jax.devices('cpu')[0], jax.devices()[0]
  with jax.default_device(cpu):
    keys = jax.random.split(jax.random.key(3), 3)
    # The first feature is 3 in every token: expert 0 is asked for by most.
    router = (jax.random.normal(keys[1], (width, experts)) / 16).at[0, 0].set(1.0)
    params = expert_weights(keys[0], shape, experts)._replace(router={'router': router})
    x = jax.random.normal(keys[2], (1, tokens, width)).at[..., 0].set(3.0)
    places = jnp.zeros((1, tokens), jnp.int32)
    rest = (TokenInfo(jnp.ones((1, tokens), bool), places, places), jax.random.split(keys[2], 1))

  def result(on, name, factor):
    options = dataclasses.replace(layer.options_of(shape, experts, name), capacity_factor=factor)
    mesh = make_mesh(1, 1, [on])
    info, group_keys = jax.device_put(rest, on)

    def loss(params, x):
      y = moe_layer(
        x, info, params, state={}, keys=group_keys, mesh=mesh, options=options, deterministic=True
      )[0]
      return jnp.sum(jnp.square(y)), y

    with jax.default_matmul_precision('highest'), jax.set_mesh(mesh):
      program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
      (_, y), gradients = program(*jax.device_put((params, x), on))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]

  worst = []
  print(f'on {device.device_kind}, JAX {jax.__version__}')
  for name, factor in CASES:
    pairs = zip(result(device, name, factor), result(cpu, 'einsum', factor), strict=True)
    # Python's max would lose a NaN, np.max does not.
    error = np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    worst.append(error)
    print(f'{name}, capacity factor {factor}: relative error {error:.1e}', flush=True)
  return float(np.max(worst))


def only_check(on_cpu: bool, peers: bool) -> None:
  """Checks, in a process of its own: JAX keeps the memory of a GPU as long as its process lives."""
  import jax

  from moe_jax.benchmark.peers import libraries
  from moe_jax.errors import UserError

  if not on_cpu and jax.default_backend() == 'cpu':
    _refuse("devices='cpu': no accelerator is here; --smaller=32 tries the script without one")
  if peers:
    try:
      libraries()
    except UserError as error:
      _refuse(str(error))
  if not check() < TOLERANCE:
    sys.exit(f'error: the accelerator differs from the CPU by {TOLERANCE} or more')


def main(words: list[str]) -> None:
  """Runs the check, then the benchmarks, and says what they reached."""
  flags = _flags(words)
  if flags.only_flags:
    return
  if flags.only_check:
    only_check(flags.smaller > 1, flags.peers)
    return
  _set_signals(lambda number, _: sys.exit(128 + number))
  rows: list[tuple[list[str], dict[str, Any]]] = []
  failed: list[str] = []
  try:
    _run_all(flags, rows, failed)
  finally:
    # What is said below is said to its end.
    _set_signals(signal.SIG_IGN)
    if _has_layers(rows):
      print('\n'.join(verdicts(rows)), flush=True)
  if failed:
    sys.exit('error: failed, see above: ' + '; '.join(failed))
  if not _has_layers(rows):
    sys.exit(f'error: --minutes={flags.minutes}: over before a layer was measured')


def _run_all(
  flags: argparse.Namespace, rows: list[tuple[list[str], dict[str, Any]]], failed: list[str]
) -> None:
  """Fills in what the benchmarks measured, and which of them failed."""
  end = time.monotonic() + 60 * flags.minutes
  of_check = [__file__, '--only_check', f'--smaller={flags.smaller}', *['--peers'] * flags.peers]
  check_ = Child(of_check, end)
  for line in check_:
    print(line, flush=True)
  if check_.is_late:
    sys.exit(f'error: --minutes={flags.minutes}: over before the check was')
  if check_.code:
    sys.exit(check_.code)
  if not importlib.util.find_spec('tokamax'):
    print('tokamax is not installed, and left out')
  for command in commands(flags.peers, flags.smaller):
    print('python', ' '.join(command), flush=True)
    child = Child(command, end)
    for line in child:
      row = _row(line)
      if row is None:
        print(line, flush=True)
        continue
      rows.append((command, row))
      print(_text(command, row), flush=True)
      try:
        _write(flags, {'command': ' '.join(command), **row})
      except OSError as error:
        failed.append(f'--out={flags.out}: {error.strerror}; without it from then on')
        flags.out = None
    if child.is_late:
      print('the time is up; what is missing was not measured')
      return
    if child.code:
      failed.append(' '.join(command))


def _has_layers(rows: list[tuple[list[str], dict[str, Any]]]) -> bool:
  return any('arms' in row for _, row in rows)


def _set_signals(handler: Any) -> None:
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, handler)


def _write(flags: argparse.Namespace, row: dict[str, Any]) -> None:
  if flags.out is not None:
    with open(flags.out, 'a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')


class Child:
  """A process of Python, killed when the time is up or its reader leaves.

  Iterating runs it and gives the lines that it prints.

  Attributes:
    code: how it ended; 0 if it was killed as the time was up.
    is_late: whether it was.
  """

  def __init__(self, command: list[str], end: float):
    self._command, self._end = command, end
    self.code, self.is_late = 0, False

  def __iter__(self) -> Iterator[str]:
    # Other processes and other libraries need memory of the same device. Ctrl-C is for us alone.
    with subprocess.Popen(
      [sys.executable, *self._command],
      cwd=ROOT,
      env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,
    ) as process:
      timer = threading.Timer(max(0.0, self._end - time.monotonic()), self._stop, [process])
      timer.start()
      try:
        # What was being written when it was killed has no end of line.
        yield from (line[:-1] for line in process.stdout or () if line.endswith('\n'))
        code = process.wait()
        self.code = 0 if self.is_late else code
      finally:
        timer.cancel()
        process.kill()

  def _stop(self, process: subprocess.Popen) -> None:
    self.is_late = True
    process.kill()


def commands(peers: bool, smaller: int = 1) -> list[list[str]]:
  """Returns the benchmarks in their order: the router's two products, then the shapes."""
  result = []
  for layers in SHAPES:
    tokens, width, hidden = (-(-size // smaller) for size in layers[:3])
    shape = [
      *('--json', '--dtype=bfloat16', f'--num_tokens={tokens}', f'--embed_dim={width}'),
      *(f'--mlp_dim={hidden}', f'--num_experts={layers.experts}'),
      f'--num_selected_experts={layers.selected}',
    ]
    if not result:
      for dtype in ('float32', 'bfloat16'):
        flags = ['--routers=top_k,loss_free', f'--router_dtype={dtype}']
        result.append(['-m', 'moe_jax.benchmark', 'router', *flags, *shape])
    others = 'ragged_dot,tokamax,copy' if importlib.util.find_spec('tokamax') else 'ragged_dot,copy'
    flags = ['--routings=uniform', f'--arms={",".join(ARMS)},{others}']
    more = ['--peers'] if peers else []
    result.append(['-m', 'moe_jax.benchmark', 'dispatch', *flags, *shape, *more])
  return result


def verdicts(rows: list[tuple[list[str], dict[str, Any]]]) -> list[str]:
  """Returns a line for each of our arms in each row of `dispatch`: what it reached, and the target.

  Args:
    rows: of the benchmarks, each with its command.
  """
  from moe_jax.benchmark.timing import Ratio

  lines = [
    f'{"D":>6}{"F":>7}{"E":>6} {"tokens/E":>9} {"pass":<17}{"arm":<10}{"products/arm":<21}target'
  ]
  for command, row in rows:
    if 'arms' not in row:
      continue
    width, hidden = (_value(command, name) for name in ('--embed_dim', '--mlp_dim'))
    for name in ARMS:
      head = (
        f'{width:>6}{hidden:>7}{row["num_experts"]:>6} {row["tokens_per_expert"]:>9,.0f} '
        f'{row["pass"]:<17}{name:<10}'
      )
      if name not in row['arms']:
        lines.append(f'{head}not measured: {row["not_measured"][name]}')
        continue
      eta, target = Ratio(**row['arms'][name]['eta_bmm']), TARGETS[row['pass']]
      asked = f'none below {LEAST_TOKENS} tokens'
      if row['tokens_per_expert'] >= LEAST_TOKENS:
        asked = f'{target} {"reached" if eta.median >= target else "missed"}'
      ahead = ''
      if row['peers']:
        peer = Ratio(**row['peers']['ours'][name])
        ahead = f', grouped_mm/arm {_exact(peer)} {"ahead" if peer.median > 1 else "not ahead"}'
      void = row['void'] or bool(row['peers'] and row['peers']['void'])
      lines.append(f'{head}{_exact(eta):<21}{asked}{ahead}{", VOID" if void else ""}')
  return lines


def _exact(ratio: Any) -> str:
  """Returns a ratio so that none which is below its target looks as if it were not."""
  return f'{ratio.median:.3f} [{ratio.low:.2f}, {ratio.high:.2f}]'


def _flags(words: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.error = _refuse  # type: ignore[method-assign]
  add = parser.add_argument
  add('--peers', action='store_true', help="adds transformers' grouped_mm; needs torch, too")
  add('--minutes', type=float, default=10, help='until it stops; installing is not counted')
  add('--out', help='file that rows are added to as they come, as JSON')
  add('--smaller', type=int, default=1, help='divides tokens, D and F, to try it on a CPU')
  for name in ('--only_check', '--only_flags'):
    add(name, action='store_true', help=argparse.SUPPRESS)
  flags = parser.parse_args(words)
  if not 0 < flags.minutes <= MOST_MINUTES:
    _refuse(f'--minutes={flags.minutes}: must be above 0 and at most {MOST_MINUTES}')
  if flags.smaller < 1:
    _refuse(f'--smaller={flags.smaller}: must be at least 1')
  if flags.out is not None:
    try:
      with open(flags.out, 'a', encoding='utf-8') as file:
        file.write('')
    except OSError as error:
      _refuse(f'--out={flags.out}: cannot be written: {error.strerror}')
  return flags


def _refuse(what: str) -> None:
  print(f'error: {what}', file=sys.stderr)
  sys.exit(2)


def _row(line: str) -> dict[str, Any] | None:
  """Returns the row that a line is; other libraries may print lines of their own."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def _text(command: list[str], row: dict[str, Any]) -> str:
  from moe_jax.benchmark import text

  return text.of_dispatch(row) if 'dispatch' in command else text.of_router(row)


def _value(command: list[str], flag: str) -> str:
  return next(word.partition('=')[2] for word in command if word.startswith(f'{flag}='))


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
    sys.stdout.flush()
  except BrokenPipeError:
    # Whoever reads has enough, as `head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
