"""Lists the runs below a folder: python -m moe_jax.runs [DIR].

Examples:
  python -m moe_jax.runs
  python -m moe_jax.runs runs/my_study --json
"""

import collections
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from moe_jax import arguments, cli
from moe_jax.field_names import split_field
from moe_jax.run.manifest_kinds import problem_of
from moe_jax.run.status import RUNNING, is_held, last_loss, number, who_holds
from moe_jax.schema import FREE_FIELDS

_MANIFEST, _METRICS = 'manifest.json', 'metrics.jsonl'
# Fields in which runs may differ without being another experiment.
_UNSHOWN = (*FREE_FIELDS, 'train.seed')
_SHOWN_DIFFERENCES = 4
# Of a trial of a sweep that is trained, while a worker holds it.
EVALUATING = 'evaluating'
_COLUMNS = ('run', 'status', 'step', 'loss', 'bits/byte', 'seed', 'commit', 'age', 'differs in')


def find(folder: str) -> Iterator[pathlib.Path]:
  """Yields every directory of a run below a folder, itself included; links are not followed.

  What a sweep keeps of trials that it trains together (`packs`) is no run: its members are.
  """
  for path, folders, files in os.walk(folder):
    if 'packs' in folders and 'trials' in folders:
      folders.remove('packs')
    if _MANIFEST in files or _has_checkpoint(path):
      # Nothing below a run is one.
      folders.clear()
      yield pathlib.Path(path)
    folders.sort()


def _has_checkpoint(path: str) -> bool:
  try:
    return any(entry.name.isdecimal() for entry in os.scandir(os.path.join(path, 'checkpoints')))
  except OSError:
    return False


def describe(run: pathlib.Path) -> dict[str, Any]:
  """Returns the values in a run's files; `problem` is the error in its manifest, '' if none.

  Keys: status, step, num_steps, seed, git_commit, git_dirty, loss (the last of training), loss_step
  (whose loss it is), bits_per_byte ({split: value} of its evaluations, {'EVALUATION/split': value}
  of those that its sweep made, first), modified (seconds since the epoch of what was written last),
  config, problem. What is not known is None.

  A manifest says `running` until its run ends by itself, which one that is killed never does. The
  status is then `running` if a process holds the run, `stopped` if none does on this host, and
  `unfinished` where that can't be known. The step of such a run is the last that it logged; a run
  that goes on starts from its newest checkpoint, which may be earlier. A trial of a sweep is
  `evaluating` if it is trained, has no outcome yet, and a worker of the sweep holds it.
  """
  metadata, problem = _manifest(run)
  loss_step, loss = last_loss(run / _METRICS)
  status, step = metadata.get('status', 'damaged'), metadata.get('step')
  if status == RUNNING:
    status = who_holds(run)
    step = max(step or 0, loss_step or 0)
  outcome = _outcome_path(run)
  claim = outcome.parents[1] / 'locks' / outcome.stem
  if status == 'finished' and not outcome.exists() and is_held(claim):
    status = EVALUATING
  config = metadata.get('config', {})
  train = config.get('train', {})
  return {
    'status': status,
    'step': step,
    'num_steps': train.get('num_steps'),
    'seed': train.get('seed'),
    'git_commit': metadata.get('git_commit'),
    'git_dirty': metadata.get('git_dirty'),
    'loss': loss,
    'loss_step': loss_step,
    'bits_per_byte': _outcome(outcome) | _evaluations(run),
    'modified': _modified(run),
    'config': {
      f'{section}.{name}': value for section in config for name, value in config[section].items()
    },
    'problem': problem,
  }


def _manifest(run: pathlib.Path) -> tuple[dict[str, Any], str]:
  """Returns the manifest of a run and the error in it; {} if it can't be read."""
  metadata = _json_of(run / _MANIFEST)
  if metadata is None:
    gone = not (run / _MANIFEST).exists()
    return {}, f'{_MANIFEST} is {"missing" if gone else "not readable"}'
  problem = problem_of(metadata)
  return ({}, f'{_MANIFEST}: {problem}') if problem else (metadata, '')


def _json_of(path: pathlib.Path) -> Any:
  try:
    # A pipe would be waited for.
    return json.loads(path.read_bytes()) if path.is_file() else None
  except (OSError, ValueError, RecursionError):
    return None


def _evaluations(run: pathlib.Path) -> dict[str, float]:
  found = {}
  for path in sorted(run.glob('evaluation_*.json')):
    result = _json_of(path)
    value = number(result.get('bits_per_byte')) if isinstance(result, dict) else None
    if value is not None:
      found[path.stem.removeprefix('evaluation_')] = value
  return found


def _outcome_path(run: pathlib.Path) -> pathlib.Path:
  """Returns where the outcome of a run would be if it is a trial, SWEEP/trials/ID."""
  run = run.absolute()
  return run.parent.parent / 'outcomes' / f'{run.name}.json'


def _outcome(path: pathlib.Path) -> dict[str, float]:
  """Returns bits per byte of the evaluations that a sweep made; dropless ones first."""
  outcome = _json_of(path)
  made = outcome.get('evaluations') if isinstance(outcome, dict) else None
  found = {}
  for name, result in made.items() if isinstance(made, dict) else ():
    value = number(result.get('bits_per_byte')) if isinstance(result, dict) else None
    if value is not None:
      found[f'{name}/{result.get("split")}'] = value
  return dict(sorted(found.items(), key=lambda item: not item[0].startswith('dropless/')))


def _modified(run: pathlib.Path) -> float | None:
  paths = [run / name for name in (_MANIFEST, _METRICS, 'checkpoints')]
  return max((path.stat().st_mtime for path in paths if path.exists()), default=None)


def differing(runs: list[dict[str, Any]]) -> list[str]:
  """Returns the fields in which configs differ, those with the most values first."""
  values = collections.defaultdict(set)
  configs = [run['config'] for run in runs if run['config']]
  for config in configs:
    for field, value in config.items():
      values[field].add(json.dumps(value))
  fields = [field for field, found in values.items() if len(found) > 1 and field not in _UNSHOWN]
  return sorted(fields, key=lambda field: (-len(values[field]), field))


def table(runs: dict[str, dict[str, Any]], now: float) -> str:
  """Returns a line for each run, and one for each whose manifest is damaged."""
  fields = differing(list(runs.values()))
  rows = [_COLUMNS, *(_row(name, run, fields, now) for name, run in runs.items())]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ['  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
  problems = [f'{name}: {run["problem"]}' for name, run in runs.items() if run['problem']]
  return '\n'.join(line.rstrip() for line in [*lines, *problems])


def _row(name: str, run: dict[str, Any], fields: list[str], now: float) -> tuple[str, ...]:
  commit = (run['git_commit'] or '-')[:8] + ('+' if run['git_dirty'] else '')
  bits = run['bits_per_byte']
  # A sweep's own come first: they are what its study compares.
  first = next(iter(bits), None)
  split = 'test' if 'test' in bits and '/' not in (first or '') else first
  differences = [
    f'{split_field(field)[1]}={run["config"][field]}' for field in fields if field in run['config']
  ]
  more = len(differences) - _SHOWN_DIFFERENCES
  text = ' '.join(differences[:_SHOWN_DIFFERENCES]) + (f' and {more} more' if more > 0 else '')
  return (
    name,
    run['status'],
    f'{_text(run["step"])}/{_text(run["num_steps"])}',
    _loss_text(run),
    '-' if split is None else f'{bits[split]:.4f}' + ('' if split == 'test' else f' ({split})'),
    _text(run['seed']),
    commit,
    '-' if run['modified'] is None else _age(now - run['modified']),
    text or '-',
  )


def _loss_text(run: dict[str, Any]) -> str:
  """Returns the loss, with its step if that is another than the run's."""
  if run['loss'] is None:
    return '-'
  other = run['loss_step'] not in (None, run['step'])
  return f'{run["loss"]:.4f}' + (f' (step {run["loss_step"]})' if other else '')


def _text(value: Any) -> str:
  return '-' if value is None else str(value)


def _age(seconds: float) -> str:
  for unit, size in (('d', 86400), ('h', 3600), ('m', 60)):
    if seconds >= size:
      return f'{int(seconds // size)}{unit}'
  return f'{max(0, int(seconds))}s'


def main() -> None:
  """Prints the runs of the folder in a table, or as one JSON document."""
  arguments.check_folder('folder', _FOLDER)
  paths = find(_FOLDER)
  runs = {_name(path): describe(path) for path in paths}
  if _JSON.value:
    cli.print_json([{'run': name, **run} for name, run in runs.items()])
  elif runs:
    cli.show(table(runs, time.time()))
  else:
    cli.show(f'no run below {_FOLDER}')


def _name(path: pathlib.Path) -> str:
  # Names of files need not be text.
  return os.fsencode(os.path.relpath(path, _FOLDER)).decode(errors='replace')


if __name__ == '__main__':
  _FOLDER = os.path.expanduser(cli.take_word(sys.argv) or 'runs')
  _JSON = cli.define_json_flag()
  cli.run(main)
