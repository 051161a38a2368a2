"""Traces of compiled programs, and where their time goes, part by part.

The model names its parts by `jax.named_scope`. XLA keeps the names in the metadata of its
operations, the profiler records which operation ran when, and `time_by_part` puts both together.
"""

import collections
import contextlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import UserError, is_refusal
from moe_jax.files import write_atomically

# Scopes of the model and of the step, in the order of a step. The exchanges between devices belong
# to dispatch (there) and combine (back); `statistics` is what losses and metrics of routers read.
PARTS = (
  'embedding',
  'attention',
  'mlp',
  'router',
  'plan',
  'dispatch',
  'experts',
  'combine',
  'statistics',
  'cross_entropy',
  'optimizer',
)
# other: operations of no part. idle: no operation ran, the devices waited for the host.
OTHER, IDLE = 'other', 'idle'
TABLE = 'time_by_part.json'
_WINDOW = 'moe_jax: traced'
# Operations that last as long as those within them.
_CONTAINERS = frozenset({'while', 'call', 'conditional'})
# A name, a type (maybe a tuple of many), and the first word before a parenthesis: the opcode.
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(')


class Operations(NamedTuple):
  """Operations of a compiled program, read from its text.

  Attributes:
    part: of `PARTS`, or `OTHER`.
    containers: that last as long as others within them.
  """

  part: dict[str, str]
  containers: frozenset[str]


class Table(NamedTuple):
  """Time of a trace by part of the model.

  Attributes:
    seconds: that were traced, by the clock.
    seconds_of: each part, `OTHER` and `IDLE`; they add up to `seconds`. Where several operations
      run at once, on one device or on several, each gets an equal share of that time.
    num_steps: that were traced.
  """

  seconds: float
  seconds_of: dict[str, float]
  num_steps: int

  def to_json(self) -> dict[str, Any]:
    """Returns seconds of a step and shares of the whole, by part."""
    return {
      'steps': self.num_steps,
      'seconds_per_step': self.seconds / self.num_steps,
      'parts': {
        part: {'seconds_per_step': value / self.num_steps, 'share': value / self.seconds}
        for part, value in self.seconds_of.items()
      },
    }

  def __str__(self) -> str:
    return as_text(self.to_json())


def as_text(table: dict[str, Any]) -> str:
  """Returns a table for the terminal, from `Table.to_json`."""
  lines = [f'{"part":<14}{"ms per step":>12}{"share":>9}']
  for part, row in table['parts'].items():
    lines.append(f'{part:<14}{1e3 * row["seconds_per_step"]:>12.3f}{row["share"]:>9.1%}')
  lines.append(f'{"all":<14}{1e3 * table["seconds_per_step"]:>12.3f}{1:>9.1%}')
  return '\n'.join(lines)


def check_directory(flag: str, directory: str) -> None:
  """Raises UserError, naming the flag, if no trace can be written there."""
  path = pathlib.Path(directory)
  if not directory:
    raise UserError(flag, directory, 'must name a directory')
  existing = next(p for p in (path, *path.absolute().parents) if p.exists())
  if not existing.is_dir():
    raise UserError(flag, directory, f'{existing} is not a directory')
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(flag, directory, f'cannot be made: {error.strerror}') from error


@contextlib.contextmanager
def traced(flag: str, directory: str) -> Iterator[None]:
  """Records what runs within, which must have ended before the block does.

  Writes what TensorBoard and Perfetto read: `plugins/profile/DATE/*.xplane.pb` and
  `perfetto_trace.json.gz`.

  Raises:
    UserError: naming the flag, if the directory cannot be written.
  """
  options = jax.profiler.ProfileOptions()
  # Every call of Python would be an event, and cost more than what is measured.
  options.python_tracer_level = 0
  options.host_tracer_level = 2
  try:
    pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    jax.profiler.start_trace(directory, create_perfetto_trace=True, profiler_options=options)
    try:
      with jax.profiler.TraceAnnotation(_WINDOW):
        yield
    finally:
      jax.profiler.stop_trace()
  except OSError as error:
    if not is_refusal(error):
      raise
    raise UserError(flag, directory, f'cannot be written: {error.strerror}') from error


def trace_calls(
  call: Callable[[], Any], program: str, flag: str, directory: str, num_calls: int = 3
) -> Table:
  """Traces some calls of a compiled program, and writes the trace and the table.

  Args:
    call: runs the program once and waits for it.
    program: its text, as compiled.
    flag: named in the error if the directory cannot be written.
    directory: new, or of earlier traces.
    num_calls: that are traced.
  """
  with traced(flag, directory):
    for _ in range(num_calls):
      call()
  return write_table(directory, program, num_calls)


def write_table(directory: str, program: str, num_steps: int) -> Table:
  """Returns the table of the newest trace in a directory, and writes it next to the trace."""
  table = time_by_part(newest_trace(directory), {module_name(program): operations(program)})
  table = table._replace(num_steps=num_steps)
  text = json.dumps(table.to_json(), indent=2)
  write_atomically(pathlib.Path(directory) / TABLE, text + '\n')
  return table


def newest_trace(directory: str) -> pathlib.Path:
  """Returns the newest trace of a directory."""
  traces = pathlib.Path(directory).glob('plugins/profile/*/*.xplane.pb')
  return max(traces, key=lambda path: path.stat().st_mtime_ns)


def module_name(program: str) -> str:
  """Returns the name of a compiled program, by which the trace calls it."""
  found = re.match(r'HloModule ([^\s,]+)', program)
  assert found, program[:80]
  return found[1]


def part_of(op_name: str) -> str:
  """Returns the innermost part that a path of scopes names, as in 'jit(step)/jvp(router)/mul'."""
  for word in reversed(re.findall(r'[\w\-]+', op_name)):
    if word in PARTS:
      return word
  return OTHER


def operations(program: str) -> Operations:
  """Reads the operations out of the text of a compiled program.

  XLA makes operations that bear no name of their own. One that wraps others has the part of most of
  them; any other that of what uses it, or else of what it uses.
  """
  named: dict[str, str] = {}
  containers, nameless = set(), {}
  users: dict[str, list[str]] = collections.defaultdict(list)
  inner: dict[str, list[str]] = collections.defaultdict(list)
  computation = ''
  for line in program.splitlines():
    found = _INSTRUCTION.match(line)
    if not found:
      opening = re.match(r'^(?:ENTRY )?%?([\w.\-]+) .*\{$', line)
      computation = opening[1] if opening else computation
      continue
    name, opcode = found.groups()
    rest, _, metadata = line[found.end() :].partition('metadata={')
    used = re.findall(r'%([\w.\-]+)', rest)
    for other in used:
      users[other].append(name)
    if opcode in _CONTAINERS:
      containers.add(name)
    op_name = re.search(r'op_name="([^"]*)"', metadata)
    if op_name:
      named[name] = part_of(op_name[1])
      inner[computation].append(named[name])
    else:
      nameless[name] = used
  for name, used in nameless.items():
    wrapped = [part for other in used for part in inner.get(other, ()) if part != OTHER]
    if wrapped:
      named[name] = collections.Counter(wrapped).most_common(1)[0][0]
  for _ in range(4):
    for name, used in nameless.items():
      near = [named[other] for other in (*users[name], *used) if other in named]
      known = [part for part in near if part != OTHER]
      if name not in named and known:
        named[name] = known[0]
  return Operations(named, frozenset(containers))


def time_by_part(trace: pathlib.Path, programs: Mapping[str, Operations]) -> Table:
  """Adds up the time of a trace by parts.

  Args:
    trace: an `.xplane.pb` that `traced` wrote.
    programs: by name. Operations of others belong to `OTHER`.

  Returns:
    The table, as of one step.
  """
  window, events = _read(trace)
  parts = (*PARTS, OTHER)
  number = {part: i for i, part in enumerate(parts)}
  spans, rows = [], []
  for module, name, start, end in events:
    program = programs.get(module)
    start, end = max(start, window[0]), min(end, window[1])
    if end <= start:
      continue
    part = OTHER if program is None else program.part.get(name, OTHER)
    contains = program is not None and name in program.containers
    spans.append((start, end))
    rows.append(number[part] + contains * len(parts))
  seconds = _shared_time(np.array(spans).reshape(-1, 2), np.array(rows, int), 2 * len(parts))
  inside = seconds[: len(parts)] + seconds[len(parts) :]
  total = (window[1] - window[0]) / 1e9
  seconds_of = dict(zip(parts, inside.tolist(), strict=True))
  return Table(total, seconds_of | {IDLE: total - float(inside.sum())}, 1)


def _shared_time(spans: np.ndarray, rows: np.ndarray, num_rows: int) -> np.ndarray:
  """Returns the seconds of each row: what runs at once shares the time.

  Args:
    spans: start and end of each event [N 2], in nanoseconds.
    rows: of each event. The second half of the rows counts only while none of the first half runs.
    num_rows: even.
  """
  if not len(spans):
    return np.zeros(num_rows)
  borders, border = np.unique(spans, return_inverse=True)
  border = border.reshape(spans.shape)
  changes = np.zeros((num_rows, len(borders)))
  np.add.at(changes, (rows, border[:, 0]), 1)
  np.add.at(changes, (rows, border[:, 1]), -1)
  running = np.cumsum(changes, axis=1)[:, :-1]
  half = num_rows // 2
  running[half:] *= running[:half].sum(axis=0) == 0
  number = running.sum(axis=0)
  share = running / np.maximum(number, 1)
  return share @ np.diff(borders) / 1e9


def _read(trace: pathlib.Path) -> tuple[tuple[float, float], list[tuple[str, str, float, float]]]:
  """Returns start and end of what was traced, and (program, operation, start, end) of each event.

  In nanoseconds. An operation that goes on after its call, on other threads, has an event for its
  end, which names the call by number.
  """
  window = None
  events, ends = [], {}
  for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
    for line in plane.lines:
      for event in line.events:
        if event.name == _WINDOW:
          window = (event.start_ns, event.start_ns + event.duration_ns)
          continue
        stats = dict(event.stats)
        end = event.start_ns + event.duration_ns
        if 'hlo_op' in stats:
          module = str(stats.get('hlo_module', ''))
          events.append((module, str(stats['hlo_op']), event.start_ns, end, stats.get('_p')))
        elif event.name.startswith('end: ') and '_c' in stats:
          ends[event.name.removeprefix('end: '), stats['_c']] = end
  assert window is not None, f'{trace}: not a trace of ours'
  return window, [
    (module, name, start, max(end, ends.get((name, call), end)))
    for module, name, start, end, call in events
  ]
