"""Provenance of the numbers of a study: commits, devices, texts, configs."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections

from moe_jax import config as config_lib
from moe_jax import routing
from moe_jax.results.records import FINISHED, Record


@dataclasses.dataclass(frozen=True)
class Provenance:
  """Origin of the numbers: of finished trials, each value once.

  Attributes:
    commits: of the checkouts, sorted; 'unknown' for a trial without.
    dates: of these commits, where known: {commit: 'YYYY-MM-DD'}.
    dirty: whether one had uncommitted changes.
    devices: as 'COUNT x KIND (PLATFORM)', sorted; with the precision of matmuls where it was set.
    packs: how many trials trained as one program, each number once; 1 or unknown left out.
    data: name, fingerprint and tokenizer of the texts.
    config: the fields that all trials agree on, as 'model.num_layers', with their values.
    not_causal: {arm: the field by which a token can see later ones}.
  """

  commits: tuple[str, ...]
  dirty: bool
  devices: tuple[str, ...]
  packs: tuple[int, ...]
  data: tuple[dict[str, Any], ...]
  config: dict[str, Any]
  not_causal: dict[str, str]
  dates: dict[str, str] = dataclasses.field(default_factory=dict)


def provenance_of(records: Sequence[Record], by_arm: dict[str, list[Record]]) -> Provenance:
  """Returns the provenance of the finished trials of a study."""
  finished = [record for record in records if record.status == FINISHED]
  configs = [_flat(record.config) for record in finished]
  not_causal = {}
  for arm, trials in by_arm.items():
    field = next(filter(None, (_why_not_causal(trial.config) for trial in trials)), None)
    if field:
      not_causal[arm] = field
  return Provenance(
    commits=_once(record.git_commit or 'unknown' for record in finished),
    dirty=any(record.git_dirty for record in finished),
    devices=_once(_devices(record) for record in finished if record.devices),
    packs=tuple(sorted({record.pack for record in finished if record.pack and record.pack > 1})),
    data=tuple(
      json.loads(text)
      for text in _once(
        json.dumps({k: record.data.get(k) for k in ('name', 'fingerprint', 'tokenizer')})
        for record in finished
      )
    ),
    config={
      name: value
      for name, value in (configs[0] if configs else {}).items()
      if all(name in config and config[name] == value for config in configs)
    },
    not_causal=not_causal,
    dates={r.git_commit: r.git_date for r in finished if r.git_commit and r.git_date},
  )


def _once(values: Iterable[str]) -> tuple[str, ...]:
  return tuple(sorted(set(values)))


def _devices(record: Record) -> str:
  of = record.devices
  name = f'{of.get("count", "?")} x {of.get("kind", "?")} ({of.get("platform", "?")})'
  precision = of.get('matmul_precision', 'default')
  return name if precision == 'default' else f'{name}, {precision} precision of matmuls'


def _flat(config: dict[str, Any]) -> dict[str, Any]:
  return {
    f'{section}.{field}': value
    for section, fields in config.items()
    for field, value in fields.items()
  }


def _why_not_causal(config: dict[str, Any]) -> str | None:
  """Returns None also for a config of another version, of which it cannot be said."""
  moe = config.get('moe', {})
  known = {'num_experts', 'router', 'priority'} <= moe.keys() and moe['router'] in routing.ROUTERS
  return config_lib.why_not_causal(ml_collections.ConfigDict(config)) if known else None
