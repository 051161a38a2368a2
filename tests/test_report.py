"""The report command, from a sweep on disk to its files."""

import csv
import dataclasses
import io
import json
import math
import re
import types

import pytest

from moe_jax.results import methods
from moe_jax.results.records import read_records, write_records
from moe_jax.sweep import outcome
from tests import tiny

STUDY = """
from moe_jax import config
from moe_jax.study import Comparison, Study, chain, point, product

def get_study():
  base = config.get_config()
  base.update({base!r})
  arms = chain(
    product({{'moe.load_balancing_weight': (0, 0.01)}}),
    point('absent', {{'data.name': 'text:/nowhere'}}),
  )
  return Study(
    'small & odd', 'does it <b>work</b>?', base, arms, (0, 1), baseline='load_balancing_weight=0',
    comparisons=(Comparison('load_balancing_weight=0.01', 'load_balancing_weight=0'),),
    x='moe.load_balancing_weight', may_differ=('data',),
  )
"""


@pytest.fixture(scope='module')
def swept(text, tmp_path_factory):
  """(study file, workdir) of a sweep with an arm that fails."""
  folder = tmp_path_factory.mktemp('report')
  base = tiny.config({**text, 'train.num_steps': 4}).to_dict()
  (folder / 'study.py').write_text(STUDY.format(base=base))
  result = tiny.command('sweep', f'--study={folder / "study.py"}', f'--workdir={folder / "w"}')
  # Two trials failed: said in the exit code and in the last line.
  assert result.code == 1 and '4 finished, 0 diverged, 2 failed' in result.out
  return folder / 'study.py', folder / 'w'


def report(study, workdir, out, *more):
  return tiny.command('report', f'--study={study}', f'--workdir={workdir}', f'--out={out}', *more)


def test_a_broken_arm_is_reported_with_the_rest(swept, tmp_path):
  study, workdir = swept
  result = report(study, workdir, tmp_path / 'r')
  assert result.code == 0, result.err
  table = (tmp_path / 'r' / 'table.md').read_text()
  assert table in result.out
  # What an author must know of the files.
  tex = (tmp_path / 'r' / 'table.tex').read_text()
  assert ('\ntable.tex: no space for ' in result.out) == ('% Not wide enough' in tex)
  assert 'figures as wide as one column, 3.25 in: loss, metric' in result.out
  assert ('\ncite.bib: has no url' in result.out) == (not methods.repository())
  assert 'absent' in table and 'does not exist' in table and '0 of 2' in table
  rows = list(csv.DictReader(io.StringIO((tmp_path / 'r' / 'table.csv').read_text())))
  assert [row['arm'] for row in rows] == [
    'load_balancing_weight=0',
    'load_balancing_weight=0.01',
    'absent',
  ]
  names = {p.name for p in (tmp_path / 'r').iterdir()}
  assert names == {
    *('cite.bib', 'figures', 'index.html', 'methods.tex', 'results.jsonl'),
    *('table.csv', 'table.md', 'table.tex'),
  }
  assert {'loss.pdf', 'loss.png', 'metric.pdf'} <= {
    p.name for p in (tmp_path / 'r' / 'figures').iterdir()
  }
  assert '<b>work</b>' not in (tmp_path / 'r' / 'index.html').read_text().split('<script')[0]
  records = read_records(tmp_path / 'r' / 'results.jsonl')
  assert records[0].data['split'] == 'test'
  assert records[0].command.endswith(f'--trial={records[0].trial}')


def test_refuses_to_overwrite_what_is_no_report(swept, tmp_path):
  study, workdir = swept
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'table.md').write_text('precious')
  report(study, workdir, tmp_path / 'mine', '--nofigures').assert_error('--out=', 'other files')
  assert (tmp_path / 'mine' / 'table.md').read_text() == 'precious'


def test_a_changed_line_of_a_results_file_is_named_and_not_averaged(swept, tmp_path):
  study, workdir = swept
  assert report(study, workdir, tmp_path / 'r', '--nofigures').code == 0
  path = tmp_path / 'changed.jsonl'
  path.write_text((tmp_path / 'r' / 'results.jsonl').read_text().replace(': 7.', ': 6.', 1))
  result = tiny.command(
    'report', f'--study={study}', f'--results={path}', f'--out={tmp_path / "c"}'
  )
  assert result.code == 0, result.err
  assert f'{path}:1 is not what was written' in (tmp_path / 'c' / 'table.csv').read_text()
  assert '1 of 2' in result.out
  # The page says so too, with the comparisons that were planned.
  page = (tmp_path / 'c' / 'index.html').read_text()
  assert '"comparisons":[["arm","minus","verdict"' in page and 'fewer than 3' in page
  good = (tmp_path / 'r' / 'results.jsonl').read_bytes()
  for content, words, code in (
    (b'\xff\xfe', '--results=', 2),
    (b'', '--results=', 2),
    (b'# A page\n', '--results=', 2),
    (good[:-9], ':6 is no record', 3),
  ):
    path.write_bytes(content)
    for verb, more in (('report', f'--out={tmp_path / "d"}'), ('sweep', '--dry_run')):
      refused = tiny.command(verb, f'--study={study}', f'--results={path}', more)
      refused.assert_error(str(path), words, code=code)


def test_a_trial_can_be_made_again_at_its_precision(swept, tmp_path):
  study, workdir = swept
  folder = next(p.parent for p in workdir.glob('trials/*/metrics.jsonl') if p.stat().st_size)
  paths = (folder / 'manifest.json', outcome.path_of(workdir, folder.name))
  kept = {path: path.read_text() for path in paths}
  facts, ended = (json.loads(text) for text in kept.values())
  facts['devices']['matmul_precision'] = 'highest'
  facts['pack'] = 2
  (folder / 'manifest.json').write_text(json.dumps(facts))
  del ended['digest']
  outcome.write(workdir, folder.name, ended | {'digests': outcome.digests(folder)})
  try:
    result = report(study, workdir, tmp_path / 'r', '--nofigures')
  finally:
    for path, text in kept.items():
      path.write_text(text)
  assert result.code == 0, result.err
  records = {record.trial: record for record in read_records(tmp_path / 'r' / 'results.jsonl')}
  assert records[folder.name].command.startswith('JAX_DEFAULT_MATMUL_PRECISION=highest python -m')
  assert records[folder.name].pack == 2
  assert [r.pack for r in records.values() if r.status == 'finished'].count(1) == 3
  said = (tmp_path / 'r' / 'methods.tex').read_text()
  assert 'highest precision of matmuls' in said and '2 trials as one program' in said
  assert 'different devices' in (tmp_path / 'r' / 'table.md').read_text()


def test_results_of_another_config_are_refused(swept, tmp_path):
  study, workdir = swept
  assert report(study, workdir, tmp_path / 'one', '--nofigures').code == 0
  edited = tmp_path / 'study.py'
  edited.write_text(
    study.read_text()
    + """

_get_study = get_study


def get_study():
  study = _get_study()
  study.base.optim.weight_decay = 0.9
  return study
"""
  )
  results = f'--results={tmp_path / "one" / "results.jsonl"}'
  refused = tiny.command('report', f'--study={edited}', results, f'--out={tmp_path / "two"}')
  refused.assert_error('--results=', 'another config')
  assert not (tmp_path / 'two').exists()


def test_a_study_of_experts_has_a_law_over_them(swept, tmp_path):
  study, workdir = swept
  path = tmp_path / 'study.py'
  path.write_text(study.read_text().replace("x='moe", "scaling=True, x='moe"))
  result = report(path, workdir, tmp_path / 'r', '--nofigures')
  assert result.code == 0, result.err
  assert '| 2 | 4 | - | - | - | - | not fitted' in (tmp_path / 'r' / 'scaling.md').read_text()


def test_results_alone_give_the_same_report(swept, tmp_path):
  study, workdir = swept
  assert report(study, workdir, tmp_path / 'one').code == 0
  results = f'--results={tmp_path / "one" / "results.jsonl"}'
  two = tiny.command('report', f'--study={study}', results, f'--out={tmp_path / "two"}')
  assert two.code == 0, two.err
  assert tiny.snapshot(tmp_path / 'one') == tiny.snapshot(tmp_path / 'two')


def test_thin_results_stand_in_the_folder_of_a_study(swept, tmp_path):
  study, workdir = swept
  folder = tmp_path / 'study'
  folder.mkdir()
  (folder / 'study.py').write_text(study.read_text())
  (folder / 'README.md').write_text('![what decides](figures/metric.png)')
  assert report(folder / 'study.py', workdir, tmp_path / 'whole').code == 0
  thin = report(folder / 'study.py', workdir, folder, '--thin')
  assert thin.code == 0, thin.err
  there = {path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()}
  assert there == {
    *('README.md', 'study.py', 'results.jsonl', 'figures/metric.png', 'cite.bib', 'methods.tex'),
    *('table.csv', 'table.md', 'table.tex'),
  }
  assert (folder / 'table.csv').read_text() == (tmp_path / 'whole' / 'table.csv').read_text()
  # From its own results again; and whole results are not overwritten by fewer.
  results = f'--results={folder / "results.jsonl"}', f'--out={folder}', '--thin'
  assert tiny.command('report', f'--study={folder / "study.py"}', *results).code == 0
  refused = report(study, workdir, tmp_path / 'whole', '--thin')
  refused.assert_error('--out=', '--thin would leave something out')


def test_its_numbers_as_json(swept, tmp_path):
  result = report(*swept, tmp_path / 'report', '--nofigures', '--json')
  assert result.code == 0, result.err
  said = json.loads(result.out)
  assert said['figures'] == {} and said['cite_url'] == methods.repository()
  tex = (tmp_path / 'report' / 'table.tex').read_text()
  titles = re.findall('% Not wide enough .* show them: (.*)\\.\n', tex)
  assert len(said['left_out_of_table_tex']) == len(''.join(titles).split('; ')) > 0
  records = read_records(tmp_path / 'report' / 'results.jsonl')
  for arm in said['arms']:
    values = [
      r.metrics[said['metric']['name']] for r in records if r.arm == arm['name'] and r.metrics
    ]
    assert sorted(arm['values'].values()) == sorted(values)
    if values:
      assert math.isclose(arm['interval']['mean'], sum(values) / len(values), rel_tol=1e-12)


def test_columns_are_chosen(swept, tmp_path):
  study, workdir = swept
  columns = '--columns=metric,capacity/router/max_violation/max,tokens'
  result = report(study, workdir, tmp_path / 'r', columns, '--wide_table', '--nofigures')
  assert result.code == 0, result.err
  assert '| arm | bits per byte | MaxVio, max of layers | tokens |' in result.out
  assert r'\begin{table*}' in (tmp_path / 'r' / 'table.tex').read_text()
  wrong = report(study, workdir, tmp_path / 'w', '--columns=metrik', '--nofigures')
  wrong.assert_error("--columns='metrik'", 'did you mean metric?')
  assert not (tmp_path / 'w').exists()


def test_what_was_tampered_with_is_named_and_not_averaged(swept, tmp_path):
  study, workdir = swept
  log = next(p for p in workdir.glob('trials/*/metrics.jsonl') if p.stat().st_size)
  good = log.read_text()
  log.write_text(good[:-20])
  try:
    result = report(study, workdir, tmp_path / 'r', '--nofigures')
  finally:
    log.write_text(good)
  assert result.code == 0, result.err
  table = (tmp_path / 'r' / 'table.md').read_text()
  assert '1 of 2' in table and 'metrics.jsonl is not what was written' in table


def test_an_outcome_without_digests_of_its_run_is_named(swept, tmp_path):
  study, workdir = swept
  path = next(workdir.glob('outcomes/*.json'))
  good = path.read_text()
  old = json.loads(good)
  del old['digests'], old['digest']
  outcome.write(workdir, path.stem, old)
  try:
    result = report(study, workdir, tmp_path / 'r', '--nofigures')
  finally:
    path.write_text(good)
  assert result.code == 0, result.err
  assert 'of an earlier version, without digests' in (tmp_path / 'r' / 'table.md').read_text()


def test_pack_refuses_trials_that_evaluate_while_they_train(swept, tmp_path):
  study, _ = swept
  flags = f'--study={study}', f'--workdir={tmp_path}', '--set=train.eval_every=2'
  tiny.command('sweep', *flags, '--pack=2').assert_error('train.eval_every=2', '--pack')


def test_refuses(swept, tmp_path):
  study, workdir = swept
  report(study, tmp_path / 'none', tmp_path / 'r').assert_error('--workdir=', 'does not exist')
  report(study, study, tmp_path / 'r').assert_error('--workdir=', 'is no folder')
  report(study.parent, workdir, tmp_path / 'r').assert_error('--study=', 'is no file')
  near = report(study.with_name('studdy.py'), workdir, tmp_path / 'r')
  near.assert_error('--study=', f'does not exist; did you mean {study}?')
  near = report(study.parent.with_name('reprot0') / 'study.py', workdir, tmp_path / 'r')
  near.assert_error('--study=', 'study.py?')
  tiny.command('report', f'--study={study}', f'--out={tmp_path / "r"}').assert_error(
    '--workdir: must'
  )
  bad = tmp_path / 'results.jsonl'
  bad.write_text(json.dumps({'trial': 'x'}) + '\n')
  result = tiny.command('report', f'--study={study}', f'--results={bad}', f'--out={tmp_path / "r"}')
  result.assert_error('--results=', 'results.jsonl', 'no record')
  # Half as many tokens in one arm: unequal compute is no fair comparison, planned or found.
  unfair = tmp_path / 'unfair.py'
  unfair.write_text(
    study.read_text().replace("{'data.name': 'text:/nowhere'}", "{'train.num_steps': 2}")
  )
  tiny.command('sweep', f'--study={unfair}', '--dry_run').assert_error('num_steps', 'horizon')
  report(unfair, workdir, tmp_path / 'r').assert_error('num_steps', 'horizon')
  assert not (tmp_path / 'r').exists()
  assert report(study, workdir, tmp_path / 'good', '--nofigures').code == 0
  first, *others = read_records(tmp_path / 'good' / 'results.jsonl')
  write_records(bad, [dataclasses.replace(first, step=2, num_steps=2), *others])
  result = tiny.command('report', f'--study={study}', f'--results={bad}', f'--out={tmp_path / "r"}')
  result.assert_error('num_steps', 'horizon')
  # What was found stands there all the same, unless an earlier report does.
  assert len(read_records(tmp_path / 'r' / 'results.jsonl')) == 6
  before = tiny.snapshot(tmp_path / 'good')
  out = f'--out={tmp_path / "good"}'
  tiny.command('report', f'--study={study}', f'--results={bad}', out).assert_error('num_steps')
  assert tiny.snapshot(tmp_path / 'good') == before


def test_a_folder_without_a_trial_of_the_study_is_refused(swept, tmp_path):
  study, workdir = swept
  other = tmp_path / 'other.py'
  other.write_text(study.read_text().replace('arms, (0, 1)', 'arms, (5, 6)'))
  refused = report(other, workdir, tmp_path / 'r')
  refused.assert_error('--workdir=', 'holds no trial of this study')
  run = next(workdir.glob('trials/*/manifest.json')).parent
  refused = report(study, run, tmp_path / 'r')
  refused.assert_error('--workdir=', 'holds no trial of this study, but a run')
  assert not (tmp_path / 'r').exists()
  # What names a run, given the sweep's folder, is told where runs are.
  for verb in ('evaluate', 'generate'):
    words = ('--prompt=a',) if verb == 'generate' else ()
    refused = tiny.command(verb, f'--workdir={workdir}', *words)
    refused.assert_error('workdir=', 'trials of a sweep; name one, as', f'{workdir}/trials/')


def test_the_reader_of_a_report_may_leave(swept, tmp_path, monkeypatch):
  class Gone(io.StringIO):
    def write(self, text):
      raise BrokenPipeError

    def fileno(self):
      return file.fileno()

  streams = iter((Gone(), io.StringIO()))
  with open(tmp_path / 'out', 'w') as file:
    monkeypatch.setattr(tiny, 'io', types.SimpleNamespace(StringIO=lambda: next(streams)))
    result = report(*swept, tmp_path / 'r', '--nofigures')
  assert (result.code, result.err) == (0, '')
