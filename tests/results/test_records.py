"""Records as lines of a file: back as they were, and never half of one."""

import dataclasses

import pytest

from moe_jax.errors import DamagedError
from moe_jax.results import records
from tests.results import made


def test_records_come_back_as_they_were(tmp_path):
  path = tmp_path / 'results.jsonl'
  written = [
    made.make_record(made.HOSTILE, 1, 0.1 + 0.2, metrics={'capacity/router/drop': [0.1, 1e-300]}),
    made.make_record('naïve\u2028 λ\n', 2, status=records.FAILED, reason='first\nsecond'),
    records.Record('id', 'arm', 0, records.MISSING),
  ]
  records.write_records(path, written)
  assert records.read_records(path) == written
  assert len(path.read_text().split('\n')) == 4


def test_every_field_is_written(tmp_path):
  path = tmp_path / 'results.jsonl'
  record = records.Record(
    trial='id', arm='a', seed=3, status=records.DIVERGED, reason='loss is nan', step=7, num_steps=9,
    changes={'moe.num_experts': 4}, config={'moe': {'num_experts': 4}}, data={'name': 'tier1'},
    git_commit='c', git_date='2026-11-30', git_dirty=True, devices={'count': 8}, pack=2,
    mesh={'data': 2},
    parameters={'total': 5}, flops_per_token=6, tokens=11, metrics={'x/y': 1.5},
    label='a', metric_errors={'user/z': 'why'}, metric_sources={'user/z': 'digest'},
    domains={'x': {'d': {'y': 1.0}}}, curve=[[1, 2.0]], load=[[1, [[0.5, 0.5]]]], command='python',
  )  # fmt: skip
  defaults = records.Record('', '', 0, records.FINISHED)
  for field in dataclasses.fields(record):
    assert getattr(record, field.name) != getattr(defaults, field.name), field.name
  records.write_records(path, [record])
  assert records.read_records(path) == [record]


def test_no_records(tmp_path):
  path = tmp_path / 'results.jsonl'
  records.write_records(path, [])
  with pytest.raises(DamagedError, match='holds no record'):
    records.read_records(path)
  path.write_bytes(b'\xa9\xff')
  with pytest.raises(DamagedError, match='is no text'):
    records.read_records(path)


@pytest.mark.parametrize(
  ('old', 'new'), [('0.25', '0.24'), ('"seed": 1', '"seed": 2'), ('"f9"', '"f8"')]
)
def test_a_changed_record_is_damaged_and_has_no_results(tmp_path, old, new):
  path = tmp_path / 'results.jsonl'
  of = made.make_record('moe', 1, 0.25, git_commit='f9', curve=[[1, 2.0]], load=[[1, [[1.0]]]])
  records.write_records(path, [made.make_record(), of])
  path.write_text(path.read_text().replace(old, new))
  first, second = records.read_records(path)
  assert first == made.make_record()
  assert second.status == records.DAMAGED and f'{path}:2' in second.reason
  assert second.metrics == {} and second.curve == [] and second.load == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'results.jsonl'
  records.write_records(path, [made.make_record()])
  before = path.read_bytes()
  unwritable = made.make_record('moe', metrics={'x': object()})
  with pytest.raises(TypeError):
    records.write_records(path, [made.make_record(), unwritable])
  assert path.read_bytes() == before


@pytest.mark.parametrize(
  'line',
  [
    '{"trial": "cut',
    '[1, 2]',
    '7',
    '[' * 20_000,
    '7' * 5_000,
    '{"trial": "a", "arm": "a", "seed": 0}',
    '{"trial": "a", "arm": "a", "seed": 0, "status": "finished", "unknown": 1}',
    '{"trial": "a", "arm": "a", "seed": 0, "status": "fine"}',
  ],
  ids=range(8),
)
def test_a_damaged_line_is_named(tmp_path, line):
  path = tmp_path / 'results.jsonl'
  records.write_records(path, [made.make_record()])
  path.write_text(path.read_text() + line + '\n')
  with pytest.raises(DamagedError, match=r'results\.jsonl:2 is no record'):
    records.read_records(path)


def test_an_unknown_status_is_a_defect():
  with pytest.raises(ValueError, match="status='done'"):
    records.Record('id', 'arm', 0, 'done')
