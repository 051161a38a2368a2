"""A run: start, stop, crash, resume, finish; equal to the last bit whatever came between."""

import importlib.metadata
import json
import os
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from moe_jax import optim
from moe_jax.data import open_dataset
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import manifest, setup, single
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.metrics_file import read_metrics
from moe_jax.run.timing import PHASES
from moe_jax.train.state import abstract_state
from tests import tiny
from tests.run.conftest import LIVELY

# Orbax leaves event loops to the garbage collector when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

# Differ from run to run: they measure time.
TIMES = ('tokens_per_second', 'data_wait', *(f'seconds_{phase}' for phase in PHASES))


def state_of(workdir, config, mesh=None):
  """Returns (step, state) of the newest checkpoint."""
  mesh = make_mesh(*(mesh or (config.mesh.data, config.mesh.expert)))
  model = build_task(config, mesh, tiny.VOCAB_SIZE, 'eval')
  optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
  checkpoints = Checkpoints(str(workdir), read_only=True)
  step, state, _ = checkpoints.restore(abstract_state(model, optimizer))
  checkpoints.close()
  return step, state


def metrics_of(workdir):
  """Returns the lines of metrics.jsonl without what measures time."""
  records = read_metrics(workdir / 'metrics.jsonl')
  return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_same_run(workdir, other, config):
  tiny.assert_equal(state_of(workdir, config), state_of(other, config))
  assert metrics_of(workdir) == metrics_of(other)


def signal_at(monkeypatch, step, number):
  """Sends a signal to this process while it prepares a step."""
  steps, put_batch = [], single.put_batch

  def put_batch_and_signal(*arguments):
    steps.append(None)
    if len(steps) == step:
      os.kill(os.getpid(), number)
    return put_batch(*arguments)

  monkeypatch.setattr(single, 'put_batch', put_batch_and_signal)


@pytest.fixture(scope='module')
def whole(lively):
  """(config, work directory) of a run of 6 steps that nothing disturbed."""
  return lively


@pytest.fixture
def copy(whole, tmp_path):
  """A copy of that run that may be spoiled: as it was before its last moment, not yet finished."""
  config, workdir = whole
  shutil.copytree(workdir, tmp_path / 'copy')
  facts = manifest.read(tmp_path / 'copy')
  manifest.write(tmp_path / 'copy', {**facts, 'status': 'running'})
  return tmp_path / 'copy'


def test_the_manifest_is_written_where_a_package_is_not_installed(monkeypatch, text):
  version = importlib.metadata.version

  def without(name):
    if name in ('moe_jax', 'tensorflow-datasets'):
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, 'version', without)
  config = tiny.config(text)
  facts = manifest.new_manifest(config, setup.mesh_of(config), 300, {})
  assert facts['moe_jax'] is None
  assert facts['packages']['tensorflow-datasets'] is None
  assert facts['packages']['jax'] == jax.__version__


def test_the_manifest_says_what_was_run(whole, text):
  config, workdir = whole
  facts = json.loads((workdir / 'manifest.json').read_text())
  assert facts['status'] == 'finished'
  assert facts['step'] == 6
  assert facts['config'] == config.to_dict()
  assert facts['compilations'] == 1
  assert len(facts['git_commit']) == 40
  assert facts['git_dirty'] in (True, False)
  assert facts['packages']['jax'] == jax.__version__
  assert {'flax', 'optax', 'orbax-checkpoint', 'grain'} <= set(facts['packages'])
  devices = {'platform': 'cpu', 'kind': 'cpu', 'count': 8, 'processes': 1}
  devices['matmul_precision'] = 'default'
  assert facts['devices'] == devices
  assert facts['mesh'] == {'data': 2, 'expert': 4}
  assert facts['seed'] == 0
  assert facts['causal'] is False
  dataset = setup.dataset_of(config)
  assert facts['data']['fingerprint'] == dataset.fingerprint
  assert facts['data']['domains'] == ['prose', 'verse']


def test_counts_of_the_manifest_are_those_of_the_parameters(whole):
  config, workdir = whole
  facts = manifest.read(workdir)
  params = tiny.leaves(state_of(workdir, config)[1].params)
  experts = sum(p.size for name, p in params.items() if "['moe']['w_" in name)
  total = sum(p.size for p in params.values())
  # Each token passes 2 of the 8 experts.
  assert facts['parameters'] == {'total': total, 'active': total - experts * 6 // 8}
  # Per token and layer: D (H + 2 KV + H) head_dim, router D E, K experts of 3 D F; 2 layers; then
  # the output D V. Scores and mixing: 4 T D in each layer. Times 2 (multiply, add), 3 (backward).
  layer = 16 * (16 + 8 + 8 + 16) + 16 * 8 + 2 * 3 * 16 * 16
  forward = 2 * (2 * layer + 16 * 258) + 2 * 4 * 16 * 16
  assert facts['training_flops_per_token'] == 3 * forward


def test_metrics_have_each_step_once(whole):
  records = metrics_of(whole[1])
  assert [r['step'] for r in records if r['split'] == 'train'] == [1, 2, 3, 4, 5, 6]
  assert [r['step'] for r in records if r['split'] == 'valid'] == [3, 6]
  for record in records:
    assert np.shape(record['router/load']) == (2, 8)
    np.testing.assert_allclose(np.sum(record['router/load'], -1), 1)
  for record in records:
    # Specialisation is measured in evaluations; of tables there is none in metrics.
    assert ('router/expert_token_mi' in record) == (record['split'] == 'valid')
    assert 'router/coactivation_matrix' not in record


def test_a_finished_run_says_so_and_changes_nothing(whole, capsys):
  config, workdir = whole
  before = tiny.snapshot(workdir)
  assert single.train(config, str(workdir)) == (6, True, None)
  assert 'finished at step 6' in capsys.readouterr().out
  assert tiny.snapshot(workdir) == before


@pytest.mark.parametrize(('number', 'at'), [(signal.SIGTERM, 2), (signal.SIGINT, 3)])
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
  whole, tmp_path, monkeypatch, number, at
):
  config, undisturbed = whole
  workdir = tmp_path / 'run'
  with monkeypatch.context() as patch:
    signal_at(patch, at, number)
    assert single.train(config, str(workdir)) == (at, False, number)
  facts = manifest.read(workdir)
  assert (facts['status'], facts['step']) == ('interrupted', at)
  assert state_of(workdir, config)[0] == at
  assert single.train(config, str(workdir)) == (6, True, None)
  assert_same_run(workdir, undisturbed, config)
  assert manifest.read(workdir)['resumed_from'][0]['step'] == at


def test_resuming_on_another_mesh_starts_from_the_same_bits(whole, copy, capsys):
  config, _ = whole
  shutil.rmtree(copy / 'checkpoints' / '6')
  step, expected = state_of(copy, config)
  assert step == 3
  tiny.assert_equal(state_of(copy, config, (8, 1))[1], expected)
  tiny.assert_equal(state_of(copy, config, (1, 1))[1], expected)
  other = config.copy_and_resolve_references()
  other.mesh.update(data=8, expert=1)
  assert single.train(other, str(copy)).finished
  out = capsys.readouterr().out
  assert 'resuming at step 3 on mesh data=8, expert=1, before on data=2, expert=4' in out
  assert manifest.read(copy)['mesh'] == {'data': 8, 'expert': 1}


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  for place in range(len(content) // 3, len(content), max(1, len(content) // 7)):
    content[place] ^= 0xFF
  path.write_bytes(bytes(content))


def delete(path):
  path.unlink()


DAMAGED_FILES = (
  'state/d/*',
  'state/_METADATA',
  'state/manifest.ocdbt',
  'state/ocdbt.process_0/d/*',
  'state/ocdbt.process_0/manifest.ocdbt',
  'data/metadata',
  'digest/metadata',
)


@pytest.mark.parametrize('pattern', DAMAGED_FILES)
@pytest.mark.parametrize('damage', [truncate, flip, delete])
def test_damage_is_found_whatever_file_it_hits(whole, copy, damage, pattern):
  """Each kind of file: the newest checkpoint is passed over, or its state is still right."""
  config, workdir = whole
  files = sorted((copy / 'checkpoints' / '6').glob(pattern))
  assert files, pattern
  for file in files:
    damage(file)
  step, state = state_of(copy, config)
  assert step in (3, 6)
  if step == 6:
    tiny.assert_equal(state, state_of(workdir, config)[1])
  else:
    assert int(state.step) == 3


def test_a_damaged_checkpoint_is_set_aside_and_its_steps_done_again(whole, copy, capsys):
  config, undisturbed = whole
  newest = copy / 'checkpoints' / '6'
  for file in (newest / 'state').rglob('d/*'):
    flip(file)
  damaged = tiny.snapshot(newest)
  assert single.train(config, str(copy)).finished
  out = capsys.readouterr().out
  assert 'warning: damaged checkpoint moved to' in out
  assert 'resuming at step 3' in out
  assert tiny.snapshot(copy / 'damaged_checkpoint_6') == damaged
  assert_same_run(copy, undisturbed, config)


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_repaired(whole, copy, capsys):
  config, undisturbed = whole
  manifest.write(copy, {**manifest.read(copy), 'status': 'finished'})
  for file in (copy / 'checkpoints' / '6').glob('state/**/d/*'):
    flip(file)
  assert single.train(config, str(copy)) == (6, True, None)
  assert 'damaged checkpoint moved to' in capsys.readouterr().out
  assert_same_run(copy, undisturbed, config)
  # Six steps of 0.05 each: the bias has moved, and not alike for all experts.
  bias = np.asarray(state_of(copy, config)[1].router_state['bias'])
  assert bias.shape == (2, 8) and np.ptp(bias, axis=1).min() > 0.05
  # Nothing left to do; nor where the checkpoints were removed to save space.
  before = tiny.snapshot(copy)
  assert single.train(config, str(copy)) == (6, True, None)
  assert tiny.snapshot(copy) == before
  shutil.rmtree(copy / 'checkpoints')
  assert single.train(config, str(copy)) == (6, True, None)
  assert not (copy / 'checkpoints').exists()
  assert 'its checkpoints are gone' in capsys.readouterr().out


def test_an_interrupted_save_leaves_no_half_checkpoint(whole, copy):
  config, undisturbed = whole
  # What a killed save leaves: a folder with a temporary name, and files within it.
  newest = copy / 'checkpoints' / '6'
  newest.rename(copy / 'checkpoints' / '6.orbax-checkpoint-tmp')
  assert state_of(copy, config)[0] == 3
  assert single.train(config, str(copy)).finished
  assert sorted(p.name for p in (copy / 'checkpoints').iterdir()) == ['3', '6']
  assert_same_run(copy, undisturbed, config)


def test_the_wait_for_data_counts_only_while_the_devices_are_idle(monkeypatch):
  class Step:
    def __init__(self, ready):
      self.is_ready = lambda: ready

  model, rows = tiny.trainer().task, tiny.batch(16, 16)
  clock = iter(range(100))
  monkeypatch.setattr(single.time, 'perf_counter', lambda: float(next(clock)))
  for running, seconds in ((None, 1.0), (Step(False), 0.0), (Step(True), 1.0)):
    batch, waited = single.next_batch(iter([rows]), model, running)
    assert waited == seconds
    np.testing.assert_array_equal(batch['inputs'], rows['inputs'])


def damage_line(path, number):
  """Spoils a line of a file, as `sed -i 'Ns/{/[/'` does."""
  lines = path.read_bytes().split(b'\n')
  lines[number - 1] = lines[number - 1].replace(b'{', b'[', 1)
  path.write_bytes(b'\n'.join(lines))


def test_damaged_and_cut_lines_are_said_and_kept_when_a_run_goes_on(whole, copy, capsys):
  config, undisturbed = whole
  shutil.rmtree(copy / 'checkpoints' / '6')
  path = copy / 'metrics.jsonl'
  damage_line(path, 2)
  with open(path, 'ab') as file:
    file.write(b'{"step": 9, "split": "tr\303')
  spoiled = path.read_bytes()
  assert single.train(config, str(copy)).finished
  out = capsys.readouterr().out
  assert f'warning: {path}: line 2 is damaged, left out; the old file is' in out
  assert f'note: {path}: line 9, the last one, was cut off' in out
  assert f'warning: {path} lacks the lines of train 2; they are not written again' in out
  assert (copy / 'damaged_metrics.jsonl').read_bytes() == spoiled
  assert metrics_of(copy) == [r for r in metrics_of(undisturbed) if r['step'] != 2]
  # Each later call says what is lost for good, once.
  before = tiny.snapshot(copy)
  assert single.train(config, str(copy)).finished
  assert capsys.readouterr().out.count('lacks the lines of train 2;') == 1
  assert tiny.snapshot(copy) == before


def test_a_finished_run_says_which_of_its_metrics_are_gone(whole, copy, capsys):
  config, _ = whole
  manifest.write(copy, {**manifest.read(copy), 'status': 'finished'})
  path = copy / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  assert len(lines) == 8
  lost = f'warning: {path} lacks the lines of'
  for content, words in (
    (b''.join(lines[:4]), f'{lost} train 4, train 5, train 6 and 1 more;'),
    (b''.join(lines[4:]), f'{lost} train 1, train 2, train 3 and 1 more;'),
    (b'', f'{lost} train 1, train 2, train 3 and 5 more;'),
    (None, f'warning: {path} is gone: it held the lines of train 1, train 2, train 3 and 5 more;'),
    (b''.join(lines), None),
  ):
    path.unlink(missing_ok=True)
    if content is not None:
      path.write_bytes(content)
    before = tiny.snapshot(copy)
    assert single.train(config, str(copy)) == (6, True, None)
    out = capsys.readouterr().out
    assert 'finished at step 6' in out
    assert (words in out) if words else ('warning' not in out)
    assert tiny.snapshot(copy) == before
  damage_line(path, 3)
  single.train(config, str(copy))
  assert f'warning: {path}: line 3 is damaged' in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_gone_says_so_and_keeps_its_lines(whole, copy, capsys):
  config, undisturbed = whole
  shutil.rmtree(copy / 'checkpoints')
  manifest.write(copy, {**manifest.read(copy), 'status': 'interrupted'})
  old = (copy / 'metrics.jsonl').read_bytes()
  assert single.train(config, str(copy)).finished
  out = capsys.readouterr().out
  assert 'warning: starting at step 0, for want of a checkpoint' in out
  assert 'earlier_metrics.jsonl' in out
  assert (copy / 'earlier_metrics.jsonl').read_bytes() == old
  assert_same_run(copy, undisturbed, config)


def test_a_checkpoint_under_the_number_of_another_step_is_damaged(whole, copy, capsys):
  config, undisturbed = whole
  shutil.rmtree(copy / 'checkpoints' / '6')
  shutil.copytree(copy / 'checkpoints' / '3', copy / 'checkpoints' / '5')
  assert state_of(copy, config)[0] == 3
  assert single.train(config, str(copy)).finished
  out = capsys.readouterr().out
  assert f'damaged checkpoint moved to {copy / "damaged_checkpoint_5"}' in out
  assert 'resuming at step 3' in out
  assert_same_run(copy, undisturbed, config)


def test_a_position_in_the_data_that_is_not_the_saved_one_is_damage(whole, copy, capsys):
  """Another position would train on other batches, and nothing else would tell."""
  config, undisturbed = whole
  shutil.rmtree(copy / 'checkpoints' / '6' / 'data')
  shutil.copytree(copy / 'checkpoints' / '3' / 'data', copy / 'checkpoints' / '6' / 'data')
  assert state_of(copy, config)[0] == 3
  assert single.train(config, str(copy)).finished
  out = capsys.readouterr().out
  assert f'damaged checkpoint moved to {copy / "damaged_checkpoint_6"}' in out
  assert_same_run(copy, undisturbed, config)


def test_a_checkpoint_from_before_the_position_had_a_digest_is_read(whole, copy):
  config, _ = whole
  for path in (copy / 'checkpoints').glob('*/digest/metadata'):
    sums = json.loads(path.read_text())
    path.write_text(json.dumps({'bit_sums': sums['bit_sums']}))
  assert state_of(copy, config)[0] == 6


def test_only_the_newest_checkpoints_stay(text, tmp_path):
  overrides = {'train.checkpoint_every': 1, 'train.keep_checkpoints': 3}
  single.train(tiny.config({**text, **overrides}), str(tmp_path / 'run'))
  kept = sorted(p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir())
  assert kept == ['4', '5', '6']


def test_accumulation_and_every_optimizer_run_through(text, tmp_path):
  for number, optimizer in enumerate(('muon', 'adafactor')):
    overrides = {
      'optim.name': optimizer,
      'data.batch_size': 32,
      'train.accumulation_steps': 2,
      'moe.balance_scope': ('device', 'group')[number],
      'train.accumulation_scope': ('microbatch', 'batch')[number],
    }
    workdir = tmp_path / optimizer
    config = tiny.config({**text, **overrides})
    assert single.train(config, str(workdir)).finished
    assert manifest.read(workdir)['compilations'] == 1


@pytest.mark.slow
def test_kill_9_in_mid_run_changes_nothing(text, tmp_path):
  overrides = {**text, **LIVELY, 'train.num_steps': 150, 'train.eval_every': 50}
  overrides['train.checkpoint_every'] = 5
  path, config = tiny.config_file(tmp_path, overrides), tiny.config(overrides)
  killed, undisturbed = tmp_path / 'killed', tmp_path / 'undisturbed'
  process = tiny.start('train', f'--config={path}', f'--workdir={killed}')
  log = killed / 'metrics.jsonl'
  while process.poll() is None and not (log.exists() and log.read_bytes().count(b'\n') >= 13):
    time.sleep(0.01)
  process.kill()
  assert tiny.finish(process).code == -signal.SIGKILL
  logged = len(read_metrics(log))
  assert 13 <= logged < 150
  assert manifest.read(killed)['status'] == 'running'
  single.train(config, str(undisturbed))
  result = tiny.command('train', f'--config={path}', f'--workdir={killed}')
  assert result.code == 0, result.err
  assert 'resuming at step' in result.out
  steps = [r['step'] for r in read_metrics(log) if r['split'] == 'train']
  assert steps == list(range(1, 151))
  assert_same_run(killed, undisturbed, config)


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_its_checkpoints(text, tmp_path):
  overrides = {'optim.learning_rate': 1e30, 'train.checkpoint_every': 1}
  path = tiny.config_file(tmp_path, {**text, **overrides})
  result = tiny.command('train', f'--config={path}', f'--workdir={tmp_path / "run"}')
  assert result.code == 2
  assert 'error: ' in result.err and 'diverged at step' in result.err
  assert 'optim.learning_rate' in result.err
  assert 'Traceback' not in result.err
  assert manifest.read(tmp_path / 'run')['status'] == 'diverged'
  # The checkpoint of the step before is there; none of the step that diverged.
  assert [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['1']


def test_all_checkpoints_damaged_is_exit_code_3(text, copy, tmp_path):
  for file in (copy / 'checkpoints').glob('*/state/**/d/*'):
    flip(file)
  before = tiny.snapshot(copy)
  path = tiny.config_file(tmp_path, {**text, **LIVELY})
  result = tiny.command('train', f'--config={path}', f'--workdir={copy}')
  result.assert_error('no good checkpoint', 'step 6: a file of it is damaged (', code=3)
  result.assert_error('; step 3: ', 'nothing was changed: put the folder', code=3)
  assert tiny.snapshot(copy) == before
  for verb, more in (('evaluate', ()), ('generate', ('--prompt=x',))):
    tiny.command(verb, f'--workdir={copy}', *more).assert_error('no good checkpoint', code=3)


@pytest.mark.parametrize('limit', [4096, 30_000])  # Hits metrics.jsonl; hits checkpoints alone.
def test_full_disk_is_one_error_line_and_the_run_goes_on_later(
  whole, text, copy, monkeypatch, limit
):
  """A save that runs out of space: the checkpoint before it stays good."""
  config, undisturbed = whole
  shutil.rmtree(copy / 'checkpoints' / '6')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  put_batch, steps = single.put_batch, []

  def fill_up(*arguments):
    steps.append(None)
    if len(steps) == 3:
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    return put_batch(*arguments)

  path = tiny.config_file(copy.parent, {**text, **LIVELY})
  try:
    with monkeypatch.context() as patch:
      patch.setattr(single, 'put_batch', fill_up)
      result = tiny.command('train', f'--config={path}', f'--workdir={copy}')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert result.code == 2, result.err
  assert result.err.count('error: ') == 1 and 'Traceback' not in result.err
  assert single.train(config, str(copy)).finished
  assert_same_run(copy, undisturbed, config)


def test_data_set_is_opened_without_the_network(text):
  """The fixture prepared it: nothing is built again."""
  dataset = open_dataset(
    text['data.name'], data_dir=text['data.data_dir'], valid_fraction=0.2, test_fraction=0.2
  )
  assert dataset.domains == ('prose', 'verse')
