"""The list of runs, over manifests and metrics that are whole, damaged, missing or strange."""

import fcntl
import json
import os

import pytest

from moe_jax import config as config_lib
from moe_jax import runs
from moe_jax.run import claim, status
from moe_jax.sweep import collect
from tests import tiny

FACTS = {
  'status': 'finished',
  'step': 3,
  'vocab_size': 258,
  'data': {'fingerprint': 'f'},
  'mesh': {'data': 1, 'expert': 1},
  'devices': {},
  'git_commit': '0123456789abcdef',
  'git_dirty': True,
}


def write(folder, changes=None, *, metrics='', evaluations=(), **facts):
  """Makes a run; `changes` are {'moe.num_experts': 4, ...}."""
  config = config_lib.get_config()
  for name, value in (changes or {}).items():
    section, _, field = name.partition('.')
    config[section][field] = value
  folder.mkdir(parents=True)
  (folder / 'manifest.json').write_text(json.dumps(FACTS | {'config': config.to_dict()} | facts))
  (folder / 'metrics.jsonl').write_text(metrics)
  for split, value in evaluations:
    (folder / f'evaluation_{split}.json').write_text(json.dumps({'bits_per_byte': value}))
  return folder


def line(step, loss, split='train'):
  return json.dumps({'step': step, 'split': split, 'loss': loss}) + '\n'


@pytest.fixture
def folder(tmp_path):
  """Runs that are whole, below one another's names, and some that are not."""
  many = line(1, 2.0) + line(2, 1.5) + line(2, 9.0, 'valid') + '{"step": 3, "split": "tra'
  write(
    tmp_path / 'a', {'train.seed': 1}, metrics=many, evaluations=[('valid', 2.5), ('test', 2.25)]
  )
  write(tmp_path / 'study/trials/b', {'moe.num_experts': 4, 'mesh.data': 2}, status='running')
  write(tmp_path / 'study/trials/c', evaluations=[('text_new', 3.0)])
  # Nothing below a run is one.
  write(tmp_path / 'a' / 'checkpoints' / '3')
  (tmp_path / 'notes').mkdir()
  for name, content in {
    'cut': '{"status": ',
    'list': '[]',
    'shape': json.dumps(FACTS | {'config': []}),
    'deep': '[' * 100_000,
    'binary': b'\xff\xfe',
  }.items():
    (tmp_path / 'bad' / name).mkdir(parents=True)
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / 'bad' / name / 'manifest.json').write_bytes(data)
  (tmp_path / 'bad' / 'lost' / 'checkpoints' / '7').mkdir(parents=True)
  os.mkfifo(tmp_path / 'bad' / 'cut' / 'metrics.jsonl')
  os.symlink(tmp_path, tmp_path / 'notes' / 'loop')
  return tmp_path


def listed(folder):
  result = tiny.command('runs', folder, '--json')
  assert result.code == 0, result.err
  return {run.pop('run'): run for run in json.loads(result.out)}


@pytest.mark.usefixtures('no_hang')
def test_every_run_is_listed_with_what_its_files_say(folder):
  found = listed(folder)
  bad = {f'bad/{name}' for name in ('cut', 'list', 'shape', 'deep', 'binary', 'lost')}
  assert set(found) == {'a', 'study/trials/b', 'study/trials/c', *bad}
  a, b = found['a'], found['study/trials/b']
  assert (a['status'], a['step'], a['num_steps'], a['seed']) == ('finished', 3, 1000, 1)
  assert (a['git_commit'], a['git_dirty'], a['problem']) == ('0123456789abcdef', True, '')
  # The last whole line of training, not that of an evaluation, not what a kill cut.
  assert (a['loss'], a['loss_step']) == (1.5, 2)
  assert a['bits_per_byte'] == {'test': 2.25, 'valid': 2.5}
  assert (b['status'], b['loss'], b['config']['moe.num_experts']) == ('unfinished', None, 4)
  assert found['study/trials/c']['bits_per_byte'] == {'text_new': 3.0}
  for name in bad:
    assert (found[name]['status'], found[name]['step']) == ('damaged', None)
    assert found[name]['problem'].startswith('manifest.json')
  assert found['bad/lost']['problem'] == 'manifest.json is missing'
  assert 'config' in found['bad/shape']['problem']


def test_the_table_shows_in_what_runs_differ(folder):
  result = tiny.command('runs', folder)
  assert result.code == 0, result.err
  head, *rows = result.out.splitlines()
  assert head.split('  ')[0] == 'run' and head.endswith('differs in')
  cells = {row.split()[0]: row.split() for row in rows}
  assert cells['a'][1:5] == ['finished', '3/1000', '1.5000', '(step']
  assert cells['a'][5:10] == ['2)', '2.2500', '1', '01234567+', '0s']
  # The seed has a column of its own, and a mesh is no difference.
  assert cells['a'][10:] == ['num_experts=8']
  assert cells['study/trials/b'][-1] == 'num_experts=4'
  assert cells['study/trials/c'][4:6] == ['3.0000', '(text_new)']
  assert 'bad/lost: manifest.json is missing' in rows


def test_a_run_that_was_killed_is_not_running(tmp_path):
  """A killed process leaves `running` in the manifest, and its lock free."""
  metrics = line(1, 4.0) + line(2, 3.5)
  run = write(tmp_path / 'run', metrics=metrics, status='running', step=0)
  with claim.claimed(str(run)):
    held = listed(tmp_path)['run']
    assert (held['status'], held['step'], held['loss_step']) == ('running', 2, 2)
    assert not {p.name for p in run.iterdir()} - {'manifest.json', 'metrics.jsonl', '.lock'}
  free = listed(tmp_path)['run']
  assert (free['status'], free['step']) == ('stopped', 2)
  assert ' stopped  2/1000  3.5000  ' in tiny.command('runs', tmp_path).out
  # A copy without the lock: nobody can tell.
  (run / '.lock').unlink()
  assert listed(tmp_path)['run']['status'] == 'unfinished'
  # What has ended by itself has.
  done = write(tmp_path / 'done', status='interrupted')
  with claim.claimed(str(done)):
    assert listed(tmp_path)['done']['status'] == 'interrupted'


def test_a_run_that_begins_while_runs_are_listed_waits_for_the_lock(tmp_path, monkeypatch):
  run = write(tmp_path / 'run', status='running')
  with open(run / '.lock', 'w') as listing:
    fcntl.flock(listing, fcntl.LOCK_SH)
    monkeypatch.setattr('time.sleep', lambda _: fcntl.flock(listing, fcntl.LOCK_UN))
    with claim.claimed(str(run)):
      assert runs.describe(run)['status'] == 'running'


def test_what_a_sweep_keeps_of_a_pack_is_no_run(tmp_path):
  write(tmp_path / 'sweep' / 'trials' / 'a')
  (tmp_path / 'sweep' / 'packs' / 'p' / 'checkpoints' / '3').mkdir(parents=True)
  write(tmp_path / 'packs' / 'mine')
  assert set(listed(tmp_path)) == {'sweep/trials/a', 'packs/mine'}


def test_a_trial_has_the_numbers_of_its_sweep(tmp_path):
  run = write(tmp_path / 'sweep/trials/a', evaluations=[('text_new', 3.0), ('test', 2.75)])
  claims = tmp_path / 'sweep' / 'locks'
  claims.mkdir()
  with open(claims / 'a', 'w') as lock:
    assert listed(tmp_path)['sweep/trials/a']['status'] == 'finished'
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert listed(tmp_path)['sweep/trials/a']['status'] == 'evaluating'
    made = {name: {'split': 'test', 'bits_per_byte': 2.0 + i} for i, name in enumerate('ab')}
    made['dropless'] = {'split': 'test', 'bits_per_byte': 2.5}
    (tmp_path / 'sweep' / 'outcomes').mkdir()
    outcome = tmp_path / 'sweep' / 'outcomes' / 'a.json'
    outcome.write_text(json.dumps({'evaluations': made}))
    found = listed(tmp_path)['sweep/trials/a']
  assert found['status'] == 'finished'
  assert found['bits_per_byte'] == {
    'dropless/test': 2.5, 'a/test': 2.0, 'b/test': 3.0, 'test': 2.75, 'text_new': 3.0
  }  # fmt: skip
  assert ' 2.5000 (dropless/test) ' in tiny.command('runs', tmp_path).out
  assert runs.describe(run)['bits_per_byte'] == found['bits_per_byte']
  for damaged in ('', '[]', '{"evaluations": 3}', '{"evaluations": {"a": 3}}'):
    outcome.write_text(damaged)
    assert list(runs.describe(run)['bits_per_byte']) == ['test', 'text_new']


def test_a_trial_that_trains_is_running_at_the_step_that_it_logged(tmp_path):
  """The manifest of a member of a pack says step 0 until the pack ends."""
  run = write(tmp_path / 'run', metrics=line(1, 4.0) + line(90, 3.5), status='running', step=0)
  facts = json.loads((run / 'manifest.json').read_text())
  with claim.claimed(str(run)):
    assert collect._how_far(facts, run) == (90, 'running')
  assert collect._how_far(facts, run) == (90, 'stopped')
  assert collect._how_far(facts | {'status': 'interrupted', 'step': 50}, run) == (50, 'interrupted')
  assert collect._how_far(facts | {'status': 'finished'}, run)[1] == 'not evaluated yet'


def test_ages_and_differences():
  seconds = (0, 59, 60, 3599, 3600, 86399, 86400, 10 * 86400, -5)
  expected = ['0s', '59s', '1m', '59m', '1h', '23h', '1d', '10d', '0s']
  assert [runs._age(float(x)) for x in seconds] == expected
  same = {'config': {'moe.every': 1, 'moe.router': 'top_k'}}
  other = {'config': {'moe.every': 2, 'moe.router': 'top_k'}}
  third = {'config': {'moe.every': 4, 'moe.router': 'hash'}}
  assert runs.differing([same, {'config': {}}]) == []
  assert runs.differing([same, other, third, {'config': {}}]) == ['moe.every', 'moe.router']


def test_the_last_loss_is_found_behind_long_lines(tmp_path):
  """Lines of per-layer lists are longer than what is read at first."""
  long = json.dumps({'step': 3, 'split': 'valid', 'router/load': [0.125] * 60_000}) + '\n'
  path = tmp_path / 'metrics.jsonl'
  path.write_text(line(1, 4.0) + line(2, 3.5) + long)
  assert len(long) > 1 << 18
  assert status.last_loss(path) == (2, 3.5)
  path.write_text(long)
  assert status.last_loss(path) == (None, None)
  path.write_text(line(1, 'x') + line(1, 10**400) + '[]\n')
  assert status.last_loss(path) == (None, None)


def test_a_loss_that_is_not_finite_is_null_in_json(tmp_path):
  write(tmp_path / 'a', metrics=line(1, float('nan')), status='diverged')
  assert listed(tmp_path)['a']['loss'] is None
  assert ' nan ' in tiny.command('runs', tmp_path).out


def test_no_run_and_no_folder(tmp_path):
  result = tiny.command('runs', tmp_path)
  assert (result.code, result.out) == (0, f'no run below {tmp_path}\n')
  assert listed(tmp_path) == {}
  tiny.command('runs', tmp_path / 'none').assert_error('folder=', 'none', 'does not exist')
  file = tmp_path / 'file'
  file.write_text('')
  tiny.command('runs', file).assert_error('folder=', 'is no folder')
  tiny.command('runs', tmp_path, tmp_path).assert_error('argument=', 'not understood')
