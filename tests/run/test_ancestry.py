"""Training on: a new run from the parameters of another, and a run made longer."""

import hashlib
import json
import shutil
import signal

import jax
import numpy as np
import optax
import pytest

import moe_jax
from moe_jax import optim
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import ancestry, manifest, same_run, single
from moe_jax.schema import FREE_FIELDS
from moe_jax.study import Point, Study, product
from moe_jax.sweep import collect, runner, trials
from moe_jax.train.state import init_state
from tests import tiny
from tests.run.conftest import LIVELY
from tests.run.test_single import assert_same_run, metrics_of, signal_at, state_of

# A run of other text, length, schedule, rate and mesh.
OTHER = {
  **LIVELY,
  'train.num_steps': 3,
  'train.checkpoint_every': 2,
  'train.eval_every': 0,
  'optim.schedule': 'cosine',
  'optim.learning_rate': 0.002,
  'mesh.data': 1,
  'mesh.expert': 8,
}


@pytest.fixture(scope='module')
def source(lively):
  """A run of six steps at a constant rate, with checkpoints 3 and 6."""
  return lively[1]


@pytest.fixture(scope='module')
def other_text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('other')
  words = tiny.write_text(folder / 'text', documents=5, words=70)
  return {'data.name': f'text:{words}', 'data.data_dir': str(folder / 'data')}


@pytest.fixture(scope='module')
def child(source, other_text, tmp_path_factory):
  """(config, directory) of a run that starts from a copy of step 6, which is then gone."""
  folder = tmp_path_factory.mktemp('child')
  shutil.copytree(source, folder / 'source')
  config = tiny.config({**other_text, **OTHER, 'train.init_from': str(folder / 'source')})
  assert single.train(config, str(folder / 'run')) == (3, True, None)
  shutil.move(folder / 'source', folder / 'moved')
  return config, folder / 'run'


def started(source, overrides):
  """Returns (state before the first step, entry of the ancestry)."""
  config = tiny.config({'train.init_from': str(source), **overrides})
  mesh = make_mesh(config.mesh.data, config.mesh.expert)
  model = build_task(config, mesh, tiny.VOCAB_SIZE, 'train', config.data.batch_size)
  optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
  found, _ = ancestry.inherited(config, f'{source}_new', None)
  with jax.set_mesh(mesh):
    new = init_state(model, optimizer, config.train.seed)
    return ancestry.start(found, config, model, optimizer, new)


def test_parameters_and_router_state_are_those_of_the_step(text, source):
  config = tiny.config({**text, **LIVELY})
  assert state_of(source, config)[0] == 6
  state, entry = started(f'{source}@6', {**text, **OTHER, 'train.seed': 5})
  expected = state_of(source, config)[1]
  tiny.assert_equal(state.params, expected.params)
  tiny.assert_equal(state.router_state, expected.router_state)
  assert np.ptp(np.asarray(state.router_state['bias'])) > 0
  assert (int(state.step), int(state.seed)) == (0, 5)
  # Moments begin at zero.
  assert not any(np.any(leaf) for leaf in tiny.leaves(state.opt_state).values())
  assert entry['taken'] == ['params', 'router_state']
  earlier, other_entry = started(f'{source}@3', {**text, **OTHER})
  assert int(other_entry['step']) == 3 and other_entry['digest'] != entry['digest']
  assert np.any(earlier.params['embedding'] != state.params['embedding'])


def test_the_optimizer_goes_on_and_its_schedule_begins_anew(text, source):
  overrides = {**text, **OTHER, 'train.init_optimizer': True, 'train.init_router_state': False}
  state, entry = started(source, overrides)
  expected = state_of(source, tiny.config({**text, **LIVELY}))[1].opt_state
  assert entry['taken'] == ['opt_state', 'params'] and entry['step'] == 6
  assert not np.any(state.router_state['bias'])

  def find(tree, kind):
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in nodes if isinstance(node, kind))

  tiny.assert_equal(
    find(state.opt_state, optax.ScaleByAdamState), find(expected, optax.ScaleByAdamState)
  )
  assert int(find(state.opt_state, optax.ScaleByAdamState).count) == 6
  assert int(find(expected, optax.ScaleByScheduleState).count) == 6
  assert int(find(state.opt_state, optax.ScaleByScheduleState).count) == 0


def test_a_child_begins_where_its_source_ended_and_says_so(source, child):
  config, workdir = child
  facts, of_source = manifest.read(workdir), manifest.read(source)
  (entry,) = facts['ancestry']
  assert entry.pop('digest') == started(source, {**OTHER, **text_of(config)})[1]['digest']
  assert entry == {
    'workdir': config.train.init_from,
    'step': 6,
    'git_commit': of_source['git_commit'],
    'config_digest': hashlib.sha256(
      json.dumps(of_source['config'], sort_keys=True).encode()
    ).hexdigest(),
    'data_fingerprint': of_source['data']['fingerprint'],
    'taken': ['params', 'router_state'],
  }
  assert facts['data']['fingerprint'] != entry['data_fingerprint']
  # It has learned already: random parameters begin at log 258 = 5.55.
  first = metrics_of(workdir)[0]['loss']
  assert first < metrics_of(source)[0]['loss'] - 0.5
  assert metrics_of(workdir)[0]['step'] == 1


def text_of(config):
  return {name: config.data[name.removeprefix('data.')] for name in ('data.name', 'data.data_dir')}


def test_a_child_goes_on_without_its_source(child, tmp_path, monkeypatch, capsys):
  config, undisturbed = child
  source = undisturbed.parent / 'source'
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed.parent / 'moved', source)
  with monkeypatch.context() as patch:
    signal_at(patch, 2, signal.SIGTERM)
    assert single.train(config, str(workdir)) == (2, False, signal.SIGTERM)
  assert 'starting from step 6' in capsys.readouterr().out
  shutil.rmtree(source)
  assert single.train(config, str(workdir)) == (3, True, None)
  assert_same_run(workdir, undisturbed, config)
  assert manifest.read(workdir)['ancestry'] == manifest.read(undisturbed)['ancestry']
  assert single.train(config, str(workdir)) == (3, True, None)
  assert moe_jax.load_run(workdir).dataset.domains == ('prose', 'verse')


def test_before_its_first_checkpoint_a_child_wants_the_same_source(child, tmp_path, monkeypatch):
  """As after a kill in the first steps. The newest step of the source may be another then."""
  config, undisturbed = child
  source, workdir = undisturbed.parent / 'source', tmp_path / 'run'
  shutil.copytree(undisturbed, workdir)
  shutil.rmtree(workdir / 'checkpoints')
  facts = {**manifest.read(workdir), 'status': 'running', 'step': 0}
  manifest.write(workdir, facts)

  def refused(words):
    before = tiny.snapshot(workdir)
    with pytest.raises(UserError, match=words):
      single.train(config, str(workdir))
    assert tiny.snapshot(workdir) == before

  refused('train.init_from=.*holds no run')
  shutil.copytree(undisturbed.parent / 'moved', source)
  try:
    (entry,) = facts['ancestry']
    manifest.write(workdir, {**facts, 'ancestry': [{**entry, 'digest': 'another'}]})
    refused('holds other numbers than when .* started from it')
    manifest.write(workdir, {**facts, 'ancestry': [{**entry, 'step': 3}]})
    refused(r'holds other numbers .*step 3 then, 3 now')
    manifest.write(workdir, facts)
    with pytest.raises(UserError, match='another run'):
      single.train(config, str(workdir), pinned={**entry, 'digest': 'another'})
    (source / 'checkpoints' / '6').rename(source / 'six')
    refused(r'no checkpoint of step 6 there, but of \[3\]')
    (source / 'six').rename(source / 'checkpoints' / '6')
    assert single.train(config, str(workdir)) == (3, True, None)
    assert_same_run(workdir, undisturbed, config)
  finally:
    shutil.rmtree(source)


def test_a_grandchild_knows_its_whole_ancestry(child, tmp_path):
  config, parent = child
  more = {**text_of(config), **OTHER, 'train.init_from': f'{parent}@3', 'train.num_steps': 1}
  assert single.train(tiny.config(more), str(tmp_path / 'run')).finished
  found = manifest.read(tmp_path / 'run')['ancestry']
  assert [entry['step'] for entry in found] == [6, 3]
  assert found[:1] == manifest.read(parent)['ancestry']
  assert found[1]['workdir'] == str(parent)


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    (
      {'moe.num_experts': 16},
      r'params/layers/block_0/moe/router is \[2, 16, 8\] in it and \[2, 16, 16\] in this run$',
    ),
    ({'moe.num_shared_experts': 1}, 'params/layers/block_0/shared/w_in is not there in it'),
    ({'model.embed_dim': 32}, r'params/embedding is \[258, 16\] in it and \[258, 32\]'),
    (
      {'moe.router': 'top_k', 'moe.bias_rate': 0.001},
      r'router_state/bias is \[2, 8\] in it and not .*train.init_router_state=false',
    ),
    (
      {'optim.name': 'sgd', 'optim.momentum': 0.5, 'train.init_optimizer': True},
      'opt_state/.*train.init_optimizer=false',
    ),
    ({'data.tokenizer': 'bpe', 'data.vocab_size': 512}, "data.tokenizer='bpe': must be bytes"),
    ({'train.init_from': '@nowhere@5'}, "train.init_from='@nowhere@5': holds no run"),
    ({'train.init_from': 'SOURCE@5'}, r'no checkpoint of step 5 there, but of \[3, 6\]'),
    ({'train.init_from': 'SELF'}, 'is the run itself'),
  ],
)
def test_a_source_that_does_not_fit_is_refused(source, text, tmp_path, overrides, words):
  workdir = tmp_path / 'run'
  given = {'SOURCE@5': f'{source}@5', 'SELF': str(workdir)}
  changes = {**text, **LIVELY, 'train.init_from': str(source), **overrides}
  changes['train.init_from'] = given.get(changes['train.init_from'], changes['train.init_from'])
  with pytest.raises(UserError, match=words):
    single.train(tiny.config(changes), str(workdir))
  assert not workdir.exists()


def test_what_has_no_meaning_without_a_source_is_refused():
  for name, value in (('init_optimizer', True), ('init_router_state', False)):
    with pytest.raises(UserError, match=f'train.{name}={value}: must be {not value} without'):
      tiny.config({f'train.{name}': value})


def test_a_child_inherits_the_tokenizer(text, other_text, tmp_path):
  bpe = {'data.tokenizer': 'bpe', 'data.vocab_size': 512, 'train.num_steps': 1}
  bpe |= {'moe.num_experts': 0, 'mesh.data': 1, 'mesh.expert': 1}
  source, workdir = tmp_path / 'source', tmp_path / 'run'
  assert single.train(tiny.config({**text, **bpe}), str(source)).finished
  config = tiny.config({**other_text, **bpe, 'train.init_from': str(source)})
  other = config.copy_and_resolve_references()
  other.data.vocab_size = 600
  with pytest.raises(UserError, match='data.vocab_size=600: must be 512, which train.init_from='):
    single.train(other, str(workdir))
  assert single.train(config, str(workdir)).finished
  own, of_source = (manifest.read(path)['data'] for path in (workdir, source))
  assert own['tokenizer'] == of_source['tokenizer']
  assert own['fingerprint'] != of_source['fingerprint']
  shutil.rmtree(source)
  run = moe_jax.load_run(workdir)
  assert run.dataset.tokenizer.fingerprint == own['tokenizer']
  result = tiny.command('evaluate', f'--workdir={workdir}', '--nofigure')
  assert result.code == 0, result.err


def test_a_lengthened_run_is_one_that_was_long_from_the_start(source, text, tmp_path, capsys):
  short = tiny.config({**text, **LIVELY, 'train.num_steps': 4})
  whole = tiny.config({**text, **LIVELY})
  workdir = tmp_path / 'run'
  assert single.train(short, str(workdir)) == (4, True, None)
  assert single.train(whole, str(workdir)) == (6, True, None)
  assert 'lengthened to 6 steps; goes on from step 4' in capsys.readouterr().out
  assert_same_run(workdir, source, whole)
  facts = manifest.read(workdir)
  assert facts['lengthened'] == [{'at': 4, 'from': 4, 'to': 6}]
  assert facts['config']['train']['num_steps'] == 6
  # Killed before the next checkpoint: the one that is there is still of the shorter run.
  shutil.rmtree(workdir / 'checkpoints' / '6')
  manifest.write(workdir, {**facts, 'status': 'running', 'step': 4})
  assert moe_jax.load_run(workdir).step == 4
  assert single.train(whole, str(workdir)) == (6, True, None)
  assert 'disagree' not in capsys.readouterr().out
  assert_same_run(workdir, source, whole)
  assert manifest.read(workdir)['lengthened'] == facts['lengthened']
  with pytest.raises(UserError, match='train.num_steps=4: the run in .* has 6; use another'):
    single.train(short, str(workdir))
  shutil.rmtree(workdir / 'checkpoints')
  longer = tiny.config({**text, **LIVELY, 'train.num_steps': 9})
  with pytest.raises(UserError, match="can't be lengthened: its checkpoints are gone"):
    single.train(longer, str(workdir))


def test_schedules_that_know_their_end_are_not_lengthened():
  def check(schedule, step, **changes):
    overrides = {'optim.schedule': schedule, 'train.num_steps': 20, **changes}
    config = tiny.config(overrides)
    facts = {'config': config.to_dict(), 'status': 'running'}
    config.train.num_steps = 40
    same_run.check_same_config('DIR', facts, config, step)

  for schedule in ('cosine', 'linear'):
    with pytest.raises(UserError, match=f'schedule={schedule} was .* train.init_from=DIR'):
      check(schedule, 5)
  check('constant', 20)
  # Of 20 steps, the last 20% decay.
  wsd = {'optim.decay_fraction': 0.2, 'optim.warmup_steps': 3}
  check('wsd', 16, **wsd)
  with pytest.raises(UserError, match='decays from step 16 on and its newest .* is of 17'):
    check('wsd', 17, **wsd)


def test_before_its_decay_wsd_does_not_know_its_length():
  config = tiny.config({'optim.schedule': 'wsd', 'optim.warmup_steps': 3, 'train.num_steps': 20})
  start = optim.decay_start(config.optim, 20)
  short, long = (optim.make_schedule(config.optim, steps) for steps in (20, 50))
  rates = [[float(schedule(step)) for step in range(20)] for schedule in (short, long)]
  assert rates[0][:start] == rates[1][:start]
  assert rates[0][start + 1] < rates[1][start + 1]


def test_a_study_names_the_step_it_starts_from(text):
  base = tiny.config({**text, **LIVELY, 'train.num_steps': 2})

  def found(given):
    arms = Point('new', {}), Point('on', {'train.init_from': given, 'optim.learning_rate': 0.001})
    study = Study('s', 'Is it better to train on?', base, arms, (0, 1))
    return trials.trials_of(study)

  with pytest.raises(UserError, match="init_from='runs/a': of arm 'on': must name a step"):
    found('runs/a')
  # Arms share a program; what starts from another run is not packed with the others.
  packs = [[trial.arm for trial in unit] for unit in runner._units(found('runs/a@3'), 4)]
  assert packs == [['new', 'new'], ['on', 'on']]


def test_trials_of_a_sweep_start_from_the_same_numbers(text, child, tmp_path):
  facts = manifest.read(child[1])
  config = tiny.config({**text, **LIVELY, 'train.init_from': 'runs/a@3'})
  trial = trials.Trial('b', 'on', 0, {}, config)
  for name, given in (('a', 'runs/a@3'), ('c', 'runs/b@3')):
    (tmp_path / 'trials' / name).mkdir(parents=True)
    facts['config']['train']['init_from'] = given
    facts['ancestry'] = [{**facts['ancestry'][0], 'digest': name}]
    manifest.write(tmp_path / 'trials' / name, facts)
  assert runner._pinned(trial, str(tmp_path))['digest'] == 'a'
  (tmp_path / 'trials' / 'a' / 'manifest.json').write_text('{')
  assert runner._pinned(trial, str(tmp_path)) is None


def test_a_sweep_starts_each_trial_from_the_run_that_its_base_names(text, source, tmp_path):
  """At a rate that moves no float32, so that parameters at the end are those at the start."""
  given = f'{source}@3'
  changes = {'train.num_steps': 2, 'train.eval_every': 0, 'optim.learning_rate': 1e-30}
  base = tiny.config({**text, **LIVELY, **changes, 'train.init_from': given})
  arms = product({'moe.load_balancing_weight': (0, 0.01)})
  study = Study('s', 'Does it matter here?', base, arms, (1,), evaluations=('dropless',))
  found = trials.trials_of(study)
  counts = runner.run(study, found, str(tmp_path), lambda line: None, pack=2)
  assert counts == runner.Counts(finished=2, diverged=0, failed=0, elsewhere=0)
  expected, entry = started(given, {**text, **LIVELY, **changes})
  for trial in found:
    folder = trial.folder(tmp_path)
    facts = manifest.read(folder)
    assert facts['ancestry'] == [entry]
    assert (entry['workdir'], entry['step'], facts['seed']) == (str(source), 3, 1)
    state = state_of(folder, trial.config)[1]
    wanted, params = tiny.leaves(expected.params), tiny.leaves(state.params)
    assert wanted.keys() == params.keys()
    for name, value in params.items():
      np.testing.assert_allclose(value, wanted[name], rtol=0, atol=1e-25, err_msg=name)
    log = (tmp_path / 'logs' / f'{trial.id}.txt').read_text()
    assert f'starting from step 3 of {source}: params, router_state' in log
  records = collect.records_of(study, tmp_path)
  assert [record.status for record in records] == ['finished'] * 2
  assert {record.config['train']['init_from'] for record in records} == {given}
  assert len({record.trial for record in records}) == 2


def test_a_run_with_a_number_that_is_out_of_bounds_now_says_how_to_go_on(source, text, tmp_path):
  """Of a field that adamw does not read, so it may be anything: as an earlier version let it."""
  field, value = 'optim.adam_learning_rate', 1e-46
  workdir = tmp_path / 'old'
  shutil.copytree(source, workdir)
  for path in (workdir / 'manifest.json', *workdir.glob('checkpoints/*/config/metadata')):
    content = json.loads(path.read_text())
    (content['config'] if 'status' in content else content)['optim']['adam_learning_rate'] = value
    path.write_text(json.dumps(content))
  path, before = tiny.config_file(tmp_path, {**text, **LIVELY}), tiny.snapshot(workdir)
  in_file = tmp_path / 'in_file.py'
  in_file.write_text(
    path.read_text().replace("'adam_learning_rate': 0.0", f'{"adam_learning_rate"!r}: {value}')
  )
  allowed = f'{field}={value}: must be a finite number >= 0, in float32'
  for flags in ([f'--config={path}', f'--config.{field}={value}'], [f'--config={in_file}']):
    result = tiny.command('train', *flags, f'--workdir={workdir}')
    words = f'start a new run with another {field} and', f'init_from={workdir}'
    result.assert_error(allowed, *words)
    # Of no run here that has it.
    for other in (tmp_path / 'new', source):
      result = tiny.command('train', *flags, f'--workdir={other}')
      result.assert_error(allowed)
      assert 'init_from' not in result.err
  # It does what it says.
  assert tiny.snapshot(workdir) == before
  assert moe_jax.load_run(workdir).step == 6
  state, entry = started(workdir, {**text, **OTHER})
  assert entry['step'] == 6
  tiny.assert_equal(state.params, state_of(source, tiny.config({**text, **LIVELY}))[1].params)


def test_trials_are_named_as_before_and_by_their_source(text):
  config = tiny.config({**text, **LIVELY})
  fields = {
    f'{section}.{name}': value
    for section, names in config.to_dict().items()
    for name, value in names.items()
    if f'{section}.{name}' not in FREE_FIELDS and not name.startswith('init_')
  }
  digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
  assert trials.trial_id(config) == digest[:12]
  config.train.init_from = 'runs/a@3'
  assert trials.trial_id(config) != digest[:12]
  # A manifest from before these fields came.
  old = tiny.config({**text, **LIVELY}).to_dict()
  for name in ('init_from', 'init_optimizer', 'init_router_state'):
    del old['train'][name]
  facts = {'config': old, 'status': 'running'}
  same_run.check_same_config('DIR', facts, tiny.config({**text, **LIVELY}))
  assert same_run.first_difference(old, tiny.config({**text, **LIVELY}).to_dict()) is None
  assert same_run.first_difference(old, config.to_dict()) == 'train.init_from'
