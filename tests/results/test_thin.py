"""Results small enough to commit: what is kept to the last digit, and what is not."""

import dataclasses
import json

import pytest

from moe_jax.errors import DamagedError
from moe_jax.results import csv_table, summary, tables, thin
from moe_jax.results.records import DAMAGED, encode_records, read_records, write_records
from tests.results import example

STUDY = dataclasses.replace(example.study(), may_differ=('compute',))
RECORDS = example.records()
METRIC = STUDY.metric.name


def test_tables_are_those_of_the_whole_results(tmp_path):
  thinned = thin.thin(RECORDS, METRIC)
  write_records(tmp_path / 'thin.jsonl', thinned, compact=True)
  again = read_records(tmp_path / 'thin.jsonl')
  assert again == thinned
  whole, small = (summary.summarize(STUDY, records) for records in (RECORDS, again))
  assert csv_table.csv_text(small) == csv_table.csv_text(whole)
  assert tables.markdown(small) == tables.markdown(whole)
  assert (tmp_path / 'thin.jsonl').stat().st_size <= thin.LIMIT < len(encode_records(RECORDS))


def test_curves_and_loads_keep_their_ends_and_domains_their_main_number():
  record = next(r for r in RECORDS if r.status == 'finished' and r.load)
  (small,) = thin.thin([record], METRIC)
  assert len(small.curve) == min(50, len(record.curve)) and len(small.load) == 10
  assert [small.load[0][0], small.load[-1][0]] == [record.load[0][0], record.load[-1][0]]
  assert small.curve[-1][1] == pytest.approx(record.curve[-1][1], rel=1e-5)
  assert small.domains['capacity'] == {
    domain: {'bits_per_byte': values['bits_per_byte']}
    for domain, values in record.domains['capacity'].items()
  }
  assert small.metrics == record.metrics and small.config == record.config
  assert thin.is_thin([small], METRIC) and not thin.is_thin([record], METRIC)
  by_domain = 'capacity/domains/epic/router/load'
  assert 'load' not in thin.thin([record], by_domain)[0].domains['capacity']['epic']
  by_domain = 'capacity/domains/epic/loss'
  (kept,) = thin.thin(
    [dataclasses.replace(record, domains={'c': {'epic': {'loss': 1.5}}})], by_domain
  )
  assert kept.domains == {'c': {'epic': {'loss': 1.5}}}


def test_points_give_way_until_the_file_is_small_enough(monkeypatch):
  sizes = []
  for limit in (10**9, 100_000, 60_000, 1):
    monkeypatch.setattr(thin, 'LIMIT', limit)
    records = thin.thin(RECORDS, METRIC)
    sizes.append((max(len(r.curve) for r in records), max(len(r.load) for r in records)))
  assert sizes[0][1] == 10 and sizes[-1] == (10, 1)
  assert sizes == sorted(sizes, reverse=True)


def test_a_changed_config_is_found_wherever_it_is_shared(tmp_path):
  path = tmp_path / 'results.jsonl'
  write_records(path, RECORDS[:3], compact=True)
  lines = path.read_text().splitlines()
  # The three seeds of one arm: whole, then differences.
  assert [json.loads(line).get('config_from', {}).get('line') for line in lines] == [None, 1, 1]
  assert json.loads(lines[1])['config_from']['changed'] == {'train': {'seed': 1}}
  for old, new, damaged in (
    ('"embed_dim":', '"embed_dim":1', [True] * 3),
    ('{"train":{"seed":1}}', '{"train":{"seed":7}}', [False, True, False]),
  ):
    path.write_text('\n'.join(lines).replace(old, new, 1) + '\n')
    assert [record.status == DAMAGED for record in read_records(path)] == damaged
  for content in (lines[1], '\n'.join(lines).replace('"line":1', '"line":9')):
    path.write_text(content + '\n')
    with pytest.raises(DamagedError, match=r':[12] is no record'):
      read_records(path)
