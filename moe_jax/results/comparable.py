"""Rules by which trials may stand in one table: what configs, records and arms must agree on."""

import collections
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from moe_jax.errors import UserError
from moe_jax.field_names import field_value
from moe_jax.results.records import FINISHED, Record
from moe_jax.study import MAY_DIFFER, TOLERANCE, Study

# Fields of the config in which arms must agree, by the entry of `study.may_differ` that allows a
# difference.
_PLANNED = {
  'horizon': ('train.num_steps', 'data.batch_size', 'data.sequence_length'),
  'data': ('data.name', 'data.valid_fraction', 'data.test_fraction'),
  'tokenizer': ('data.tokenizer', 'data.vocab_size'),
}


def check_comparable(study: Study, records: Sequence[Record]) -> None:
  """Checks that finished trials differ only in what the study compares.

  All of them, since they stand in one table: at the end of their schedule, with the same number of
  steps and of tokens ('horizon'), text ('data'), tokenizer ('tokenizer') and training FLOPs
  ('compute'), each unless `study.may_differ` names it. A finished trial that is not at its last
  step, and another split evaluated than the study's, can never be allowed by a study.

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
  trials = _Compared(study, 'trials')

  def of(value: Callable[[Record], Any]) -> list[tuple[str, Any]]:
    return [(_label(record), value(record)) for record in finished]

  trials.check_equal('horizon', 'train.num_steps', of(lambda record: record.num_steps))
  trials.check_close('horizon', 'tokens', of(lambda record: record.tokens))
  trials.check_equal('tokenizer', 'tokenizer', of(lambda record: record.data.get('tokenizer')))
  if 'tokenizer' in study.may_differ:
    trials.check_equal('data', 'data.name', of(lambda record: record.data.get('name')))
  # The fingerprint is of text and tokenizer, so it can be compared only under one tokenizer.
  groups: dict[Any, list[tuple[str, Any]]] = {}
  for record in finished:
    group = groups.setdefault(record.data.get('tokenizer'), [])
    group.append((_label(record), record.data.get('fingerprint')))
  for group in groups.values():
    trials.check_equal('data', 'data fingerprint', group)
  flops = of(lambda record: record.flops_per_token * record.tokens)
  trials.check_close('compute', 'training FLOPs', flops)


def check_planned(
  study: Study, configs: Mapping[str, ml_collections.ConfigDict], flops: Mapping[str, int]
) -> None:
  """Checks before anything is trained what `check_comparable` will check of the results.

  Args:
    study: the question.
    configs: of the arms, by name.
    flops: of the training of each arm.

  Raises:
    UserError: naming the field, two arms and their values.
  """
  arms = _Compared(study, 'arms')
  for reason, fields in _PLANNED.items():
    for field in fields:
      values = [(arm, field_value(config, field)) for arm, config in configs.items()]
      arms.check_equal(reason, field, values)
  arms.check_close('compute', 'training FLOPs', list(flops.items()))


class _Compared(NamedTuple):
  """A value that must agree, unless the study allows it to differ.

  Attributes:
    study: whose `may_differ` names what may differ.
    kind: of what is compared, for messages.
  """

  study: Study
  kind: str

  def check_equal(self, reason: str, field: str, values: Sequence[tuple[str, Any]]) -> None:
    """Checks that values, each with the name of its owner, are the same."""
    if reason in self.study.may_differ:
      return
    for name, value in values:
      if value != values[0][1]:
        raise self._difference(reason, field, [values[0], (name, value)], 'must agree')

  def check_close(self, reason: str, field: str, values: Sequence[tuple[str, int]]) -> None:
    """Checks that numbers agree to `TOLERANCE`."""
    if reason in self.study.may_differ or not values:
      return
    least, most = (extreme(values, key=operator.itemgetter(1)) for extreme in (min, max))
    if most[1] > (1 + TOLERANCE) * least[1]:
      raise self._difference(reason, field, [least, most], f'must agree to {TOLERANCE:.0%}')

  def _difference(
    self, reason: str, field: str, values: Sequence[tuple[str, Any]], rule: str
  ) -> UserError:
    return UserError(
      field,
      dict(values),
      f'compared {self.kind} {rule}; if the study asks this, add {reason!r} to its may_differ',
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
  """Checks that names of arms are unique, that comparisons name arms, and the margin.

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
  """Returns tuples as lists, as they come back from JSON."""
  return json.loads(json.dumps(changes, default=str))
