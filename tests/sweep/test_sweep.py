"""A sweep: which trials there are, each run once whatever happens, and what is read from disk."""

import copy
import dataclasses
import json
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest

from moe_jax.errors import DamagedError, UserError
from moe_jax.results import summary
from moe_jax.results.records import read_records, write_records
from moe_jax.run import single
from moe_jax.run.metrics_file import read_metrics
from moe_jax.study import Comparison, Metric, Study, chain, point, product
from moe_jax.sweep import collect, dry_run, evaluations, outcome, runner, trials
from moe_jax.train import evaluate, program
from tests import tiny

BALANCED, FREE = 'load_balancing_weight=0.01', 'load_balancing_weight=0'


def make_study(text, more=(), **changes):
  base = tiny.config({**text, 'train.num_steps': 4})
  arms = chain(product({'moe.load_balancing_weight': (0, 0.01)}), *more)
  study = Study('test', 'does it?', base, arms, (0, 1))
  return dataclasses.replace(study, **changes)


STUDY_FILE = """
from moe_jax import config
from moe_jax.study import Comparison, Study, chain, point, product

def get_study():
  base = config.get_config()
  base.update({base!r})
  arms = chain(product({{'moe.load_balancing_weight': (0, 0.01)}}){more})
  return Study('test', 'does it?', base, arms, (0, 1))
"""


def study_file(folder, text, more='', **overrides):
  base = tiny.config({**text, 'train.num_steps': 4, **overrides}).to_dict()
  path = folder / 'study.py'
  path.write_text(STUDY_FILE.format(base=base, more=f', {more}' if more else ''))
  return path


def test_an_id_is_the_config_but_for_what_changes_no_result(text):
  study = make_study(text)
  found = trials.trials_of(study)
  assert [(t.arm, t.seed) for t in found] == [(FREE, 0), (FREE, 1), (BALANCED, 0), (BALANCED, 1)]
  assert len({t.id for t in found}) == 4
  elsewhere = trials.trials_of(study, {'mesh.data': 1, 'mesh.expert': 8, 'train.log_every': 2})
  assert [t.id for t in elsewhere] == [t.id for t in found]
  assert elsewhere[0].config.mesh.expert == 8
  longer = dataclasses.replace(study, base=tiny.config({**text, 'train.num_steps': 5}))
  assert not {t.id for t in trials.trials_of(longer)} & {t.id for t in found}
  # An int where a float belongs is that float: the same trial.
  same = make_study(text, arms=product({'moe.load_balancing_weight': (0.0, 0.01)}))
  assert [t.id for t in trials.trials_of(same)] == [t.id for t in found]


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'arms': point('a', {'moe.num_expert': 4})}, ('moe.num_expert=4', "arm 'a'")),
    ({'arms': point('a', {'moe.num_experts': 'four'})}, ("moe.num_experts='four'", 'int')),
    ({'arms': point('a', {'moe.num_selected_experts': 9})}, ("study.arms='a'", 'experts=9')),
    ({'arms': point('a', {}) + point('b', {'moe.num_experts': 8})}, ("'b'", "arm 'a', one config")),
    ({'arms': point('a', {}) + point('a', {'moe.every': 2})}, ("study.arms='a'", 'unique')),
    ({'arms': ()}, ('study.arms', 'none is left')),
    ({'seeds': (1, 1)}, ('study.seeds=(1, 1)',)),
    ({'baseline': 'dense'}, ("'dense'", 'no arm')),
    ({'comparisons': (Comparison(BALANCED, 'none'),)}, ("'none'", 'no arm')),
    ({'metric': Metric('valid/loss')}, ("study.metric='valid/loss'",)),
    ({'evaluations': ('all',)}, ("study.evaluations='all'", 'dropless')),
    ({'may_differ': ('luck',)}, ("study.may_differ='luck'",)),
    ({'metric': Metric('dropless/bar')}, ("study.metric='dropless/bar'", 'bits_per_byte')),
    ({'name': '../evil'}, ("study.name='../evil'", 'folder')),
    ({'name': ''}, ("study.name=''",)),
    ({'split': 'nope'}, ("study.split='nope'", 'valid')),
    ({'x': 'moe.nope'}, ("study.x='moe.nope'",)),
    ({'lines': 'a.b'}, ("study.lines='a.b'",)),
    ({'comparisons': (Comparison(FREE, FREE),)}, (FREE, 'itself')),
    ({'comparisons': (Comparison(BALANCED, FREE),) * 2}, ('twice',)),
    (
      {'more': (point('a', {'data.tokenizer': 'bpe', 'data.vocab_size': 512}),)},
      ("data.tokenizer={'", "'tokenizer' to its"),
    ),
    ({'more': (point('a', {'train.num_steps': 5}),)}, ('train.num_steps={', "'horizon' to its")),
    ({'more': (point('a', {'moe.mlp_dim': 32}),)}, ('training FLOPs={', "'compute' to its")),
  ],
)
def test_refuses(text, changes, words):
  study = make_study(text, **{'more': (), **changes})
  with pytest.raises(UserError) as caught:
    trials.trials_of(study)
  for word in words:
    assert word in str(caught.value)


@pytest.mark.parametrize(
  ('field', 'value', 'words'),
  [
    ('may_differ', 'data', ("study.may_differ='data'", 'tuple of str')),
    ('seeds', 3, ('study.seeds=3', 'tuple of int')),
    ('seeds', (0.5, 1), ('study.seeds', 'tuple of int')),
    ('arms', {'a': 1}, ('study.arms', 'tuple of Point')),
    ('metric', 'dropless/loss', ("study.metric='dropless/loss'", 'Metric')),
    ('base', {}, ('study.base', 'ConfigDict')),
    ('name', 3, ('study.name=3',)),
  ],
)
def test_refuses_what_python_lets_through(text, field, value, words):
  study = make_study(text)
  # Outside of tests nothing checks the annotations.
  object.__setattr__(study, field, value)
  with pytest.raises(UserError) as caught:
    trials.trials_of(study)
  for word in words:
    assert word in str(caught.value)


@pytest.fixture(scope='module')
def swept(text, tmp_path_factory):
  """(study, workdir) of a sweep with an arm that fails and one that diverges."""
  study = make_study(
    text,
    more=(
      point('absent', {'data.name': 'text:/nowhere'}),
      point('wild', {'optim.learning_rate': 1e30}),
    ),
    may_differ=('data',),
  )
  workdir = str(tmp_path_factory.mktemp('sweep'))
  said = []
  # Other files may have compiled the same program.
  program.step_of.cache_clear()
  before = program.step_of.cache_info()
  counts = runner.run(study, trials.trials_of(study), workdir, said.append)
  after = program.step_of.cache_info()
  return study, workdir, counts, said, after.misses - before.misses


def records_by_arm(study, workdir):
  found = {}
  for record in collect.records_of(study, workdir, 'sweep --study=s'):
    found.setdefault(record.arm, []).append(record)
  return found


def test_a_broken_arm_does_not_stop_the_rest(swept):
  study, workdir, counts, said, _ = swept
  assert counts == runner.Counts(finished=4, diverged=2, failed=2, elsewhere=0)
  assert len(said) == 8
  arms = records_by_arm(study, workdir)
  assert [r.status for r in arms[FREE] + arms[BALANCED]] == ['finished'] * 4
  assert {r.status for r in arms['absent']} == {'failed'}
  assert 'does not exist' in arms['absent'][0].reason
  assert {r.status for r in arms['wild']} == {'diverged'}
  assert 'gradient norm' in arms['wild'][0].reason
  assert arms[FREE][0].command == f'sweep --study=s --trial={arms[FREE][0].trial}'


def test_trials_of_one_program_compile_it_once(swept):
  # Seeds, weights and the learning rate are arguments of one step.
  assert swept[-1] == 1


def test_a_trial_is_what_training_and_evaluation_alone_give(swept, tmp_path):
  study, workdir, *_ = swept
  trial = trials.trials_of(study)[3]
  config = trial.config
  single.train(config, str(tmp_path / 'alone'))
  alone = read_metrics(tmp_path / 'alone' / 'metrics.jsonl')
  record = records_by_arm(study, workdir)[BALANCED][1]
  assert record.curve == [[line['step'], line['loss']] for line in alone]
  assert len(record.load) == 4 and len(record.load[0][1]) == 2
  result = tiny.command('evaluate', f'--workdir={tmp_path / "alone"}', '--nofigure')
  assert result.code == 0, result.err
  whole = json.loads((tmp_path / 'alone' / 'evaluation_test.json').read_text())
  # The command evaluates at eval_capacity_factor=2, which here drops next to nothing.
  dropless = record.metrics['dropless/bits_per_byte']
  assert abs(dropless - whole['bits_per_byte']) < 1e-2
  assert record.metrics['dropless/router/drop_share'] == 0
  assert record.metrics['capacity/router/drop_share'] > 0
  assert list(record.domains['dropless']) == ['prose', 'verse']
  assert record.parameters['active'] < record.parameters['total']


def test_names_known_in_advance_are_those_of_an_evaluation(swept):
  study, workdir, *_ = swept
  trial = trials.trials_of(study)[0]
  evaluation = outcome.read(workdir, trial.id)['evaluations']['dropless']
  others = {'split', 'domains', 'router/load', 'router/load_kept'}
  own = {*evaluations.POOLED_METRICS, *evaluations.POOLED_LAYER_METRICS}
  known = {*evaluations.METRICS, *evaluations.LAYER_METRICS}
  assert evaluation.keys() - others == known | own
  for of_domain in evaluation['domains'].values():
    assert of_domain.keys() - others == known
  lists = (*evaluations.LAYER_METRICS, *evaluations.POOLED_LAYER_METRICS)
  assert all(len(evaluation[name]) == 2 for name in lists)


def load_of_first_layer(trial):
  return sum(trial.evaluations['dropless']['router/load'][0]) + trial.seed


def too_short(trial):
  return trial.evaluations['dropless']['router/load'][99]


def test_any_number_may_decide_and_functions_of_the_study_file(swept, tmp_path):
  study, workdir, *_ = swept
  study = dataclasses.replace(
    study,
    arms=study.arms[:2],
    metric=Metric('dropless/router/max_violation/mean', 'MaxVio'),
    metrics={'sum': load_of_first_layer, 'short': too_short},
  )
  found = collect.records_of(study, workdir)
  for record in found:
    violation = record.metrics['dropless/router/max_violation']
    assert record.metrics[study.metric.name] == pytest.approx(sum(violation) / 2)
    # Shares add up to 1.
    assert record.metrics['user/sum'] == pytest.approx(1 + record.seed)
    assert 'user/short' not in record.metrics
    error = record.metric_errors['user/short']
    assert 'too_short, test_sweep.py:' in error and 'IndexError' in error
  whole = summary.summarize(study, found)
  assert len(whole.arms[0].values) == 2 and not whole.arms[0].absent
  # The list that the deciding number is of gives it no second time.
  assert whole.arms[0].metrics[study.metric.name].num == 2
  # The one that has no value says why.
  short = dataclasses.replace(study, metric=Metric('user/short', 'none'))
  absent = summary.summarize(short, collect.records_of(short, workdir)).arms[0].absent
  assert [a.seed for a in absent] == [0, 1] and 'IndexError' in absent[0].reason
  # Another number can be decided by later, also of what was kept in results.jsonl.
  write_records(tmp_path / 'results.jsonl', found)
  kept = read_records(tmp_path / 'results.jsonl')
  verse = dataclasses.replace(study, metric=Metric('dropless/domains/verse/loss', 'nats'))
  again = [collect.as_requested(verse, record) for record in kept]
  direct = collect.records_of(verse, workdir)
  assert [r.metrics[verse.metric.name] for r in again] == [
    r.metrics[verse.metric.name] for r in direct
  ]
  # A function that was changed does not mix with values of the earlier one.
  changed = dataclasses.replace(study, metrics={'sum': lambda trial: 3.0})
  assert {r.metrics['user/sum'] for r in collect.records_of(changed, workdir)} == {3.0}
  with pytest.raises(UserError, match="study.metrics='sum': --results holds values of another"):
    collect.as_requested(changed, kept[0])


def test_a_plan_counts_what_is_left_by_what_was_measured(swept):
  study, workdir, *_ = swept
  wide = point('wide', {'moe.capacity_factor': 3.0})
  study = dataclasses.replace(study, arms=study.arms[:2] + wide)
  plan = dry_run.make_plan(study, trials.trials_of(study), workdir, probes=False)
  assert [row['seconds'] is None for row in plan.rows] == [True] * 4 + [False] * 2
  basis = plan.estimate.basis['training']
  assert '8 steps of 2 trials, the time of a step as measured of other programs' in basis
  basis = plan.estimate.basis['evaluation']
  assert 'of 4 evaluations, the time of a batch as measured of other programs' in basis
  assert '4 of them done' in dry_run.text(plan) and ' done  load_bal' in dry_run.text(plan)


def test_what_the_data_lacks_ends_a_sweep_before_it_trains(text, tmp_path):
  study = make_study(text, metric=Metric('dropless/domains/drama/loss'))
  with pytest.raises(UserError, match='has no such domain; it has prose, verse'):
    runner.run(study, trials.trials_of(study), str(tmp_path), lambda line: None)
  assert not list(tmp_path.rglob('manifest.json'))


def test_labels_stand_in_records(swept):
  study, workdir, *_ = swept
  labels = [record.label for record in collect.records_of(study, workdir)]
  assert labels == ['LBL=0', 'LBL=0', 'LBL=0.01', 'LBL=0.01', *['absent'] * 2, *['wild'] * 2]


def test_done_trials_are_left_alone_and_failed_ones_tried_again(swept):
  study, workdir, *_ = swept
  before = tiny.snapshot(os.path.join(workdir, 'trials'))
  said = []
  counts = runner.run(study, trials.trials_of(study), workdir, said.append)
  assert counts.finished == 4 and counts.failed == 2
  assert len(said) == 2 and all('absent' in line for line in said)
  assert tiny.snapshot(os.path.join(workdir, 'trials')) == before


@pytest.mark.parametrize(
  'what', ['outcome', 'cut outcome', 'metrics', 'manifest', 'size in manifest', 'other config']
)
def test_what_was_tampered_with_is_named_and_not_averaged(swept, what):
  study, workdir, *_ = swept
  trial = trials.trials_of(study)[0]
  folder = trial.folder(workdir)
  path = {'metrics': folder / 'metrics.jsonl', 'manifest': folder / 'manifest.json'}.get(
    what, outcome.path_of(workdir, trial.id)
  )
  if what in ('other config', 'size in manifest'):
    path = folder / 'manifest.json'
  good = path.read_text()
  bad = {
    'outcome': good.replace('"loss": ', '"loss": 0'),
    'cut outcome': good[: len(good) // 2],
    'metrics': good[: len(good) // 2],
    'manifest': '',
    'size in manifest': good.replace('"active": ', '"active": 1'),
    'other config': good.replace('"num_experts": 8', '"num_experts": 4'),
  }[what]
  assert bad != good
  path.write_text(bad)
  try:
    record = collect.records_of(study, workdir)[0]
    assert record.status == 'damaged' and not record.metrics
    assert (trial.id if what == 'other config' else str(path)) in record.reason
  finally:
    path.write_text(good)
  assert collect.records_of(study, workdir)[0].status == 'finished'


def test_another_split_is_evaluated_without_training(swept, tmp_path, monkeypatch):
  study, workdir, *_ = swept
  shutil.copytree(workdir, tmp_path / 'w')
  other = dataclasses.replace(study, split='valid', arms=study.arms[:1])
  monkeypatch.setattr(single, '_steps', None)  # Training would need it.
  counts = runner.run(other, trials.trials_of(other), str(tmp_path / 'w'), lambda line: None)
  assert counts.finished == 2
  records = collect.records_of(other, tmp_path / 'w')
  assert [r.data['split'] for r in records] == ['valid'] * 2


def test_trials_that_cannot_be_evaluated_together_are_evaluated_alone_and_it_is_said(
  swept, tmp_path, monkeypatch
):
  study, workdir, *_ = swept
  shutil.copytree(workdir, tmp_path / 'w')
  other = dataclasses.replace(study, split='valid', arms=study.arms[:1])

  def too_large(*args, **kwargs):
    raise RuntimeError('out of memory')

  monkeypatch.setattr(evaluate, 'evaluate_packed', too_large)
  said = []
  counts = runner.run(other, trials.trials_of(other), str(tmp_path / 'w'), said.append, pack=2)
  assert counts.finished == 2
  assert said[0] == (
    'warning: evaluating 2 trials together failed, they are evaluated alone: '
    'RuntimeError: out of memory'
  )
  ended = [outcome.read(tmp_path / 'w', t.id) for t in trials.trials_of(other)]
  assert [of['evaluated_together'] for of in ended] == [1, 1]


def test_what_was_not_run_or_not_finished_is_said(text, tmp_path):
  study = make_study(text)
  first = trials.trials_of(study)[0]
  assert {r.status for r in collect.records_of(study, tmp_path)} == {'missing'}
  single.train(first.config, str(first.folder(tmp_path)))
  record = collect.records_of(study, tmp_path)[0]
  assert (record.status, record.reason) == ('unfinished', 'not evaluated yet')


def test_the_command_plans_runs_and_refuses(text, tmp_path):
  path = study_file(tmp_path, text, "point('wide', {'moe.capacity_factor': 3.0})")
  study = f'--study={path}'
  plan = tiny.command('sweep', study, '--dry_run')
  assert plan.code == 0, plan.err
  ids = [line.split()[0] for line in plan.out.splitlines()[2:8]]
  assert len(set(ids)) == 6 and '6 trials' in plan.out
  workdir = f'--workdir={tmp_path / "w"}'
  assert not (tmp_path / 'w').exists()
  result = tiny.command('sweep', study, workdir, '--shard=1/3', '--set=mesh.data=1')
  assert result.code == 0, result.err
  assert '2 finished' in result.out
  done = {p.stem for p in (tmp_path / 'w' / 'outcomes').iterdir()}
  assert done == {ids[1], ids[4]}
  result = tiny.command('sweep', study, workdir, f'--trial={ids[0]}')
  assert '1 finished' in result.out
  for flags, words in (
    (['--shard=3/3'], ('--shard=', '3/3')),
    (['--trial=abc'], ('--trial=', 'dry_run')),
    (['--set=moe.num_experts=4'], ('--set=', 'mesh.data')),
    (['--set=mesh.data=two'], ('--set=', 'int')),
    (['--set=mesh.data=4'], ('mesh.data=4', 'found')),
    (['--set=moe.exchange=ragged'], ("moe.exchange='ragged'", 'must be padded on cpu')),
  ):
    tiny.command('sweep', study, workdir, *flags).assert_error(*words)
  tiny.command('sweep', '--study=nowhere.py', workdir).assert_error('--study=', 'does not exist')
  path.write_text('def get_study():\n  return 1 / 0\n')
  tiny.command('sweep', study, workdir).assert_error('--study=', 'line 2: ZeroDivisionError')
  path.write_text('raise SystemExit(0)\n')
  tiny.command('sweep', study, workdir).assert_error('--study=', 'SystemExit')
  tiny.command('sweep', f'--study={tmp_path}', workdir).assert_error('--study=', 'is no file')


LONG = {'train.num_steps': 60, 'train.checkpoint_every': 5}


@pytest.fixture(scope='module')
def whole(text, tmp_path_factory):
  """(study file, records) of a sweep of trials long enough to be disturbed, which this was not."""
  folder = tmp_path_factory.mktemp('whole')
  path = study_file(folder, text, **LONG)
  study = trials.load_study(str(path))
  runner.run(study, trials.trials_of(study), str(folder), lambda line: None)
  return path, collect.records_of(study, folder)


def wait_for_steps(workdir, trials_begun):
  """Waits until `trials_begun` trials are in the middle, of workers started just now."""
  started = time.time()
  while time.time() - started < 120:
    logs = [p for p in workdir.glob('trials/*/metrics.jsonl') if p.stat().st_mtime > started]
    if len(logs) >= trials_begun and all(log.read_bytes().count(b'\n') > 8 for log in logs):
      return
    time.sleep(0.02)
  raise AssertionError(f'{trials_begun} trials did not begin')


def assert_same_results(whole, workdir, rel=1e-6):
  path, wanted = whole
  study = trials.load_study(str(path))
  found = collect.records_of(study, workdir)
  assert [r.status for r in found] == ['finished'] * 4
  for one, other in zip(found, wanted, strict=True):
    assert [step for step, _ in one.curve] == [step for step, _ in other.curve]
    np.testing.assert_allclose(one.curve, other.curve, rtol=rel)
    for name, value in other.metrics.items():
      assert one.metrics[name] == pytest.approx(value, rel=rel, abs=rel), name
  # No step stands twice, whatever was resumed.
  for log in workdir.glob('trials/*/metrics.jsonl'):
    assert [line['step'] for line in read_metrics(log)] == list(range(1, 61))


@pytest.mark.slow
def test_two_workers_and_kill_9_give_each_trial_once_and_the_same_results(whole, tmp_path):
  workdir = tmp_path / 'w'
  command = 'sweep', f'--study={whole[0]}', f'--workdir={workdir}'
  workers = [tiny.start(*command) for _ in range(2)]
  wait_for_steps(workdir, 2)
  workers[0].kill()
  assert tiny.finish(workers[0]).code == -signal.SIGKILL
  assert tiny.finish(workers[1]).code == 0
  result = tiny.finish(tiny.start(*command))
  assert result.code == 0 and '4 finished' in result.out, result.err
  assert_same_results(whole, workdir)
  # No trial was trained by two workers: at most the killed one was resumed.
  manifests = [json.loads(p.read_text()) for p in workdir.glob('trials/*/manifest.json')]
  assert sum(len(facts.get('resumed_from', [])) for facts in manifests) <= 1
  # What one worker compiled, the others read.
  assert list((workdir / 'compilation_cache').glob('*/*'))


@pytest.mark.slow
@pytest.mark.parametrize('pack', [1, 4])
def test_a_full_disk_and_ctrl_c_lose_nothing(whole, tmp_path, pack):
  workdir = tmp_path / 'w'
  command = 'sweep', f'--study={whole[0]}', f'--workdir={workdir}', f'--pack={pack}'
  # Files of at most 30 kB: enough for everything but a checkpoint.
  # Python would leave the bytecode of libraries cut short, and take it for whole from then on.
  unlimited = {'JAX_ENABLE_COMPILATION_CACHE': 'false', 'PYTHONDONTWRITEBYTECODE': '1'}
  process = tiny.start(*command, **unlimited)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
  result = tiny.finish(process)
  assert result.code == 2 and 'Traceback' not in result.err, result.err
  last = result.err.strip().splitlines()[-1]
  assert last.startswith(f"error: --workdir='{workdir}'") and 'File too large' in last
  # It stopped at the first trial and blamed none.
  assert not list(workdir.glob('outcomes/*'))
  process = tiny.start(*command)
  wait_for_steps(workdir, pack)
  process.send_signal(signal.SIGINT)
  result = tiny.finish(process)
  assert result.code == 130 and 'the same command goes on from here' in result.out, result.err
  result = tiny.finish(tiny.start(*command))
  assert result.code == 0 and '4 finished' in result.out, result.err
  # A packed step rounds in another order.
  assert_same_results(whole, workdir, 1e-6 if pack == 1 else 1e-2)


def test_trials_of_a_results_file_are_not_run_again(swept, tmp_path):
  study, workdir, *_ = swept
  found = collect.records_of(study, workdir)
  # One was written before a field was known, and under another name; one has another config.
  old = dataclasses.replace(found[0], arm='before', config=copy.deepcopy(found[0].config))
  del old.config['train']['load_decay']
  other = dataclasses.replace(found[1], config=copy.deepcopy(found[1].config))
  other.config['moe']['num_experts'] = 4
  path = tmp_path / 'results.jsonl'
  write_records(path, [old, other, *found[2:]])
  known = collect.known_records(trials.trials_of(study), path)
  ended = [r for r in [found[0], *found[2:]] if r.status in ('finished', 'diverged')]
  assert known == {r.trial: r for r in ended} | {
    found[0].trial: dataclasses.replace(old, arm=found[0].arm)
  }
  merged = collect.records_of(study, tmp_path / 'elsewhere', known=known)
  assert [r.status for r in merged] == [
    'finished', 'missing', 'finished', 'finished', 'missing', 'missing', 'diverged', 'diverged',
  ]  # fmt: skip
  other.config['moe'] = 'none'
  write_records(path, [other])
  with pytest.raises(DamagedError, match='cannot be read'):
    collect.known_records(trials.trials_of(study), path)


def test_the_command_takes_a_results_file(whole, tmp_path):
  path, found = whole
  results = tmp_path / 'results.jsonl'
  write_records(results, found[:3])
  flags = f'--study={path}', f'--results={results}'
  plan = tiny.command('sweep', *flags, '--dry_run')
  assert plan.code == 0 and '3 of 4 trials ended in' in plan.out, plan.err
  assert found[3].trial in plan.out and found[0].trial not in plan.out
  result = tiny.command('sweep', f'--study={path}', f'--results={tmp_path}/none', '--dry_run')
  result.assert_error('--results=', 'does not exist')


def test_a_packed_sweep_gives_the_records_of_one_that_is_not(swept, tmp_path):
  study, workdir, *_ = swept
  said = []
  counts = runner.run(study, trials.trials_of(study), str(tmp_path), said.append, pack=8)
  assert counts == runner.Counts(finished=4, diverged=2, failed=2, elsewhere=0)
  # The learning rate of the wild arm is a hyperparameter too: six trials in one program.
  packed = [
    json.loads((t.folder(tmp_path) / 'manifest.json').read_text()).get('packed_with')
    for t in trials.trials_of(study)
    if t.arm != 'absent'
  ]
  assert packed == [5] * 6
  # Two of the six diverged; what is left was evaluated together, too.
  together = [
    outcome.read(tmp_path, t.id).get('evaluated_together') for t in trials.trials_of(study)[:4]
  ]
  assert together == [4] * 4 and not [line for line in said if 'warning' in line]
  alone = collect.records_of(study, workdir)
  for one, other in zip(collect.records_of(study, tmp_path), alone, strict=True):
    assert (one.trial, one.status) == (other.trial, other.status)
    for name, value in other.metrics.items():
      assert one.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
  assert not list((tmp_path / 'packs').iterdir())
