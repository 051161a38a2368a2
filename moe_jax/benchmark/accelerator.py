"""Checks and times the MoE layer on an accelerator within ten minutes.

  ./launch/accelerator [--peers] [--minutes=10] [--out=FILE]     sets up what is missing, then runs
  python -m moe_jax.benchmark.accelerator ...                    this, where everything is there

First y and all gradients of each dispatcher on the accelerator against one-hot matmuls on the CPU,
in float32 at full precision, under a skewed router; a difference, or a NaN, ends the check with
exit code 1. Then the cost of the router's matmul in float32 and in bfloat16, and the suite
`dispatch` in bfloat16 on the layers of `SHAPES`, until the time is up, with tokamax's `ragged_dot`
in the same rounds where it is installed; at the end each of our arms next to its target. A
benchmark that fails is named and the others go on; then, and where nothing was measured, the exit
code is 1, too. Ctrl-C and SIGTERM end it with 130 and 143, after the lines on what was reached so
far.
"""

# Imports only the standard library: the launcher prints the help and checks flags before anything
# else is installed.

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
from typing import Any, NamedTuple, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[2]
# This program, for a process of its own.
PROGRAM = ('-m', 'moe_jax.benchmark.accelerator')


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
# The ratio matmuls / arm to be reached, where experts have at least this many tokens.
TARGETS = {'forward': 0.85, 'forward+backward': 0.75}
LEAST_TOKENS = 512
MOST_MINUTES = 24 * 60
ARMS = ('gather', 'dropless')


def main(words: list[str]) -> None:
  """Runs the check, then the benchmarks, and prints what they reached."""
  flags = _flags(words)
  if flags.only_flags:
    return
  if flags.only_check:
    from moe_jax.benchmark import accelerator_check
    from moe_jax.errors import UserError

    try:
      accelerator_check.main(on_cpu=flags.smaller > 1, peers=flags.peers)
    except UserError as error:
      _refuse(str(error))
    return
  _set_signals(lambda number, _: sys.exit(128 + number))
  rows: list[tuple[list[str], dict[str, Any]]] = []
  failed: list[str] = []
  try:
    _run_all(flags, rows, failed)
  finally:
    # The lines below are printed to their end.
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
  """Adds the rows that the benchmarks measured, and the names of those that failed."""
  end = time.monotonic() + 60 * flags.minutes
  check_command = [
    *PROGRAM,
    '--only_check',
    f'--smaller={flags.smaller}',
    *['--peers'] * flags.peers,
  ]
  check_ = Child(check_command, end)
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
    # Other processes and other libraries need memory of the same device. Only this process takes
    # Ctrl-C.
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
        # A line that was being written when it was killed has no end.
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
  """Returns the benchmarks in their order: the router's matmul in two dtypes, then the shapes."""
  result: list[list[str]] = []
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
  """Returns a line for each of our arms in each row of `dispatch`: its ratio and its target.

  Args:
    rows: of the benchmarks, each with its command.
  """
  from moe_jax.benchmark.harness.tables import Ratio

  lines = [
    f'{"D":>6}{"F":>7}{"E":>6} {"tokens/E":>9} {"pass":<17}{"arm":<10}{"matmuls/arm":<21}target'
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
      verdict = f'none below {LEAST_TOKENS} tokens'
      if row['tokens_per_expert'] >= LEAST_TOKENS:
        verdict = f'{target} {"reached" if eta.median >= target else "missed"}'
      ahead = ''
      if row['peers']:
        peer = Ratio(**row['peers']['ours'][name])
        ahead = f', grouped_mm/arm {_exact(peer)} {"ahead" if peer.median > 1 else "not ahead"}'
      invalid = row['void'] or bool(row['peers'] and row['peers']['void'])
      lines.append(f'{head}{_exact(eta):<21}{verdict}{ahead}{", INVALID" if invalid else ""}')
  return lines


def _exact(ratio: Any) -> str:
  """Returns a ratio so that none which is below its target looks as if it were not."""
  return f'{ratio.median:.3f} [{ratio.low:.2f}, {ratio.high:.2f}]'


class _Parser(argparse.ArgumentParser):
  """Reports a wrong flag in one line."""

  def error(self, message: str) -> NoReturn:
    """Prints the line and leaves."""
    _refuse(message)


def _flags(words: list[str]) -> argparse.Namespace:
  parser = _Parser(
    prog='./launch/accelerator',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
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


def _refuse(what: str) -> NoReturn:
  """Prints one `error:` line and leaves."""
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
  from moe_jax.benchmark.suites import dispatch, router

  return dispatch.line(row) if 'dispatch' in command else router.line(row)


def _value(command: list[str], flag: str) -> str:
  return next(word.partition('=')[2] for word in command if word.startswith(f'{flag}='))


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
    sys.stdout.flush()
  except BrokenPipeError:
    # The reader has enough, as `head`.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
