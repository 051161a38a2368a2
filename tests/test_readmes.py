"""Every README: its size, its links, and each of its examples, run in small.

Of benchmarks, flags alone are read.
"""

import contextlib
import importlib
import io
import pathlib
import re
import shlex
import subprocess
from unittest import mock

import pytest

from tests import tiny

READMES = sorted(
  path.relative_to(tiny.REPOSITORY)
  for path in tiny.REPOSITORY.rglob('README.md')
  if not {'.venv', 'runs', '.hypothesis'} & set(path.relative_to(tiny.REPOSITORY).parts)
)
_BLOCK = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'\]\(([^)]+)\)')

# Scripts that have tests of their own, and what those are.
_SCRIPTS = {
  './launch/quickstart': 'tests/launch/test_quickstart.py',
  './launch/test': 'tests/launch/test_test.py',
  './launch/local': 'tests/launch/test_local.py',
  './launch/accelerator': 'tests/launch/test_accelerator.py',
}


def blocks(path):
  """Returns (language, text) of each fenced block of a README."""
  return _BLOCK.findall((tiny.REPOSITORY / path).read_text(encoding='utf-8'))


def commands(path):
  """Returns the command lines of a README, continuation lines joined, comments removed."""
  found = []
  for language, text in blocks(path):
    if language in ('', 'sh', 'bash'):
      for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        if words:
          found.append(words)
  return found


def test_the_first_readme_is_short_and_timeless():
  text = (tiny.REPOSITORY / 'README.md').read_text(encoding='utf-8')
  assert text.count('\n') <= 180
  assert len(text.encode()) <= 10 * 1024
  # No date, no commit, no quartiles.
  for pattern in (r'\b20\d\d-\d\d-\d\d\b', r'\b(?=\w*\d)[0-9a-f]{7,40}\b', r'\[\d\.\d+, \d\.\d+\]'):
    assert not re.search(pattern, text), pattern


@pytest.mark.parametrize('path', READMES, ids=str)
def test_links_lead_somewhere(path):
  text = (tiny.REPOSITORY / path).read_text(encoding='utf-8')
  for target in _LINK.findall(text):
    name, _, anchor = target.partition('#')
    if name.startswith(('http://', 'https://')):
      continue
    there = tiny.REPOSITORY / path.parent / name if name else tiny.REPOSITORY / path
    assert there.exists(), f'{path}: {target}'
    if anchor:
      heads = re.findall(r'^#+ (.*)$', there.read_text(encoding='utf-8'), re.MULTILINE)
      anchors = [re.sub(r'[^\w -]', '', head).lower().replace(' ', '-') for head in heads]
      assert anchor in anchors, f'{path}: {target}'


def test_every_folder_has_a_readme():
  names = {str(path.parent) for path in READMES}
  assert names >= {
    *('.', 'moe_jax', 'moe_jax/routing', 'configs', 'launch', 'experiments', 'tests'),
    'experiments/performance',
  }


@pytest.fixture(scope='module')
def place(text, tmp_path_factory):
  """Returns (folder that stands for the checkout's root, path of a tiny config)."""
  folder = tmp_path_factory.mktemp('readmes')
  overrides = {**text, 'train.num_steps': 2, 'train.checkpoint_every': 1}
  tiny.write_text(folder / 'path' / 'to' / 'folder')
  return folder, tiny.config_file(folder, overrides)


def shrunk(study, folder, config):
  """Writes a study with the arms and metric of another on the tiny config; returns its path."""
  path = folder / f'{pathlib.Path(study).parent.name}.py'
  path.write_text(
    'import dataclasses, importlib.util\n\n\ndef load(path):\n'
    '  spec = importlib.util.spec_from_file_location("original", path)\n'
    '  module = importlib.util.module_from_spec(spec)\n  spec.loader.exec_module(module)\n'
    '  return module\n\n\ndef get_study():\n'
    f'  study = load({str(tiny.REPOSITORY / study)!r}).get_study()\n'
    f'  base = load({str(config)!r}).get_config()\n'
    '  base.mesh.update(data=1, expert=1)\n'
    '  return dataclasses.replace(study, base=base, seeds=(0, 1))\n',
    encoding='utf-8',
  )
  return path


def adapted(words, place):
  """Returns the arguments of an example with small shapes, and paths below the test's folder."""
  folder, config = place
  result = []
  for word in words:
    if word.startswith('--config='):
      word = f'--config={config}'
    elif word.startswith('--study='):
      word = f'--study={shrunk(word.partition("=")[2], folder, config)}'
    elif '=text:' in word:
      name, _, path = word.partition('=text:')
      word = f'{name}=text:{folder / path}'
    elif re.match(r'--\w+=runs\b', word):
      name, _, path = word.partition('=')
      word = f'{name}={folder / path}'
    elif word == 'runs' or word.startswith('runs/'):
      word = str(folder / word)
    result.append(word)
  return result


# Those of README.md go first: others take up the run that it trains.
@pytest.mark.parametrize('path', sorted(READMES, key=lambda path: len(path.parts)), ids=str)
def test_every_example_runs(path, place):
  for words in commands(path):
    while '=' in words[0]:  # Variables of the environment.
      words = words[1:]
    if words[0] in _SCRIPTS:
      assert (tiny.REPOSITORY / _SCRIPTS[words[0]]).exists()
    elif words[:2] == ['python', '-m']:
      _run(words[2:], place, of_study=path.parts[:1] == ('experiments',) and len(path.parts) == 3)
    else:
      assert words[0] in ('source', 'export', 'tensorboard'), f'{path}: {shlex.join(words)}'


def _run(words, place, of_study):
  package, _, verb = words[0].partition('.')
  if of_study and verb in ('sweep', 'report'):
    # Hours of training: the trials are checked, and the report is made of what is committed.
    name = next(word for word in words if word.startswith('--study=')).split('/')[-2]
    kept = [word for word in words[1:] if not word.startswith(('--workdir=', '--out='))]
    results = f'--results=experiments/{name}/results.jsonl'
    out = f'--out={place[0] / "reports" / name}'
    if verb == 'sweep':
      arguments = [*kept, '--dry_run']
    else:
      kept = [word for word in kept if not word.startswith('--results=')]
      arguments = [*kept, results, out, '--nofigures']
  else:
    arguments = adapted(words[1:], place)
  if package != 'moe_jax':
    # Modules of the checkout, which write into it: that they can be found is all that is tried.
    assert pathlib.Path(tiny.REPOSITORY, *words[0].split('.')).with_suffix('.py').exists(), words
    return
  if verb == 'benchmark':
    # The suites run in tests/benchmark: here their flags are read alone.
    suite = importlib.import_module(f'moe_jax.benchmark.suites.{words[1]}')
    with mock.patch.object(suite, 'run') as run:
      result = tiny.command(verb, *words[1:])
    assert result.code == 0 and run.called, f'{shlex.join(words)}\n{result.err}'
    return
  result = tiny.command(verb or '__main__', *arguments)
  assert result.code == 0, f'{shlex.join(words)}\n{result.err}'


@pytest.mark.parametrize('path', READMES, ids=str)
def test_python_blocks_run(path, place):
  for language, text in blocks(path):
    if language == 'python':
      folder, config = place
      workdir = folder / 'runs' / 'quickstart'
      if 'runs/quickstart' in text and not workdir.exists():
        assert tiny.command('train', f'--config={config}', f'--workdir={workdir}').code == 0
      code = text.replace('runs/quickstart', str(workdir))
      with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(path), 'exec'), {'__name__': 'example'})


def test_scripts_have_help():
  for script in ('./launch/local', './launch/accelerator'):
    assert (tiny.REPOSITORY / script).exists()
  result = subprocess.run(
    ['./launch/local', '--help'], cwd=tiny.REPOSITORY, capture_output=True, text=True
  )
  assert result.returncode == 0 and '--processes' in result.stdout


def test_the_study_of_the_first_readme_is_the_one_that_was_run():
  file = (tiny.REPOSITORY / 'experiments' / 'first_study' / 'study.py').read_text(encoding='utf-8')
  code = [line for line in file.splitlines() if line and not line.strip().startswith('"""')]
  shown = [text for language, text in blocks('README.md') if 'def get_study' in text]
  assert [[line for line in text.splitlines() if line] for text in shown] == [code]
  readme = (tiny.REPOSITORY / 'README.md').read_text(encoding='utf-8')
  assert f'## A study in {len(code)} lines' in readme
