"""Errors in the words of a command, before anything slow is imported."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from moe_jax import __main__ as front
from moe_jax import arguments, router_options
from moe_jax.errors import UserError, did_you_mean
from tests import tiny

# Of a process of its own: the help of every command, and errors in its words; prints what each
# left in sys.modules of the libraries that take seconds.
_SCRIPT = """
import contextlib, io, json, runpy, sys, warnings
import absl.app  # Defines flags, which must outlive the first command.
from absl.testing import flagsaver
warnings.simplefilter('ignore')  # of modules that runpy finds imported
SLOW = {'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow_datasets', 'matplotlib', 'pandas'}
seen = []
for module, *words in json.loads(sys.argv[1]):
  sys.argv = [module, *words]
  out, err, code = io.StringIO(), io.StringIO(), 0
  with flagsaver.flagsaver(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      runpy.run_module(module, run_name='__main__')
    except SystemExit as end:
      code = end.code or 0
  seen.append([module, words, code, out.getvalue(), err.getvalue(), sorted(SLOW & {*sys.modules})])
print(json.dumps(seen))
"""
_OF_LAYERS = 'dtype embed_dim mlp_dim num_experts num_selected_experts seed'
_OF_TOKENS = f'{_OF_LAYERS} capacity_factor num_tokens'
# The suites of `benchmark`, and the flags of each next to --json and --rounds; scripts use them.
_SUITES = {
  'decode': f'{_OF_LAYERS} activation batches num_layers profile',
  'dispatch': f'{_OF_TOKENS} activation arms data_dir peers reuse_memory routings workdir '
  'tokens_per_expert',
  'ep': f'{_OF_TOKENS} activation meshes',
  'layer': f'{_OF_TOKENS} activation dispatch num_groups profile reuse_memory tokens_per_expert',
  'router': f'{_OF_TOKENS} router_dtype routers',
  'step': 'config profile steps',
  'sweep': 'config num_trials seed',
}
# Words of `benchmark` that are refused, and parts of the error; the flags of a suite are its own.
_REFUSED = {
  'lyer': 'did you mean layer?',
  'layer --meshes=1x8': "--meshes='1x8': unknown flag",
  'layer --config=configs/debug.py': '--config=',
  'step --num_experts=8': "--num_experts='8': unknown flag",
  'decode --capacity_factor=2': '--capacity_factor=',
  'router --activation=gelu': '--activation=',
  'dispatch --profile=traces': '--profile=',
  'layer --num_tokens=0': "--num_tokens='0'",
  'layer --embed_dim=0': '--embed_dim=',
  'layer --mlp_dim=-1': '--mlp_dim=',
  'layer --num_selected_experts=0': '--num_selected_experts=',
  'layer --num_experts=4 --num_selected_experts=8': '--num_experts=[4]: must be numbers >= 8',
  'layer --num_experts=4,04': "--num_experts='4,04': names 4 more than once",
  'layer --num_groups=0': '--num_groups=',
  'layer --num_tokens=64 --tokens_per_expert=16': '--num_tokens=64: is given by --tokens_per_ex',
  'layer --rounds=8': '--rounds=',
  'router --capacity_factor=0': '--capacity_factor=',
  'router --capacity_factor=nan': "--capacity_factor='nan': must be above 0 and finite",
  'router --capacity_factor=inf': '--capacity_factor=',
  'router --routers=topk': "--routers='topk': must be of base, ",
  'dispatch --routings=luck': '--routings=',
  'dispatch --routings=': "--routings='': must be of round_robin, ",
  'dispatch --arms=gahter': 'did you mean gather?',
  'dispatch --arms=gather,copy,gather': 'names gather more than once',
  'dispatch --tokens_per_expert=-1': '--tokens_per_expert=',
  'dispatch --routings=trace': '--workdir: must be given',
  'dispatch --routings=uniform --workdir=run': "--workdir='run': only read with --routings=trace",
  'dispatch --routings=uniform --data_dir=data': '--routings=trace',
  'decode --batches=0': "--batches='0': must be numbers >= 1",
  'decode --batches=': '--batches=',
  'decode --num_layers=-1': '--num_layers=',
  'ep --meshes=2by4': "--meshes='2by4': must be of the form DATAxEXPERT",
  'sweep --num_trials=1': '--num_trials=',
  'sweep': '--config: must be given',
}
_WITH_CONFIG = ('train', 'benchmark step', 'benchmark sweep')


def _module(command):
  return {'train': 'moe_jax.train.__main__', 'sweep': 'moe_jax.sweep.__main__'}.get(
    command, 'moe_jax.benchmark.__main__' if command == 'benchmark' else f'moe_jax.{command}'
  )


def _calls(words):
  """Every command with these words."""
  names = [name for name in front.commands() if name != 'benchmark']
  calls = [[_module(name), *words] for name in names]
  return calls + [[_module('benchmark'), name, *words] for name in _SUITES]


@pytest.fixture(scope='module')
def seen():
  """[module, words, exit code, stdout, stderr, slow libraries imported so far] of each call."""
  debug = '--config=configs/debug.py'
  train = _module('train')
  calls = [
    ['moe_jax.__main__'],
    ['moe_jax.__main__', 'trian'],
    *_calls(['--help']),
    *_calls(['--no_such_flag=1']),
    [_module('config')],
    [_module('benchmark')],
    [_module('benchmark'), '--help'],
    *([_module('benchmark'), *words.split()] for words in _REFUSED),
    [train, '--workdir=x'],
    [train, '--workdir=x', '--config=configs/quikstart.py'],
    [train, '--workdir=x', debug, '--config.moe.num_expert=4'],
    [train, '--workdir=x', debug, '--config.moe.router=topk'],
    [train, '--workdir=x', debug, '--config.optim.learning_rate=fast'],
    [_module('evaluate'), '--workdir=x', '--split=tset'],
    [_module('generate'), '--workdir=x', '--prompt=x', '--top_p=7'],
    [_module('sweep'), '--study=no_such_study.py'],
  ]
  done = subprocess.run(
    [sys.executable, '-c', _SCRIPT, json.dumps(calls)],
    cwd=tiny.REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def test_help_and_errors_in_words_import_nothing_slow(seen):
  """JAX alone takes 2 s of CPU; a sum of imports is counted, as a time would depend on the rest."""
  for module, words, code, _, err, slow in seen:
    assert not slow, (module, words, slow)
    right = not words or '--help' in words
    assert (code, err.count('error: ')) == ((0, 0) if right else (2, 1)), (module, words, err)
    assert 'Traceback' not in err


def test_help_shows_flags_and_examples(seen):
  helps = {
    ' '.join([module.removeprefix('moe_jax.').removesuffix('.__main__'), *words[:-1]]): out
    for module, words, _, out, *_ in seen
    if words[-1:] == ['--help'] and words != ['--help'] or words == ['--help']
  }
  top = helps.pop('benchmark')
  assert [line.split()[0] for line in top.partition('Suites:\n')[2].splitlines()] == [*_SUITES]
  assert len(helps) == len(front.commands()) - 1 + len(_SUITES)
  for command, text in helps.items():
    assert f'  python -m moe_jax.{command}' in text, command
    assert ('--config=FILE' in text) == (command in _WITH_CONFIG), command
    # Each flag has a line on what it is.
    lines = text.partition('\nFlags:\n')[2].splitlines()
    for line, after in zip(lines, [*lines[1:], ''], strict=True):
      assert not line.startswith('  --') or after.startswith('      '), (command, line)
  for name, own in _SUITES.items():
    shown = re.findall(r'^  --(?:\[no\])?(\w+)', helps[f'benchmark {name}'], re.MULTILINE)
    assert sorted(shown) == sorted(['json', 'rounds', *own.split()]), name


def test_suites_refuse_what_they_do_not_understand(seen):
  errors = {' '.join(words): err for module, words, _, _, err, _ in seen if 'bench' in module}
  for words, text in _REFUSED.items():
    assert text in errors[words], (words, errors[words])


def test_the_front_door_lists_every_command(seen):
  out = seen[0][3]
  for name, what in front.commands().items():
    assert what and f'  {name:<11}{what}\n' in out + '\n'
  package = pathlib.Path(front.__file__).parent
  runnable = {
    path.parent.name if path.stem == '__main__' else path.stem
    for path in (*package.glob('*.py'), *package.glob('*/__main__.py'))
    if path.parent.name + path.stem != 'moe_jax__main__' and 'cli.run(' in path.read_text()
  }
  assert runnable - {'cli'} == set(front.commands())
  assert 'did you mean python -m moe_jax.train?' in seen[1][4]


def _flags():
  """Returns the flags of absl for a command with a config."""
  values = flags.FlagValues()
  flags.DEFINE_string('config', None, 'A file.', flag_values=values)
  flags.DEFINE_integer('num_steps', 1, 'A number.', flag_values=values)
  flags.DEFINE_bool('figure', True, 'A choice.', flag_values=values)
  flags.DEFINE_enum('split', 'test', ['train', 'valid', 'test'], 'A name.', flag_values=values)
  flags.DEFINE_multi_string('prompt', [], 'Texts.', flag_values=values)
  flags.DEFINE(arguments.PathParser(), 'workdir', None, 'A path.', flag_values=values)
  return {name: values[name] for name in values}


def test_words_become_name_and_value_with_the_config_first():
  words = ['--num_steps', '3', '-nofigure', '--config.model.remat', '--config.moe.every', '2']
  words += ['--prompt=--a=b', '--prompt', '--c', '--config', 'configs/debug.py:x=y']
  assert arguments.checked(words, _flags()) == [
    '--config=configs/debug.py:x=y',
    '--config.model.remat=true',
    '--config.moe.every=2',
    '--num_steps=3',
    '--figure=false',
    '--prompt=--a=b',
    '--prompt=--c',
  ]
  assert arguments.checked(['--config=configs/debug.py', '--noconfig.model.remat'], _flags())[
    1:
  ] == ['--config.model.remat=false']


DEBUG = '--config=configs/debug.py'


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['more'], "argument='more': not understood"),
    (['--'], "argument='--': not understood"),
    (['--speed=9'], "--speed='9': unknown flag; --help lists the flags"),
    (['--workdri=x'], "--workdri='x': unknown flag; did you mean --workdir?"),
    (['--nofigrue'], '--nofigrue: unknown flag'),
    (['--num_steps'], '--num_steps: must have a value'),
    (['--num_steps=x'], "--num_steps='x': must be an integer"),
    (['--figure=perhaps'], "--figure='perhaps': must be true or false"),
    (['--split=tset'], "--split='tset': must be one of train, valid, test; did you mean test?"),
    (['--num_steps=1', '--num_steps=2'], "--num_steps='2': given twice, first as '1'"),
    ([DEBUG, DEBUG], "--config='configs/debug.py': given twice"),
    (
      [DEBUG, '--config.moe.every=1', '--config.moe.every=2'],
      "moe.every='2': given twice, first as '1'",
    ),
    # The second value is the bad one, and the error names it.
    ([DEBUG, '--config.moe.every=1', '--config.moe.every=0'], 'moe.every=0: must be an integer'),
    (['--config.moe.every=1'], '--config: must be given, for --config.moe.every=1 overrides'),
    ([DEBUG, '--config.moe.num_expert=1'], 'did you mean moe.num_experts'),
    ([DEBUG, '--config.num_steps=1'], 'did you mean train.num_steps?'),
    ([DEBUG, '--config.mlp_dim=1'], 'did you mean model.mlp_dim or moe.mlp_dim?'),
    ([DEBUG, '--config.trian.num_steps=1'], 'did you mean train.num_steps?'),
    ([DEBUG, '--config.mesh.frobnicate=1'], 'must be one of data, expert, model'),
    ([DEBUG, '--config.train.batch_size=1'], 'did you mean data.batch_size?'),
    ([DEBUG, '--config.trian=1'], 'did you mean train?'),
    ([DEBUG, '--config.moe.every'], 'moe.every: must have a value'),
    ([DEBUG, '--config.moe.router=swich'], "moe.router='swich': must be one of base, dense"),
    ([DEBUG, '--config.optim.name=adam'], '; did you mean adamw?'),
    (['--workdir=~nobody_here/x'], "--workdir='~nobody_here/x': no such home folder"),
    (['--config=configs/qickstart.py'], 'does not exist; did you mean configs/quickstart.py?'),
    (['--config=configs'], "--config='configs': is no file"),
    (['--flagfile=none'], '--flagfile: Unable to open flagfile'),
  ],
)
def test_wrong_words(words, message):
  with pytest.raises(UserError) as caught:
    arguments.checked(words, _flags())
  assert message in str(caught.value)


def test_home_folders_are_expanded(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert arguments.SourceParser().parse('text:~/books') == f'text:{tmp_path}/books'
  assert arguments.PathParser().parse('~/run') == f'{tmp_path}/run'
  assert arguments.PathParser().parse('a/~/run') == 'a/~/run'
  (tmp_path / 'own.py').touch()
  assert arguments.checked(['--config=~/own.py'], _flags()) == [f'--config={tmp_path}/own.py']


@pytest.mark.parametrize('parser', [arguments.PathParser(), arguments.SourceParser()])
def test_paths_are_utf8(parser):
  for path in ('a\udcff', '~/\udcff', 'text:\ud800'):
    with pytest.raises(ValueError, match='must be a path in UTF-8'):
      parser.parse(path)


def test_every_flag_that_is_a_path_expands_it(seen):
  """By its name: a path that a command would take as it is made a folder called `~`."""
  for module, words, _, out, *_ in seen:
    if words[-1:] == ['--help']:
      for name in ('workdir', 'study', 'out', 'results', 'data_dir', 'profile'):
        assert f'--{name}=TEXT' not in out, (module, name)


def test_words_of_a_file_are_words(tmp_path):
  file = tmp_path / 'flags'
  file.write_text(f'{DEBUG}\n--config.moe.every=2\n')
  assert arguments.checked([f'--flagfile={file}', '--num_steps=3'], _flags()) == [
    DEBUG,
    '--config.moe.every=2',
    '--num_steps=3',
  ]


def test_router_names_are_found_without_importing_them():
  assert router_options.router_names() == tuple(
    sorted(p.stem for p in (tiny.REPOSITORY / 'moe_jax/routing/routers').glob('[a-z]*.py'))
  )


def test_did_you_mean_says_nothing_where_nothing_is_near():
  assert did_you_mean('tok_k', ['top_k', 'sinkhorn']) == '; did you mean top_k?'
  assert did_you_mean('frobnicate', ['top_k', 'sinkhorn']) == ''
