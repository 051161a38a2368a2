"""Results small enough to commit: every final number, and curves and loads at a few steps.

Left out are what no table shows: loads and router statistics by domain, and most points of curves
and loads. What tables are made of is kept to the last digit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.results.records import Record, encode_records

# Bytes of a results.jsonl in a repository.
LIMIT = 300_000
# Points of the curve and of the load of each trial: the first pair that fits is taken.
_POINTS = ((50, 10), (50, 1), (25, 1), (10, 1))


def thin(records: Sequence[Record], metric: str) -> list[Record]:
  """Returns the records with as many points as `LIMIT` allows, and at least 10.

  Args:
    records: of a study.
    metric: name of the one that decides; kept by domain, too, if it is one of a domain.
  """
  for num_curve, num_load in _POINTS:
    thinned = [_thin(record, metric, num_curve, num_load) for record in records]
    if len(encode_records(thinned, compact=True)) <= LIMIT:
      break
  return thinned


def is_thin(records: Sequence[Record], metric: str) -> bool:
  """True if only points of curves would be left out of the records."""
  return [_thin(record, metric, *_POINTS[0]) for record in records] == list(records)


def spread(items: Sequence[Any], most: int) -> list[Any]:
  """Returns at most `most` of the items, evenly spread, the last and the first among them."""
  if len(items) <= most:
    return list(items)
  if most == 1:
    return [items[-1]]
  return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _thin(record: Record, metric: str, num_curve: int, num_load: int) -> Record:
  kept = {'bits_per_byte'} | ({metric.rpartition('/')[2]} if '/domains/' in metric else set())
  return dataclasses.replace(
    record,
    domains={
      evaluation: {domain: _some(values, kept) for domain, values in domains.items()}
      for evaluation, domains in record.domains.items()
    },
    curve=[[step, float(f'{loss:.6g}')] for step, loss in spread(record.curve, num_curve)],
    load=[
      [step, np.round(np.asarray(load, np.float64), 4).tolist()]
      for step, load in spread(record.load, num_load)
    ],
  )


def _some(values: Mapping[str, Any], kept: set[str]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if name in kept}
