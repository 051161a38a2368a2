"""Record of one trial of a study, as plain values: one line of results.jsonl."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from moe_jax.errors import DamagedError
from moe_jax.files import write_atomically

# How a trial ended. Only finished ones are averaged, and none is left out of a table.
FINISHED = 'finished'
DIVERGED = 'diverged'
FAILED = 'failed'
UNFINISHED = 'unfinished'
MISSING = 'missing'
DAMAGED = 'damaged'
STATUSES = (FINISHED, DIVERGED, FAILED, UNFINISHED, MISSING, DAMAGED)


@dataclasses.dataclass(frozen=True)
class Record:
  """One trial.

  Attributes:
    trial: its id, a hash of its resolved config.
    arm: what the study calls its point.
    seed: of initial values, data order and noise.
    status: one of `STATUSES`.
    reason: why it is not finished; empty if it is.
    step: optimizer steps done.
    num_steps: of its config.
    changes: config fields of the arm with their values, as the study gives them.
    config: resolved.
    data: name, fingerprint and tokenizer of the text, and the split that was evaluated; {} if it
      never began.
    git_commit: of the checkout it ran in; None if unknown.
    git_date: day of that commit, 'YYYY-MM-DD'; '' if unknown, as in results of earlier versions.
    git_dirty: whether that had uncommitted changes.
    devices: platform, kind and count, and the precision of matmuls ('default' or as JAX
      names it; results of earlier versions lack it).
    pack: trials that trained as one program, this one included; None if unknown.
    mesh: devices along each axis.
    parameters: `total` and `active`.
    flops_per_token: of training, forward and backward.
    tokens: trained on.
    label: short name of the arm for tables and figures; '' in results of earlier versions.
    metrics: finite numbers by name: 'EVALUATION/METRIC', as 'dropless/bits_per_byte'; lists over
      MoE layers for router metrics. The deciding metric of the study stands there under its own
      path, and metrics of the study file as 'user/NAME'.
    metric_errors: {name: why a finished trial has no such metric}.
    metric_sources: {'user/NAME': SHA-256 of the source of the function that gave it}.
    domains: {evaluation: {domain: {metric: number or list}}}.
    curve: [step, loss] of training, thinned.
    load: [step, [[share of each expert] of each MoE layer]], thinned.
    command: that makes this trial again.
  """

  trial: str
  arm: str
  seed: int
  status: str
  reason: str = ''
  step: int = 0
  num_steps: int = 0
  changes: dict[str, Any] = dataclasses.field(default_factory=dict)
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  data: dict[str, Any] = dataclasses.field(default_factory=dict)
  git_commit: str | None = None
  git_date: str = ''
  git_dirty: bool | None = None
  devices: dict[str, Any] = dataclasses.field(default_factory=dict)
  pack: int | None = None
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)
  parameters: dict[str, int] = dataclasses.field(default_factory=dict)
  flops_per_token: int = 0
  tokens: int = 0
  label: str = ''
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
  metric_errors: dict[str, str] = dataclasses.field(default_factory=dict)
  metric_sources: dict[str, str] = dataclasses.field(default_factory=dict)
  domains: dict[str, Any] = dataclasses.field(default_factory=dict)
  curve: list = dataclasses.field(default_factory=list)
  load: list = dataclasses.field(default_factory=list)
  command: str = ''

  def __post_init__(self):
    if self.status not in STATUSES:
      raise ValueError(f'status={self.status!r}: must be one of {STATUSES}')


class NoRecordsError(DamagedError):
  """A file holds no record at all: damaged, or the path is that of something else."""


# Stands in every line.
_ALWAYS = ('trial', 'arm', 'seed', 'status', 'config')


def write_records(
  path: str | pathlib.Path, records: Iterable[Record], *, compact: bool = False
) -> None:
  """Writes results.jsonl, whole or not at all, each record with its digest.

  Args:
    path: of the file.
    records: one for each line.
    compact: as in `encode_records`.
  """
  write_atomically(path, encode_records(records, compact=compact))


def encode_records(records: Iterable[Record], *, compact: bool = False) -> bytes:
  """Returns the content of results.jsonl.

  Args:
    records: one for each line.
    compact: without values that are defaults of `Record`; and a line may say `config_from` instead
      of `config`, the number of an earlier line, and the fields in which its config differs from
      that line's. Digests are of the values with the config.
  """
  lines: list[str] = []
  configs: dict[int, dict[str, Any]] = {}
  separators = (',', ':') if compact else None
  defaults = json.loads(json.dumps(dataclasses.asdict(Record('', '', 0, FINISHED))))
  for record in records:
    # As it comes back from JSON, in which tuples are lists and keys are text.
    values = json.loads(json.dumps(dataclasses.asdict(record)))
    if compact:
      values = {
        name: value for name, value in values.items() if name in _ALWAYS or value != defaults[name]
      }
    content = {'digest': _digest(values), **values}
    if compact:
      content = _share_config(content, configs)
      if 'config' in content:
        configs[len(lines) + 1] = content['config']
    lines.append(json.dumps(content, sort_keys=True, separators=separators))
  return ''.join(f'{line}\n' for line in lines).encode()


def _share_config(values: dict[str, Any], configs: dict[int, dict[str, Any]]) -> dict[str, Any]:
  config = values['config']
  for number, other in configs.items():
    if {section: set(fields) for section, fields in config.items()} != {
      section: set(fields) for section, fields in other.items()
    }:
      continue
    changed = {
      section: {name: value for name, value in fields.items() if value != other[section][name]}
      for section, fields in config.items()
    }
    changed = {section: fields for section, fields in changed.items() if fields}
    rest = {name: value for name, value in values.items() if name != 'config'}
    return rest | {'config_from': {'line': number, 'changed': changed}}
  return values


def _whole(values: dict[str, Any], configs: dict[int, dict[str, Any]]) -> dict[str, Any]:
  """Returns the values of a line with the config that it takes from an earlier one."""
  source = values.pop('config_from', None)
  if source is None:
    return values
  config = {section: dict(fields) for section, fields in configs[source['line']].items()}
  for section, fields in source['changed'].items():
    config[section].update(fields)
  return values | {'config': config}


def read_records(path: str | os.PathLike) -> list[Record]:
  """Returns the records of a results.jsonl.

  One that was changed since it was written comes back as damaged, without its results.

  Raises:
    NoRecordsError: for a file without any, as one that is no results.jsonl.
    DamagedError: naming the first line that is no record.
  """
  records: list[Record] = []
  configs: dict[int, dict[str, Any]] = {}
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').splitlines()
  except UnicodeDecodeError as error:
    raise NoRecordsError(f'{path} is no text: no results.jsonl') from error
  for number, line in enumerate(lines, 1):
    try:
      values = json.loads(line)
      digest = values.pop('digest', None)
      values = _whole(values, configs)
      record = Record(**values)
      configs[number] = record.config
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
      if not any(map(_looks_like_a_record, lines)):
        raise NoRecordsError(f'{path} holds no record of a trial') from error
      raise DamagedError(f'{path}:{number} is no record of a trial, or cut short') from error
    if digest != _digest(values):
      reason = f'{path}:{number} is not what was written: its digest differs'
      record = dataclasses.replace(
        record, status=DAMAGED, reason=reason, metrics={}, domains={}, curve=[], load=[]
      )
    records.append(record)
  if not records:
    raise NoRecordsError(f'{path} holds no record of a trial')
  return records


def _looks_like_a_record(line: str) -> bool:
  try:
    values = json.loads(line)
  except (ValueError, RecursionError):
    return False
  return isinstance(values, dict) and {'trial', 'arm', 'seed', 'status'} <= values.keys()


def _digest(values: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
