"""Whether the trials of a study may stand in one table: what records and arms must agree on."""

import collections
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.errors import UserError
from moe_jax.results.records import FINISHED, Record
from moe_jax.study import MAY_DIFFER, TOLERANCE, Study


def check_comparable(study: Study, records: Sequence[Record]) -> None:
  """Checks that finished trials differ in nothing but what the study asks.

  All of them, since they stand in one table: at the end of their schedule, with the same number of
  steps and of tokens ('horizon'), text ('data'), tokenizer ('tokenizer') and training FLOPs
  ('compute'), each unless `study.may_differ` names it. A finished trial that is not at its last
  step, and another split evaluated than the study's, are nothing that a study can ask.

  Raises:
    UserError: naming the field, two trials and their values.
  """
  for name in study.may_differ:
    if name not in MAY_DIFFER:
      raise UserError('study.may_differ', name, f'must be one of {", ".join(MAY_DIFFER)}')
  finished = [record for record in records if record.status == FINISHED]
  for record in finished:
    if record.step != record.num_steps:
      raise UserError(
        'step',
        {_label(record): record.step},
        f'finished means step {record.num_steps}; trials are compared at the end of their schedule',
      )
    split = record.data.get('split', study.split)
    if split != study.split:
      raise UserError(
        'split', {_label(record): split, 'study': study.split}, 'the same split must be evaluated'
      )
  if 'horizon' not in study.may_differ:
    _check_equal(finished, 'train.num_steps', lambda record: record.num_steps, 'horizon')
    _check_close(finished, 'tokens', lambda record: record.tokens, 'horizon')
  if 'tokenizer' not in study.may_differ:
    _check_equal(finished, 'tokenizer', lambda record: record.data.get('tokenizer'), 'tokenizer')
  if 'data' not in study.may_differ:
    _check_same_data(study, finished)
  if 'compute' not in study.may_differ:
    _check_close(
      finished, 'training FLOPs', lambda record: record.flops_per_token * record.tokens, 'compute'
    )


def _check_same_data(study: Study, finished: Sequence[Record]) -> None:
  """The fingerprint is of text and tokenizer, so it can be compared under one tokenizer alone."""
  if 'tokenizer' in study.may_differ:
    _check_equal(finished, 'data.name', lambda record: record.data.get('name'), 'data')
  groups: dict[Any, list[Record]] = {}
  for record in finished:
    groups.setdefault(record.data.get('tokenizer'), []).append(record)
  for group in groups.values():
    _check_equal(group, 'data fingerprint', lambda record: record.data.get('fingerprint'), 'data')


def _check_equal(
  records: Sequence[Record], field: str, value: Callable[[Record], Any], excuse: str
) -> None:
  for record in records:
    if value(record) != value(records[0]):
      raise UserError(
        field,
        {_label(records[0]): value(records[0]), _label(record): value(record)},
        f'compared trials must agree; if the study asks this, add {excuse!r} to its may_differ',
      )


def _check_close(
  records: Sequence[Record], field: str, value: Callable[[Record], int], excuse: str
) -> None:
  if not records:
    return
  least, most = min(records, key=value), max(records, key=value)
  if value(most) > (1 + TOLERANCE) * value(least):
    raise UserError(
      field,
      {_label(least): value(least), _label(most): value(most)},
      f'compared trials must agree to {TOLERANCE:.0%}; if the study asks this, add {excuse!r} to '
      'its may_differ',
    )


def check_records(study: Study, records: Sequence[Record]) -> None:
  """Checks that each record is of a trial of the study, and none of another's.

  Raises:
    UserError: for a trial twice, or one that is not of the study.
  """
  arms = {arm.name: arm for arm in study.arms}
  seen = set()
  for record in records:
    if record.arm not in arms:
      raise UserError('arm', record.arm, f'of a record is none of study {study.name}')
    if arms[record.arm].dropped:
      raise UserError(
        'arm',
        record.arm,
        f'has a record, but study {study.name} drops it: {arms[record.arm].dropped}',
      )
    if record.seed not in study.seeds:
      raise UserError('seed', record.seed, f'of a record of {record.arm} is none of {study.seeds}')
    if (record.arm, record.seed) in seen:
      raise UserError('trial', _label(record), 'has two records')
    if record.status == FINISHED and _plain(record.changes) != _plain(arms[record.arm].changes):
      raise UserError(
        'changes',
        record.changes,
        f'of the record of {_label(record)} are not those of the study, {arms[record.arm].changes}',
      )
    seen.add((record.arm, record.seed))


def check_arms(study: Study) -> None:
  """Checks that arms have names of their own, what is compared are arms, and the margin.

  Raises:
    UserError: naming the field.
  """
  names = [arm.name for arm in study.arms]
  for name, count in collections.Counter(names).items():
    if count > 1:
      raise UserError('arm', name, f'stands {count} times in study {study.name}')
  if study.baseline and study.baseline not in names:
    raise UserError('study.baseline', study.baseline, f'must be one of {", ".join(names)}')
  margin = study.equivalence_margin
  if margin is not None and not (
    isinstance(margin, int | float) and not isinstance(margin, bool) and 0 < margin < math.inf
  ):
    raise UserError('study.equivalence_margin', margin, 'must be a number above 0, or None')
  for comparison in study.comparisons:
    for name in comparison:
      if name not in names:
        raise UserError('study.comparisons', name, f'must be one of {", ".join(names)}')


def _label(record: Record) -> str:
  return f'{record.arm} (seed {record.seed})'


def _plain(changes: dict[str, Any]) -> Any:
  """Tuples and lists alike, as they come back from JSON."""
  return json.loads(json.dumps(changes, default=str))
