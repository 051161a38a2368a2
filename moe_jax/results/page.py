"""The page of a study: one HTML file that needs no network, with all data of each trial."""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.files import write_atomically
from moe_jax.results.records import Record
from moe_jax.study import Study

_FILES = importlib.resources.files('moe_jax.results') / 'page'


class Cell(NamedTuple):
  """Content of a table cell that is sorted by something other than its text.

  Attributes:
    text: shown.
    order: sorted by; None comes last.
  """

  text: str
  order: float | str | None


def write_page(
  study: Study,
  records: Sequence[Record],
  columns: Mapping[str, str],
  rows: Sequence[Mapping[str, Any]],
  path: str | pathlib.Path,
  comparisons: Sequence[Sequence[str]] = (),
  notes: Sequence[str] = (),
  warnings: Sequence[str] = (),
  *,
  figures: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes the page, whole or not at all, and returns its path.

  The same records give the same bytes. Loads of single experts are left out: they are in
  results.jsonl and the figures.

  Args:
    study: of the records.
    records: of all trials, in any state.
    columns: of the table: what a row calls a value, and the title of the column. One is `arm`.
    rows: of the table, one for an arm; values are strings, numbers, None or `Cell`.
    path: of the file.
    comparisons: planned ones: the header of their table, then a row for each.
    notes: how the numbers were made.
    warnings: what a reader should know of them.
    figures: from `page_figures.content`; none by default.
  """
  if 'arm' not in columns or any('arm' not in row for row in rows):
    raise ValueError('columns and rows must have an arm')
  style = _read('page.css')
  script = f"'use strict';\n{_read('curves.js')}\n{_read('figures.js')}\n{_read('page.js')}"
  parts = {
    'title': html.escape(study.name),
    'style': style,
    'style hash': _digest(style),
    'script': script,
    'script hash': _digest(script),
    'data': _embedded(
      _content(study, records, columns, rows)
      | {'comparisons': comparisons, 'notes': notes, 'warnings': warnings}
      | {'panels': [], 'loads': [], 'seeds': [], 'labels': {}}
      | {'given': {arm.name: arm.label for arm in study.arms if arm.label}}
      | _plain(figures or {})
    ),
  }
  # In one pass, so that nothing is replaced in what was put in.
  page = re.sub(r'\{\{(.*?)\}\}', lambda match: parts[match[1]], _read('template.html'))
  path = pathlib.Path(path)
  write_atomically(path, page)
  return path


def _read(name: str) -> str:
  return (_FILES / name).read_text(encoding='utf-8')


def _digest(text: str) -> str:
  """Returns the hash by which the page's security policy knows its own script and style."""
  return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _content(
  study: Study,
  records: Sequence[Record],
  columns: Mapping[str, str],
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  return {
    'study': {
      'name': study.name,
      'question': study.question,
      'metric': study.metric._asdict(),
      'split': study.split,
      'arms': [arm.name for arm in study.arms],
      'dropped': [[arm.name, arm.dropped] for arm in study.arms if arm.dropped],
    },
    'columns': list(columns.items()),
    'rows': [{key: _plain(row.get(key)) for key in {**columns, 'arm': ''}} for row in rows],
    'records': [_shown(record) for record in records],
  }


def _shown(record: Record) -> dict[str, Any]:
  """Returns the part of a record that the page shows."""
  values = dataclasses.asdict(record)
  del values['load']
  values['metrics'] = _without_experts(values['metrics'])
  values['domains'] = {
    evaluation: {domain: _without_experts(metrics) for domain, metrics in domains.items()}
    for evaluation, domains in values['domains'].items()
  }
  return _plain(values)


def _without_experts(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Drops metrics with a number for each expert of each layer."""
  return {
    name: value
    for name, value in metrics.items()
    if not (isinstance(value, list) and value and isinstance(value[0], list))
  }


def _plain(value: Any) -> Any:
  """Returns a value as JSON has it: None for a number that is not finite."""
  if isinstance(value, Cell):
    return {'text': value.text, 'order': _plain(value.order)}
  if isinstance(value, Mapping):
    return {str(key): _plain(one) for key, one in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(one) for one in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _embedded(content: dict[str, Any]) -> str:
  """Returns JSON in which no character can end or begin an HTML element."""
  text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(',', ':'))
  for character in '<>&':
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text
