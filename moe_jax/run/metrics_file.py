"""The file metrics.jsonl: its lines, missing ones, and those that stay when a run continues."""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.files import write_atomically
from moe_jax.run.manifest import Pace

FILE = 'metrics.jsonl'


def print_line(line: str) -> None:
  """Prints a line at once."""
  print(line, flush=True)


def is_number(value: Any) -> bool:
  """True if a value of a record is a number."""
  return isinstance(value, int | float) and not isinstance(value, bool)


class MetricsFile(NamedTuple):
  """The content of a metrics.jsonl.

  Attributes:
    records: of its good lines; of those of one step and split the first.
    damaged: numbers of the lines that are no records, or repeat one, from 1.
    repeated: the latter of them.
    cut: the number of a last line without an end, as a kill leaves it; None without one.
  """

  records: list[dict[str, Any]]
  damaged: list[int]
  repeated: list[int]
  cut: int | None


def read_file(path: str | os.PathLike) -> MetricsFile:
  """Returns the content of a metrics.jsonl; nothing of a missing file.

  A record is an object with `step`, `split` and, for the splits of training, a number `loss`; what
  belongs to routers is numbers.
  """
  if not pathlib.Path(path).exists():
    return MetricsFile([], [], [], None)
  lines = pathlib.Path(path).read_bytes().split(b'\n')
  records: dict[tuple[str, int], dict[str, Any]] = {}
  damaged, repeated = [], []
  for number, line in enumerate(lines, 1):
    record = _record_of(line)
    if record is not None:
      key = record['split'], record['step']
      if key in records:
        repeated.append(number)
      records.setdefault(key, record)
    elif number < len(lines):
      damaged.append(number)
  cut = len(lines) if lines[-1] and _record_of(lines[-1]) is None else None
  return MetricsFile([*records.values()], sorted(damaged + repeated), repeated, cut)


def _record_of(line: bytes) -> dict[str, Any] | None:
  """Returns the record of a line; None if it is not one."""
  try:
    record = json.loads(line)
    # Not UTF-8, not JSON, more digits than Python reads; brackets nested without end.
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or not isinstance(record.get('split'), str):
    return None
  step = record.get('step')
  if not isinstance(step, int) or isinstance(step, bool) or step < 0:
    return None
  if record['split'] in ('train', 'valid') and not is_number(record.get('loss')):
    return None
  try:
    kinds = {np.asarray(v).dtype.kind for k, v in record.items() if k.startswith('router/')}
  except ValueError:
    # Lists of unequal length.
    return None
  return record if kinds <= set('iuf') else None


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns the good lines of a metrics.jsonl, and warns of damaged ones on stderr.

  None of a missing file. A last line without an end is no damage: it may be being written.
  """
  found = read_file(path)
  if found.damaged:
    print(f'warning: {path}: {damage(found)}, left out', file=sys.stderr, flush=True)
  return found.records


def missing_lines(
  records: Iterable[dict[str, Any]], paces: Sequence[Pace], end: int, *, finished: bool
) -> list[tuple[str, int]]:
  """Returns (split, step) of each line up to step `end` that was written once and is not there.

  Args:
    records: those that are there.
    paces: in order; nothing is expected before the first one.
    end: the last step that was done.
    finished: whether the run ended there, not stopped.
  """
  expected: list[tuple[str, int]] = []
  for i, pace in enumerate(paces):
    start = pace.from_step
    stop = min(end, paces[i + 1].from_step) if i + 1 < len(paces) else end
    last = finished and stop == end
    steps = _multiples(pace.log_every, start, stop)
    expected += [('train', step) for step in steps]
    if last and end > start and end not in steps:
      expected.append(('train', end))
    # At a step where a run is stopped, the evaluation is left to the next start.
    expected += [('valid', step) for step in _multiples(pace.eval_every, start, stop - (not last))]
  there = {(record['split'], record['step']) for record in records}
  return [line for line in expected if line not in there]


def _multiples(every: int, start: int, stop: int) -> range:
  """Returns the multiples in start + 1..stop; none for 0."""
  return range(start - start % every + every, stop + 1, every) if every else range(0)


def damage(found: MetricsFile) -> str:
  """Returns 'line 3 is damaged', or as much of several and of those that repeat others."""
  broken = [number for number in found.damaged if number not in found.repeated]
  kinds = (
    (broken, ('is damaged', 'are damaged')),
    (found.repeated, ('repeats an earlier one', 'repeat earlier ones')),
  )
  return ' and '.join(
    f'line {lines[0]} {one}' if len(lines) == 1 else f'lines {shortened(lines)} {many}'
    for lines, (one, many) in kinds
    if lines
  )


def shortened(items: list[Any], most: int = 3) -> str:
  """Returns '1, 2, 3 and 4 more'."""
  more = f' and {len(items) - most} more' if len(items) > most else ''
  return f'{", ".join(map(str, items[:most]))}{more}'


def keep_until(
  path: pathlib.Path, step: int, drop_last_valid: bool, say: Callable[[str], None]
) -> None:
  """Drops lines of steps that will be done again, so that no line is in the file twice."""

  def again(record: dict[str, Any]) -> bool:
    repeated = drop_last_valid and record['split'] == 'valid' and record['step'] == step
    return repeated or record['step'] > step

  found = read_file(path)
  kept = [record for record in found.records if not again(record)]
  if found.damaged:
    say(
      f'warning: {path}: {damage(found)}, left out; the old file is {_copy_aside(path, "damaged")}'
    )
  elif not step and found.records:
    say(
      f'warning: starting at step 0, for want of a checkpoint: lines of {path} up to step '
      f'{max(record["step"] for record in found.records)} are written again; the old file is '
      f'{_copy_aside(path, "earlier")}'
    )
  elif past := sum(record['step'] > step for record in found.records):
    lines = '1 line' if past == 1 else f'{past} lines'
    say(f'{lines} of {path} past that step {"is" if past == 1 else "are"} written again')
  if found.cut is not None:
    say(f'note: {path}: line {found.cut}, the last one, was cut off and is dropped')
  if not path.exists():
    return
  write_atomically(path, ''.join(json.dumps(r) + '\n' for r in kept))


def _copy_aside(path: pathlib.Path, word: str) -> pathlib.Path:
  """Copies a file to a free name next to it, made with that word, and returns the name."""
  target = path.with_name(f'{word}_{path.name}')
  number = 1
  while target.exists():
    target = path.with_name(f'{word}_{path.stem}_{number}{path.suffix}')
    number += 1
  write_atomically(target, path.read_bytes())
  return target
