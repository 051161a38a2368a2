"""`launch/accelerator`: runs whole on small layers; its benchmarks are ones there are."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.benchmark import accelerator, accelerator_check
from moe_jax.benchmark.suites import dispatch, router
from moe_jax.errors import UserError
from moe_jax.layers import moe_layer
from tests import tiny

ETA = {'median': 0.8, 'low': 0.7, 'high': 0.9}


def test_the_check_finds_nothing_on_a_cpu(capsys):
  before = jax.config.jax_default_matmul_precision
  assert accelerator_check.check() < accelerator_check.TOLERANCE
  assert len(capsys.readouterr().out.splitlines()) == 1 + len(accelerator_check.CASES)
  # What it asks of products is for itself, not for what this process does later.
  assert jax.config.jax_default_matmul_precision == before


def test_benchmarks_are_ones_there_are(monkeypatch):
  ran = []
  for suite in (dispatch, router):
    monkeypatch.setattr(suite, 'run', lambda: ran.append(True))
  commands = accelerator.commands(True)
  without = [[word for word in command if word != '--peers'] for command in commands]
  assert without == accelerator.commands(False) != commands
  assert len(commands) == 2 + len(accelerator.SHAPES)
  for module, name, *arguments in commands:
    assert (module, name) == ('-m', 'moe_jax.benchmark')
    result = tiny.command('benchmark', *arguments)
    assert result.code == 0 and not result.out, result.err
  assert len(ran) == len(commands)
  tiny.command('benchmark', *arguments, '--of_no_such_name').assert_error('of_no_such_name')


@pytest.mark.slow
def test_runs_whole_and_goes_on_where_a_benchmark_fails(tmp_path, monkeypatch, capfd):
  layers = accelerator.Layers
  # More selected experts than there are: refused by the benchmark.
  shapes = (layers(128, 16, 16, '4', 2), layers(128, 16, 16, '4', 8), layers(128, 16, 16, '2', 2))
  monkeypatch.setattr(accelerator, 'SHAPES', shapes)
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"of": "an earlier run"}\n', encoding='utf-8')
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  with pytest.raises(SystemExit) as end:
    accelerator.main(['--smaller=2', f'--out={path}'])
  assert str(end.value).startswith('error: failed') and '--num_selected_experts=8' in end.value.code
  out = capfd.readouterr().out
  assert 'relative error' in out and 'the time is up' not in out
  # Two routers in two dtypes; forward and backward of two shapes that can be.
  earlier, *rows = map(json.loads, path.read_text(encoding='utf-8').splitlines())
  assert earlier == {'of': 'an earlier run'}
  routers, layers_rows = rows[:4], rows[4:]
  assert [row['router'] for row in routers] == ['top_k', 'loss_free'] * 2
  assert [(row['num_experts'], row['num_tokens']) for row in layers_rows] == [(4, 64)] * 2 + [
    (2, 64)
  ] * 2
  assert all('--embed_dim=8' in row['command'] for row in rows)
  assert len(out.split('target\n')[1].splitlines()) == 2 * len(layers_rows)


def test_what_the_time_does_not_reach_is_no_failure():
  start = time.monotonic()
  late = accelerator.Child(['-c', 'import time; time.sleep(60)'], start)
  assert not list(late) and late.code == 0 and late.is_late
  assert time.monotonic() - start < 30
  failed = accelerator.Child(['-c', 'print("{}"); raise SystemExit(3)'], start + 60)
  assert list(failed) == ['{}'] and failed.code == 3 and not failed.is_late


def test_a_line_that_was_cut_off_is_left_out():
  child = accelerator.Child(['-c', 'print("{}"); print(\'{"a": \', end="")'], time.monotonic() + 60)
  assert list(child) == ['{}']


def test_children_leave_memory_to_others():
  variable = 'XLA_PYTHON_CLIENT_PREALLOCATE'
  command = ['-c', f'import os; print(os.environ["{variable}"])']
  assert list(accelerator.Child(command, time.monotonic() + 60)) == ['false']


@pytest.mark.parametrize(('line', 'row'), [('{"a": 1}', {'a': 1}), ('loading', None), ('7', None)])
def test_what_other_libraries_print_is_no_row(line, row):
  assert accelerator._row(line) == row


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_script_stops_its_child(number):
  # The child is the check; one that prints its number and sleeps replaces it.
  child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
  program = (
    'from moe_jax.benchmark import accelerator\n'
    f'accelerator.PROGRAM = ("-c", {child!r})\naccelerator.main([])'
  )
  script = subprocess.Popen(
    [sys.executable, '-c', program],
    cwd=tiny.REPOSITORY,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  child = int(script.stdout.readline())
  script.send_signal(number)
  _, err = script.communicate(timeout=30)
  assert script.returncode == 128 + number and 'Traceback' not in err
  with pytest.raises(ProcessLookupError):
    os.kill(child, 0)


@pytest.mark.parametrize('error', [float('nan'), 1e-3])
def test_a_wrong_accelerator_is_refused(error, monkeypatch):
  monkeypatch.setattr(accelerator_check, 'check', lambda: error)
  with pytest.raises(SystemExit, match='differs from the CPU'):
    accelerator_check.main(on_cpu=True, peers=False)


def test_nan_in_a_gradient_alone_is_seen(monkeypatch):
  run = moe_layer.dispatch_lib.run_plan

  def broken(name, *rest, **named):
    outputs = run(name, *rest, **named)
    # The root of zeros is zero, its gradient 0 * infinity.
    return outputs if name == 'einsum' else outputs + jnp.sqrt(0 * outputs)

  monkeypatch.setattr(moe_layer.dispatch_lib, 'run_plan', broken)
  monkeypatch.setattr(accelerator_check, 'CASES', (('gather', 1.0),))
  assert np.isnan(accelerator_check.check())


def test_peers_that_are_not_there_are_missed_at_once(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match='torch'):
    accelerator_check.main(on_cpu=True, peers=True)


@pytest.fixture
def stand_ins(monkeypatch):
  """Sets programs of Python for the check and the benchmarks; signals stay those of pytest."""

  def stand_in(check, *programs):
    monkeypatch.setattr(accelerator, 'PROGRAM', ('-c', check))
    commands = [['-c', program, 'dispatch'] for program in programs]
    monkeypatch.setattr(accelerator, 'commands', lambda *_: commands)
    monkeypatch.setattr(accelerator, '_text', lambda *_: 'text')
    monkeypatch.setattr(accelerator, 'verdicts', lambda rows: [f'{len(rows)} verdicts'])
    monkeypatch.setattr(signal, 'signal', lambda *_: None)

  return stand_in


SLEEP = 'import time; time.sleep(60)'
A_ROW = 'print(\'{"arms": {}}\', flush=True)'


@pytest.mark.parametrize('code', [1, 2])
def test_nothing_is_timed_where_the_check_fails(code, stand_ins, capsys):
  stand_ins(f'raise SystemExit({code})', A_ROW)
  with pytest.raises(SystemExit) as end:
    accelerator.main([])
  assert end.value.code == code and 'verdicts' not in capsys.readouterr().out


@pytest.mark.parametrize(
  ('programs', 'text'),
  [((SLEEP,), 'before the check was'), (('0', SLEEP, A_ROW), 'before a layer was measured')],
)
def test_time_that_is_over_before_anything_is_an_error(programs, text, stand_ins):
  stand_ins(*programs)
  with pytest.raises(SystemExit, match=text):
    accelerator.main(['--minutes=0.1'])


def test_time_that_ends_a_benchmark_is_said(stand_ins, capsys):
  stand_ins('0', A_ROW, f'{A_ROW}; {SLEEP}', A_ROW)
  accelerator.main(['--minutes=0.1'])
  *_, up, verdicts = capsys.readouterr().out.splitlines()
  assert up.startswith('the time is up') and verdicts == '2 verdicts'


def test_a_full_disk_costs_the_file_alone(stand_ins, capsys):
  stand_ins('0', A_ROW, A_ROW)
  with pytest.raises(SystemExit, match='--out=/dev/full: No space left'):
    accelerator.main(['--out=/dev/full'])
  assert capsys.readouterr().out.splitlines()[-1] == '2 verdicts'


def test_verdicts_name_target_peer_and_what_is_void():
  command = ['-m', 'moe_jax.benchmark', 'dispatch', '--embed_dim=32', '--mlp_dim=16']

  def row(tokens, which, **more):
    arms = {'gather': {'eta_bmm': ETA}}
    facts = {'num_experts': 4, 'tokens_per_expert': tokens, 'pass': which, 'arms': arms}
    return (
      facts | {'not_measured': {'dropless': 'out of memory'}, 'peers': None, 'void': False} | more
    )

  peers = {'ours': {'gather': ETA}, 'void': False}
  rows = [
    row(512, 'forward'),
    row(512, 'forward+backward', peers=peers),
    row(511, 'forward', peers={**peers, 'void': True}),
    {'router': 'top_k'},
    row(512, 'forward', void=True),
  ]
  head, *lines = accelerator.verdicts([(command, row) for row in rows])
  assert head.split()[:3] == ['D', 'F', 'E'] and len(lines) == 8
  assert all(line.endswith('not measured: out of memory') for line in lines[1::2])
  # Asked: 0.85 forward, 0.75 with backward, of experts with 512 tokens or more.
  assert lines[0].split()[:5] == ['32', '16', '4', '512', 'forward']
  assert lines[0].endswith('0.800 [0.70, 0.90]   0.85 missed')
  assert lines[2].endswith('0.75 reached, grouped_mm/arm 0.800 [0.70, 0.90] not ahead')
  assert lines[4].endswith(
    'none below 512 tokens, grouped_mm/arm 0.800 [0.70, 0.90] not ahead, INVALID'
  )
  assert lines[6].endswith('missed, INVALID')


@pytest.mark.parametrize(
  'word',
  [
    '--minutes=0',
    '--minutes=inf',
    '--minutes=nan',
    '--smaller=0',
    '--out=/',
    '--out=',
    '--out=/no/x',
    '--pears',
  ],
)
def test_bad_flags_are_refused(word, capsys):
  with pytest.raises(SystemExit) as end:
    accelerator.main([word])
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and word.partition('=')[0] in line


@pytest.mark.slow
def test_without_an_accelerator_it_says_so():
  done = subprocess.run(
    [sys.executable, *accelerator.PROGRAM],
    cwd=tiny.REPOSITORY,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.splitlines()[-1].startswith("error: devices='cpu': ")


@pytest.fixture
def checkout(tmp_path):
  """A checkout whose .venv notes what it is called with."""
  package = 'moe_jax/__init__.py', 'moe_jax/benchmark/__init__.py'
  program = 'moe_jax/benchmark/accelerator.py'
  for name in ('launch/accelerator', 'launch/environment.sh', 'setup.cfg', *package, program):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(tiny.REPOSITORY / name, tmp_path / name)
  for name, content in (
    ('.venv/bin/python', f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n'),
    ('tools/nvidia-smi', 'exit 1\n'),
  ):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o755)
  return tmp_path


def launch(checkout, *words):
  """Returns (exit code, what it printed, calls of the Python in .venv) of the launcher."""
  tools = f'{checkout}/tools:{os.environ["PATH"]}'
  done = subprocess.run(
    [checkout / 'launch' / 'accelerator', *words],
    env={**os.environ, 'PATH': tools, 'TPU_NAME': '', 'PYTHON': sys.executable},
    cwd=checkout / 'tools',
    capture_output=True,
    text=True,
    check=False,
  )
  calls = checkout / 'calls'
  lines = calls.read_text().splitlines() if calls.exists() else []
  return done.returncode, done.stdout + done.stderr, lines


def test_out_is_where_the_launcher_was_called(checkout):
  assert launch(checkout, '--out=rows.jsonl')[0] == 0
  assert (checkout / 'tools' / 'rows.jsonl').exists()


@pytest.mark.parametrize('peers', [[], ['--peers']])
def test_the_launcher_installs_what_the_peers_need(peers, checkout):
  code, printed, (_, install, run) = launch(checkout, *peers, '--minutes=1')
  assert code == 0, printed
  assert install.endswith('.[peers]' if peers else '--editable .')
  assert run == ' '.join(['-P -m moe_jax.benchmark.accelerator', *peers, '--minutes=1'])


@pytest.mark.parametrize(
  ('word', 'code', 'text'),
  [('--help', 0, '--minutes'), ('-h', 0, '--minutes'), ('--minutes=0', 2, 'error: --minutes=0')],
)
def test_the_launcher_installs_nothing_for_help_or_wrong_flags(word, code, text, checkout):
  found, printed, calls = launch(checkout, word)
  assert (found, calls) == (code, []) and text in printed
