"""A summary of a study as plain values, for other programs to read."""

import dataclasses
from typing import Any

from moe_jax.results.summary import Summary


def as_json(summary: Summary) -> dict[str, Any]:
  """Returns the content of a report, as `report --json` prints it: plain values, by name."""
  return {
    'study': summary.study.name,
    'question': summary.study.question,
    'metric': summary.study.metric._asdict(),
    'arms': [_plain(arm) for arm in summary.arms],
    'comparisons': [_plain(comparison) for comparison in summary.comparisons],
    'commits': list(summary.provenance.commits),
    'warnings': list(summary.warnings),
  }


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, tuple) and hasattr(value, '_asdict'):
    return _plain(value._asdict())
  if isinstance(value, dict):
    return {str(name): _plain(one) for name, one in value.items()}
  if isinstance(value, tuple | list):
    return [_plain(one) for one in value]
  return value
