"""The commands as a user meets them: what they print, what they refuse, and what they leave alone.

Each refusal is one `error:` line with the field and its value, exit code 2, and no changed file.
"""

import errno
import json
import re
import resource
import shutil

import numpy as np
import pytest

from configs import presets
from moe_jax.data import ByteTokenizer, token_store
from moe_jax.run import claim, manifest, setup, single
from tests import tiny

# Orbax leaves event loops to the garbage collector when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def path(text, tmp_path_factory):
  """A config file."""
  return tiny.config_file(tmp_path_factory.mktemp('config'), {**text, 'train.num_steps': 3})


@pytest.fixture(scope='module')
def run(path, text, tmp_path_factory):
  """The directory of a finished run, made by the command."""
  workdir = tmp_path_factory.mktemp('run') / 'run'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err
  assert 'parameters' in result.out
  return workdir


@pytest.mark.parametrize(
  ('override', 'words'),
  [
    ('moe.num_expert=4', ('moe.num_expert=', '4', 'num_experts')),
    ('trian.num_steps=4', ('trian.num_steps=', '4')),
    ('moe.num_experts=many', ('moe.num_experts=', 'many', 'int')),
    ('moe.num_experts=2.5', ('moe.num_experts=', '2.5', 'int')),
    ('model.remat=perhaps', ('model.remat=', 'perhaps', 'bool')),
    ('optim.learning_rate=fast', ('optim.learning_rate=', 'fast', 'float')),
    ('moe.num_selected_experts=9', ('moe.num_selected_experts=9', '8 experts')),
    ('moe.capacity_factor=0', ('moe.capacity_factor=0.0', '> 0')),
    ('moe.capacity_factor=-1.5', ('moe.capacity_factor=-1.5', '> 0')),
    ('moe.capacity_factor=nan', ('moe.capacity_factor=nan', '> 0')),
    ('mesh.expert=3', ('mesh.expert=3', '8 experts')),
    ('data.batch_size=12', ('data.batch_size=12', '8 devices')),
    ('moe.group_size=3', ('data.batch_size=16', 'moe.group_size')),
    ('mesh.expert=8', ('mesh.expert=8', '16 devices', 'found 8')),
    ('mesh.data=4', ('mesh.data=4', '16 devices', 'found 8')),
    ('moe.priority=first', ("moe.priority='first'", 'token')),
    ('moe.num_selected_experts=1', ('moe.renormalize=', 'before_drop')),
    ('moe.exchange=sparse', ("moe.exchange='sparse'", 'padded, ragged')),
    ('moe.exchange=ragged', ("moe.exchange='ragged'", 'must be padded on cpu')),
    ('data.name=tier3', ("data.name='tier3'", 'did you mean tier')),
    ('data.name=text:/nowhere', ("data.name='text:/nowhere'", 'does not exist')),
    ('data.name=tfds:no_such_data_set', ("data.name='tfds:no_such_data_set'",)),
    ('data.data_dir=', ('data.data_dir=', 'must be a path')),
    ('train.num_steps=99999999999', ('train.num_steps=99999999999', '2**31-1')),
    ('moe=5', ('moe=', '5', 'a section')),
    ('data.data_dir=/proc/moe_jax', ('data.data_dir=', '/proc/moe_jax')),
  ],
)
def test_train_refuses(path, tmp_path, override, words):
  workdir = tmp_path / 'run'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}', f'--config.{override}')
  if override == 'data.data_dir=/proc/moe_jax':
    assert 'data_dir' in result.err
  result.assert_error(*words)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (None, ('does not exist',)),
    ({}, ('holds no .txt or .jsonl file',)),
    ({'a.txt': b''}, ('a.txt', 'is empty')),
    ({'a.txt': b' \n'}, ('a.txt', 'is empty')),
    ({'good.txt': b'A good one.', 'bad.txt': b'caf\xe9'}, ('bad.txt', 'not UTF-8', 'byte 3')),
    ({'a.txt': b'x'}, ('a.txt', 'shorter than two tokens')),
    ({'a.jsonl': b'{"text": "x"}\n'}, ('a.jsonl:1', 'shorter than two tokens')),
  ],
)
def test_train_refuses_text(path, tmp_path, content, words):
  folder, data_dir, workdir = tmp_path / 'text', tmp_path / 'data', tmp_path / 'run'
  if content is not None:
    folder.mkdir()
    for name, value in content.items():
      (folder / name).write_bytes(value)
  before = tiny.snapshot(folder) if content is not None else None
  result = tiny.command(
    'train',
    f'--config={path}',
    f'--workdir={workdir}',
    f'--config.data.name=text:{folder}',
    f'--config.data.data_dir={data_dir}',
  )
  result.assert_error(f"data.name='text:{folder}'", *words)
  assert not workdir.exists()
  assert not list(data_dir.glob('tokens/*/*'))
  if before is not None:
    assert tiny.snapshot(folder) == before


@pytest.mark.parametrize(
  ('config', 'words'),
  [
    ('configs/presets/top_k.py:nonsense', ("top_k.py:nonsense': the argument", 'quickstart')),
    ('configs/presets/top_k.py:quikstart', ('did you mean quickstart?',)),
    ('configs/dense_matched.py:lm_smal', ('lm_smal', 'did you mean lm_small?')),
    ('configs/presets/none.py', ('configs/presets/none.py', 'does not exist')),
    ('configs/presets/soft.py', ("moe.router='soft'", 'not in a causal language model')),
  ],
)
def test_presets_that_are_refused(tmp_path, config, words):
  flags = f'--config={config}', f'--workdir={tmp_path / "run"}', '--config.train.num_steps=30'
  tiny.command('train', *flags).assert_error(*words)


def test_the_guide_names_every_model_of_a_preset():
  guide = (tiny.REPOSITORY / 'configs' / 'README.md').read_text()
  row = next(line for line in guide.splitlines() if line.startswith('| `presets/'))
  named = set(re.findall(r'`(\w+)`', row))
  assert named == {name for name in presets._BASES if name}


def test_overrides_may_stand_before_the_config(path, tmp_path):
  workdir = f'--workdir={tmp_path / "run"}'
  result = tiny.command('train', workdir, '--config.moe.num_experts=6', f'--config={path}')
  result.assert_error('mesh.expert=4', '6 experts')


def test_a_home_folder_is_none_called_tilde(path, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path)
  steps = '--config.train.num_steps=1'
  result = tiny.command('train', f'--config={path}', '--workdir=~/run', steps)
  assert result.code == 0, result.err
  assert (tmp_path / 'home' / 'run' / 'manifest.json').exists()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['home']
  given = f'--config={path}', '--workdir=~nobody_here/run'
  tiny.command('train', *given).assert_error('--workdir=', 'no such home folder')


def test_train_refuses_flags(path, tmp_path):
  missing = tmp_path / 'missing.py'
  result = tiny.command('train', f'--config={missing}', f'--workdir={tmp_path / "run"}')
  result.assert_error('--config=', 'missing.py', 'does not exist')
  workdir = f'--workdir={tmp_path / "run"}'
  tiny.command('train', workdir).assert_error('--config: must be given')
  tiny.command('train', f'--config={path}').assert_error('--workdir: must be given')
  fields = '--config.moe.every=1', '--config.moe.every=2'
  tiny.command('train', f'--config={path}', workdir, *fields).assert_error("moe.every='2'", 'twice')
  tiny.command('train', workdir, fields[0]).assert_error('--config: must be given', fields[0])
  tiny.command('train', workdir, '--flagfile=none').assert_error('--flagfile', "'none'")
  tiny.command('train', f'--config={path}', workdir, '--speed=9').assert_error('speed')
  tiny.command('train', f'--config={path}', workdir, 'more').assert_error("argument='more'")
  wrong = tmp_path / 'wrong.py'
  wrong.write_text('x = 1\n')
  tiny.command('train', f'--config={wrong}', workdir).assert_error('get_config')
  wrong.write_text('def get_config():\n  return {}\n')
  tiny.command('train', f'--config={wrong}', workdir).assert_error('wrong.py', 'ConfigDict')
  for content, words in (
    ('x = 1\ny = undefined_name\n', 'line 2: NameError'),
    ('def get_config():\n  return len(1, 2)\n', 'line 2: TypeError'),
    ('def get_config():\n  return [][1]\n', 'line 2: IndexError'),
    ('import nowhere_at_all\n', 'line 1: ModuleNotFoundError'),
    ('def get_config():\n  return {}["a"]\n', "line 2: KeyError: 'a'"),
    ('def get_config():\n  assert not 1, "why"\n', 'line 2: AssertionError: why'),
    ('\nopen("/nowhere/text")\n', 'line 2: FileNotFoundError'),
    ('def get_config():\n  open("/nowhere/text")\n', 'line 2: FileNotFoundError'),
    ('def get_config():\n  open("/")\n', 'line 2: IsADirectoryError'),
    ('raise SystemExit(0)\n', 'line 1: SystemExit: 0'),
    ('def get_config(:\n', 'line 1: SyntaxError'),
    ('def get_config():\n  pass\n', 'get_config() must return a ConfigDict, not NoneType'),
  ):
    wrong.write_text(content)
    for override in ((), ('--config.moe.every=1',)):
      result = tiny.command('train', f'--config={wrong}', workdir, *override)
      result.assert_error(f'--config={str(wrong)!r}: {words}')
  tiny.command('train', f'--config={path}:nonsense', workdir).assert_error('--config')
  tiny.command('train', '--config=configs/debug.py:nonsense', workdir).assert_error('nonsense')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('override', 'words'),
  [
    ('train.seed=1', ('train.seed=1', 'has 0')),
    ('moe.num_experts=4', ('moe.num_experts=4', 'has 8')),
    ('train.num_steps=2', ('train.num_steps=2', '3')),
  ],
)
def test_train_refuses_the_directory_of_another_run(path, run, override, words):
  before = tiny.snapshot(run)
  result = tiny.command('train', f'--config={path}', f'--workdir={run}', f'--config.{override}')
  result.assert_error(*words, str(run))
  assert tiny.snapshot(run) == before


def test_train_refuses_other_text_in_the_same_place(run, text, tmp_path):
  """The name is the same, the text is not."""
  folder = tiny.write_text(tmp_path / 'text')
  own = {'data.name': f'text:{folder}', 'data.data_dir': str(tmp_path / 'data')}
  path = tiny.config_file(tmp_path, {**own, 'train.num_steps': 1})
  workdir = tmp_path / 'run'
  assert tiny.command('train', f'--config={path}', f'--workdir={workdir}').code == 0
  (folder / 'prose' / '0.txt').write_text('Something else.')
  before = tiny.snapshot(workdir)
  for verb, more in (('train', [f'--config={path}']), ('evaluate', [])):
    result = tiny.command(verb, *more, f'--workdir={workdir}')
    result.assert_error(f"data.name='text:{folder}'", str(workdir))
  assert tiny.snapshot(workdir) == before


def test_train_refuses_directories_it_cannot_use(path, tmp_path):
  foreign = tmp_path / 'foreign'
  foreign.mkdir()
  (foreign / 'thesis.txt').write_text('Mine.')
  file = tmp_path / 'file'
  file.write_text('A file.')
  before = tiny.snapshot(tmp_path)
  for workdir, word in (
    (foreign, 'thesis.txt'),
    (file, 'cannot be written'),
    (file / 'below', 'cannot be written'),
    ('/proc/moe_jax', 'cannot be written'),
    (tmp_path / ('x' * 300), 'File name too long'),
  ):
    result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
    result.assert_error('workdir=', str(workdir), word)
  assert tiny.snapshot(tmp_path) == before


def test_train_refuses_a_directory_in_use(path, tmp_path):
  workdir = tmp_path / 'run'
  with claim.claimed(str(workdir)):
    result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  result.assert_error('workdir=', 'another process')


@pytest.mark.parametrize('verb', ['evaluate', 'generate'])
@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--workdir=/nowhere'], ('/nowhere', 'no run')),
    (['--workdir='], ('--workdir', 'must be given')),
    (['--step=2'], ('--step=2', '[3]')),
    (['--step=x'], ('step', 'x')),
    (['--mesh=nonsense'], ("--mesh='nonsense'", 'data=D,expert=E')),
    (['--mesh=data=0,expert=1'], ('--mesh=', 'data=D,expert=E')),
    (['--mesh=data=1,expert=3'], ('--mesh=', '8 experts')),
    (['--mesh=data=2,expert=8'], ('--mesh=', '16 devices')),
    (['--what=1'], ('what',)),
    (['--config.moe.exchange=padded'], ('--config.moe.exchange=', 'no --config')),
  ],
)
def test_evaluate_and_generate_refuse(run, verb, flags, words):
  before = tiny.snapshot(run)
  prompt = ['--prompt=The'] if verb == 'generate' else []
  workdir = [] if flags[0].startswith('--workdir=') else [f'--workdir={run}']
  tiny.command(verb, *workdir, *prompt, *flags).assert_error(*words)
  assert tiny.snapshot(run) == before


def test_evaluate_refuses_splits(run):
  before = tiny.snapshot(run)
  result = tiny.command('evaluate', f'--workdir={run}', '--split=tset')
  result.assert_error("split='tset'", 'train')
  assert tiny.snapshot(run) == before


def test_evaluate_takes_a_mesh_that_the_batch_of_training_does_not_fill(path, tmp_path):
  workdir = tmp_path / 'run'
  fewer = ('--config.data.batch_size=4', '--config.mesh.data=1', '--config.mesh.expert=4')
  assert tiny.command('train', f'--config={path}', f'--workdir={workdir}', *fewer).code == 0
  results = []
  for mesh in ((), ('--mesh=data=8,expert=1',)):
    assert tiny.command('evaluate', f'--workdir={workdir}', '--nofigure', *mesh).code == 0
    results.append(json.loads((workdir / 'evaluation_test.json').read_text())['bits_per_byte'])
  np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ([], ('--prompt: must be given',)),
    (['--prompt=x\udcff'], ('--prompt=', 'not UTF-8')),
    (['--prompt=x', '--num_tokens=0'], ('--num_tokens=0',)),
    (['--prompt=x', '--num_tokens=65537'], ('--num_tokens=65537', '65536')),
    (['--prompt=x', '--temperature=-1'], ('--temperature=-1.0',)),
    (['--prompt=x', '--temperature=nan'], ('--temperature=nan',)),
    (['--prompt=x', '--top_k=-1'], ('--top_k=-1',)),
    (['--prompt=x', '--top_p=0'], ('--top_p=0.0',)),
    (['--prompt=x', '--top_p=1.1'], ('--top_p=1.1',)),
    (['--prompt=x', '--seed=-1'], ('--seed=-1',)),
  ],
)
def test_generate_refuses(run, flags, words):
  tiny.command('generate', f'--workdir={run}', *flags).assert_error(*words)


def test_generate_refuses_a_prompt_outside_the_vocabulary(run, monkeypatch):
  monkeypatch.setattr(ByteTokenizer, 'encode', lambda self, text: np.array([70, 258], np.int32))
  result = tiny.command('generate', f'--workdir={run}', '--prompt=odd')
  result.assert_error("--prompt='odd'", '258', 'outside the vocabulary of 258')


@pytest.mark.parametrize('verb', ['evaluate', 'generate'])
def test_a_tokenizer_of_another_size_is_refused(run, tmp_path, verb):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  facts = manifest.read(workdir)
  manifest.write(workdir, {**facts, 'vocab_size': 300})
  before = tiny.snapshot(workdir)
  prompt = ['--prompt=The'] if verb == 'generate' else []
  result = tiny.command(verb, f'--workdir={workdir}', *prompt)
  result.assert_error('tokenizer.vocab_size=258', '300')
  assert tiny.snapshot(workdir) == before


@pytest.mark.parametrize('content', ['{"config": ', '[]', '"config": []', None])
def test_a_damaged_manifest_is_exit_code_3_until_training_rebuilds_it(path, run, tmp_path, content):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  facts = manifest.read(workdir)
  if content is None:
    del facts['vocab_size']
    content = json.dumps(facts)
  elif content == '"config": []':
    content = json.dumps(facts | {'config': []})
  (workdir / 'manifest.json').write_text(content)
  before = tiny.snapshot(workdir)
  for verb, more in (('evaluate', []), ('generate', ['--prompt=x'])):
    result = tiny.command(verb, f'--workdir={workdir}', *more)
    result.assert_error('manifest.json', 'damaged', 'rebuilds', code=3)
  other = tiny.command('train', f'--config={path}', f'--workdir={workdir}', '--config.moe.every=2')
  other.assert_error('moe.every=2')
  assert tiny.snapshot(workdir) == before
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err
  assert 'going on with the config in checkpoint 3' in result.out
  assert (workdir / 'damaged_manifest.json').read_text() == content
  assert manifest.read(workdir)['status'] == 'finished'
  after = tiny.snapshot(workdir)
  assert {k: v for k, v in after.items() if k.startswith('checkpoints')} == {
    k: v for k, v in before.items() if k.startswith('checkpoints')
  }
  assert tiny.command('generate', f'--workdir={workdir}', '--prompt=x').code == 0


def test_a_run_stopped_before_its_manifest_starts_anew(path, tmp_path):
  workdir = tmp_path / 'run'
  (workdir / 'checkpoints').mkdir(parents=True)
  (workdir / '.lock').touch()
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err


def test_a_missing_or_foreign_manifest_is_rebuilt_by_training(path, run, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  facts = manifest.read(workdir)
  (workdir / 'manifest.json').unlink()
  tiny.command('evaluate', f'--workdir={workdir}').assert_error('no run')
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert (result.code, manifest.read(workdir)['status']) == (0, 'finished'), result.err
  assert 'manifest.json is missing; going on with the config in checkpoint 3' in result.out
  facts['config']['moe']['num_selected_experts'] = 3
  manifest.write(workdir, facts)
  before = tiny.snapshot(workdir)
  for verb, more in (('evaluate', []), ('generate', ['--prompt=x'])):
    result = tiny.command(verb, f'--workdir={workdir}', *more)
    result.assert_error('disagree on moe.num_selected_experts', code=3)
  assert tiny.snapshot(workdir) == before
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err
  assert manifest.read(workdir)['config']['moe']['num_selected_experts'] == 2


def test_another_tokenizer_of_the_same_size_is_refused_and_put_back(run, path, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  facts = manifest.read(workdir)
  own = facts['data']['tokenizer']
  manifest.write(workdir, facts | {'data': facts['data'] | {'tokenizer': 'another'}})
  for verb, more in (('evaluate', []), ('generate', ['--prompt=x'])):
    result = tiny.command(verb, f'--workdir={workdir}', *more)
    result.assert_error('not the tokenizer that the model was trained with', code=3)
  manifest.write(workdir, facts | {'data': facts['data'] | {'tokenizer': own}})
  shutil.rmtree(workdir / 'tokenizer')
  result = tiny.command('generate', f'--workdir={workdir}', '--prompt=x')
  result.assert_error('tokenizer.json cannot be read', 'puts it back', code=3)
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert (result.code, 'finished at step 3' in result.out) == (0, True)
  assert tiny.command('generate', f'--workdir={workdir}', '--prompt=x').code == 0


@pytest.mark.parametrize(
  'error',
  [OSError(errno.ENOSPC, 'No space left on device'), RuntimeError('...: No space left on device')],
)
def test_a_full_disk_below_the_data_is_one_line(path, tmp_path, monkeypatch, error):
  def full(*arguments, **more):
    raise RuntimeError('could not finish') from error

  monkeypatch.setattr(token_store, 'write', full)
  own = [f'--config.data.data_dir={tmp_path / "data"}', f'--workdir={tmp_path / "run"}']
  result = tiny.command('train', f'--config={path}', *own)
  result.assert_error('data.data_dir=', str(tmp_path / 'data'), 'No space left on device')
  assert not (tmp_path / 'run').exists()


def test_a_damaged_manifest_without_a_checkpoint_is_exit_code_3(path, run, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'manifest.json').write_text('')
  before = tiny.snapshot(workdir)
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  result.assert_error('manifest.json', 'damaged', code=3)
  assert tiny.snapshot(workdir) == before


def test_a_text_without_a_document_to_validate_on_is_refused_before_training(path, tmp_path):
  (tmp_path / 'one.txt').write_text('Once upon a time. ' * 50)
  own = [f'--config.data.name=text:{tmp_path / "one.txt"}', '--config.train.eval_every=2']
  own.append(f'--config.data.data_dir={tmp_path / "data"}')
  workdir = tmp_path / 'run'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}', *own)
  result.assert_error('train.eval_every=2', 'one.txt', 'data.valid_fraction')
  assert not workdir.exists()


def test_a_small_text_read_many_times_is_said(path, tmp_path):
  (tmp_path / 'one.txt').write_text('Once upon a time. ' * 2)
  own = [f'--config.data.name=text:{tmp_path / "one.txt"}', '--config.train.num_steps=12']
  own.append(f'--config.data.data_dir={tmp_path / "data"}')
  result = tiny.command('train', f'--config={path}', f'--workdir={tmp_path / "run"}', *own)
  assert result.code == 0, result.err
  assert 'passes over them' in result.out
  assert 'by heart' in result.out


@pytest.mark.parametrize('verb', ['evaluate', 'generate'])
def test_a_damaged_tokenizer_is_exit_code_3(run, tmp_path, verb):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  more = ['--prompt=x'] if verb == 'generate' else []
  file = workdir / 'tokenizer' / 'tokenizer.json'
  file.write_text('{')
  tiny.command(verb, f'--workdir={workdir}', *more).assert_error('tokenizer', code=3)
  file.unlink()
  tiny.command(verb, f'--workdir={workdir}', *more).assert_error('tokenizer', code=3)


def test_evaluate_takes_data_kept_elsewhere_and_a_run_without_metrics(run, text, tmp_path):
  workdir, data_dir = tmp_path / 'copy', tmp_path / 'moved'
  shutil.copytree(run, workdir)
  shutil.copytree(text['data.data_dir'], data_dir)
  (workdir / 'metrics.jsonl').unlink()
  result = tiny.command('evaluate', f'--workdir={workdir}', f'--data_dir={data_dir}', '--nofigure')
  assert result.code == 0, result.err
  assert 'data: ' not in result.err
  tiny.command('evaluate', f'--workdir={workdir}').assert_error('metrics.jsonl', '--nofigure')
  missing = f'--data_dir={tmp_path / "missing"}'
  tiny.command('evaluate', f'--workdir={workdir}', missing).assert_error('--data_dir=', 'missing')


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  shutil.rmtree(workdir / 'checkpoints')
  for verb, more in (('evaluate', []), ('generate', ['--prompt=x'])):
    result = tiny.command(verb, f'--workdir={workdir}', *more)
    result.assert_error('workdir=', 'no checkpoint')
  assert not (workdir / 'checkpoints').exists()


def test_evaluate_prints_and_writes_every_domain(run):
  result = tiny.command('evaluate', f'--workdir={run}', '--split=test')
  assert result.code == 0, result.err
  written = json.loads((run / 'evaluation_test.json').read_text())
  for domain, summary in [*written['domains'].items(), ('all', written)]:
    row = re.search(rf'^{domain} +([\d.]+) +([\d.]+) +([\d.]+) ', result.out, re.MULTILINE)
    shown = [float(number) for number in row.groups()]
    expected = [summary[name] for name in ('bits_per_byte', 'gzip', 'xz')]
    np.testing.assert_allclose(shown, expected, atol=6e-4)
  assert result.out.count('layer 0') == result.out.count('layer 1') == 3
  for layer in range(2):
    row = re.search(rf'^  {layer} +(.*)$', result.out, re.MULTILINE)
    shown = [float(number.strip('()')) for number in row.group(1).split()]
    measures = ('expert_domain_mi', 'expert_token_mi', 'domain_load_overlap', 'coactivation')
    names = [f'{name}{end}' for name in measures for end in ('', '_baseline')]
    names.remove('domain_load_overlap_baseline')
    expected = [written[f'router/{name}'][layer] for name in names]
    np.testing.assert_allclose(shown[: len(names)], expected, atol=6e-4)
  assert (run / 'expert_load.png').read_bytes().startswith(b'\x89PNG')
  again = tiny.command(
    'evaluate', f'--workdir={run}', '--split=test', '--mesh=data=8,expert=1', '--nofigure'
  )
  assert again.code == 0, again.err
  other = json.loads((run / 'evaluation_test.json').read_text())
  np.testing.assert_allclose(other['bits_per_byte'], written['bits_per_byte'], rtol=1e-5)


def test_evaluate_and_generate_print_one_json_document(run):
  result = tiny.command('evaluate', f'--workdir={run}', '--json')
  assert result.code == 0, result.err
  assert json.loads(result.out) == json.loads((run / 'evaluation_test.json').read_text())
  flags = [f'--workdir={run}', '--prompt=The sea', '--prompt=no', '--num_tokens=5', '--seed=3']
  text, document = (tiny.command('generate', *flags, *more) for more in ((), ('--json',)))
  found = json.loads(document.out)
  assert found['step'] == 3
  shown = [f'--- {s["prompt"]!r}\n{s["prompt"]}{s["continuation"]}\n' for s in found['samples']]
  assert text.out == ''.join(shown)
  assert all(0 <= sample['num_tokens'] <= 5 for sample in found['samples'])


def test_evaluate_takes_other_text(run, text, tmp_path):
  """The documents of the test split in a folder of their own: the same numbers, in another file."""
  tiny.command('evaluate', f'--workdir={run}', '--nofigure')
  before = (run / 'evaluation_test.json').read_text()
  expected = json.loads(before)
  dataset = setup.dataset_of(tiny.config(text))
  for domain in dataset.domains:
    (tmp_path / 'new' / domain).mkdir(parents=True)
    for number, document in enumerate(dataset.document_text('test', domain)):
      (tmp_path / 'new' / domain / f'{number}.txt').write_bytes(document)
  source = f'text:{tmp_path / "new"}'
  data_dir = f'--data_dir={text["data.data_dir"]}'
  result = tiny.command('evaluate', f'--workdir={run}', f'--data={source}', data_dir)
  assert result.code == 0, result.err
  assert f'{source}, step 3; bits per byte' in result.out
  assert (run / 'evaluation_test.json').read_text() == before
  (path,) = run.glob('evaluation_text_new_*.json')
  written = json.loads(path.read_text())
  assert (written['data'], written['split']) == (source, 'all')
  for one, other in [(written, expected)] + [
    (written['domains'][domain], expected['domains'][domain]) for domain in dataset.domains
  ]:
    for name in ('loss', 'bits_per_byte', 'bytes', 'tokens'):
      np.testing.assert_allclose(one[name], other[name], rtol=1e-6, err_msg=name)
  figure = path.name.replace('evaluation', 'expert_load').replace('.json', '.png')
  assert (run / figure).exists()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--data=text:/nowhere'], ("--data='text:/nowhere'", 'does not exist')),
    (['--data=tier3'], ("--data='tier3'", 'tier1')),
    (['--data=tier1', '--split=valid'], ("--split='valid'", '--data')),
    (None, ('--data=', 'is what the run was trained on: use --split')),
  ],
)
def test_evaluate_refuses_other_text(run, text, flags, words):
  before = tiny.snapshot(run)
  flags = flags or [f'--data={text["data.name"]}']
  tiny.command('evaluate', f'--workdir={run}', *flags).assert_error(*words)
  assert tiny.snapshot(run) == before


def test_generate_continues_each_prompt(run):
  flags = ['--prompt=The sea', '--prompt=no', '--num_tokens=5', '--seed=3']
  result = tiny.command('generate', f'--workdir={run}', *flags)
  assert result.code == 0, result.err
  assert "--- 'The sea'\nThe sea" in result.out
  assert "--- 'no'\nno" in result.out
  again = tiny.command('generate', f'--workdir={run}', *flags, '--mesh=data=1,expert=1')
  assert again.out == result.out


def test_a_dense_run_is_trained_evaluated_and_sampled(path, tmp_path):
  workdir = tmp_path / 'run'
  dense = ('--config.moe.num_experts=0', '--config.mesh.data=2', '--config.mesh.expert=1')
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}', *dense)
  assert result.code == 0, result.err
  assert tiny.command('evaluate', f'--workdir={workdir}').code == 0
  assert tiny.command('generate', f'--workdir={workdir}', '--prompt=x', '--num_tokens=2').code == 0


def test_fewer_devices_than_the_run_had_is_said(run, monkeypatch):
  monkeypatch.setattr('jax.device_count', lambda: 1)
  result = tiny.command('evaluate', f'--workdir={run}', '--nofigure')
  assert result.code == 0, result.err
  assert 'note: 1 device(s) for a mesh of 2x4' in result.err


def test_a_run_with_a_ragged_exchange_is_looked_at_without(run, tmp_path):
  workdir = shutil.copytree(run, tmp_path / 'run')
  facts = json.loads((workdir / 'manifest.json').read_text())
  facts['config']['moe']['exchange'] = 'ragged'
  (workdir / 'manifest.json').write_text(json.dumps(facts))
  flags = f'--workdir={workdir}', '--prompt=x', '--num_tokens=2'
  result = tiny.command('generate', *flags)
  assert result.code == 0, result.err
  assert result.err.startswith('note: moe.exchange=ragged of the run is not to be had')


def test_a_defect_of_ours_is_not_dressed_up(path, tmp_path, monkeypatch):
  def broken(*arguments, **more):
    raise ZeroDivisionError('ours')

  monkeypatch.setattr(single, 'train', broken)
  with pytest.raises(ZeroDivisionError):
    tiny.command('train', f'--config={path}', f'--workdir={tmp_path / "run"}')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('verb', 'flags', 'words'),
  [
    ('train', ['--config.moe.num_expert=4'], ('moe.num_expert=', '4')),
    ('evaluate', ['--split=tset'], ("split='tset'",)),
    ('generate', ['--prompt=x', '--top_p=7'], ('--top_p=7.0',)),
  ],
)
def test_as_processes(path, run, verb, flags, words):
  """The tests above, within this process, agree with what a shell would see."""
  config = [f'--config={path}'] if verb == 'train' else []
  result = tiny.finish(tiny.start(verb, *config, f'--workdir={run}', *flags))
  result.assert_error(*words)
  assert result.out == ''


@pytest.mark.slow
@pytest.mark.parametrize('pattern', ['state/**/d/*', 'state/**/manifest.ocdbt'])
def test_damage_as_a_process(run, tmp_path, pattern):
  """Threads of TensorStore that end late print no traceback of their own."""
  workdir = tmp_path / 'copy'
  shutil.copytree(run, workdir)
  files = list((workdir / 'checkpoints' / '3').glob(pattern))
  assert files
  for file in files:
    file.write_bytes(file.read_bytes()[:50])
  result = tiny.finish(tiny.start('generate', f'--workdir={workdir}', '--prompt=x'))
  result.assert_error('no good checkpoint', 'step 3', code=3)
  assert 'driver' not in result.err


@pytest.mark.slow
def test_a_full_disk_as_a_process(path, tmp_path):
  """Files of at most 30 kB: enough for everything but a checkpoint."""
  workdir = tmp_path / 'run'
  # Python would leave the bytecode of libraries cut short, and take it for whole from then on.
  files = {'PYTHONDONTWRITEBYTECODE': '1'}
  process = tiny.start('train', f'--config={path}', f'--workdir={workdir}', **files)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
  result = tiny.finish(process)
  assert result.code == 2
  assert 'Traceback' not in result.err
  last = result.err.strip().splitlines()[-1]
  assert last.startswith(f"error: workdir='{workdir}': a checkpoint could not be written (File too")


def test_evaluate_compares_routing_with_an_earlier_checkpoint(path, tmp_path):
  workdir = tmp_path / 'run'
  flags = (f'--workdir={workdir}', '--nofigure')
  more = '--config.train.checkpoint_every=1', '--config.optim.learning_rate=0.5'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}', *more)
  assert result.code == 0, result.err
  for step, words in ((1, ('must be one of [2, 3]',)), (3, ('before step 3',))):
    before = tiny.snapshot(workdir)
    refused = tiny.command('evaluate', *flags, f'--compare_step={step}')
    refused.assert_error(f'--compare_step={step}', *words)
    assert tiny.snapshot(workdir) == before
  result = tiny.command('evaluate', *flags, '--compare_step=2')
  assert result.code == 0, result.err
  assert 'changed since step 2' in result.out
  written = json.loads((workdir / 'evaluation_test.json').read_text())
  assert written['compare_step'] == 2
  for summary in (written, *written['domains'].values()):
    assert all(0 < share < 1 for share in summary['router/churn'])
  tiny.command('evaluate', *flags, '--compare_router_dtype=float32').assert_error(
    '--compare_router_dtype', 'the other one'
  )
  result = tiny.command('evaluate', *flags, '--compare_router_dtype=bfloat16')
  assert result.code == 0, result.err
  assert 'assignments that differ with routers in bfloat16' in result.out
  written = json.loads((workdir / 'evaluation_test.json').read_text())
  assert written['compare_router_dtype'] == 'bfloat16'
  for summary in (written, *written['domains'].values()):
    assert all(0 <= share < 0.5 for share in summary['router/dtype_disagreement'])
