"""`launch/accelerator.py`: runs whole on small layers; its benchmarks are ones there are."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import time

import pytest

from tests import tiny

PATH = tiny.REPOSITORY / 'launch' / 'accelerator.py'
SCRIPT = runpy.run_path(str(PATH))
ETA = {'median': 0.8, 'low': 0.7, 'high': 0.9}


def test_the_check_finds_nothing_on_a_cpu(capsys):
  assert SCRIPT['check']() < SCRIPT['TOLERANCE']
  assert len(capsys.readouterr().out.splitlines()) == 1 + len(SCRIPT['CASES'])


@pytest.mark.slow
def test_benchmarks_are_ones_there_are():
  commands = SCRIPT['commands'](True)
  without = [[word for word in command if word != '--peers'] for command in commands]
  assert without == SCRIPT['commands'](False) != commands
  assert len(commands) == 2 + len(SCRIPT['SHAPES'])
  started = []
  for module, name, *arguments in commands:
    assert (module, name) == ('-m', 'moe_jax.benchmark')
    # A process each: within one, absl looks at this flag of its own once only.
    started.append(tiny.start('benchmark', *arguments, '--only_check_args'))
  wrong = tiny.start('benchmark', *arguments, '--of_no_such_name', '--only_check_args')
  for process in started:
    result = tiny.finish(process)
    assert result.code == 0 and not result.out, result.err
  tiny.finish(wrong).assert_error('of_no_such_name')


@pytest.mark.slow
def test_runs_whole_and_goes_on_where_a_benchmark_fails(tmp_path, monkeypatch, capfd):
  layers = SCRIPT['Layers']
  # More selected experts than there are: refused by the benchmark.
  shapes = (layers(128, 16, 16, '4', 2), layers(128, 16, 16, '4', 8), layers(128, 16, 16, '2', 2))
  monkeypatch.setitem(SCRIPT['main'].__globals__, 'SHAPES', shapes)
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"of": "an earlier run"}\n', encoding='utf-8')
  with pytest.raises(SystemExit) as end:
    SCRIPT['main'](['--smaller=2', f'--out={path}'])
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
  failed = []
  command = ['-c', 'import time; print("{}"); time.sleep(60)']
  start = time.monotonic()
  assert list(SCRIPT['_rows'](command, start, failed)) in ([], [{}]) and not failed
  assert time.monotonic() - start < 30
  assert list(SCRIPT['_rows'](['-c', 'print("{}"); raise SystemExit(1)'], start + 60, failed))
  assert len(failed) == 1


def test_a_row_that_was_cut_off_is_left_out():
  command = ['-c', 'print("{}"); print(\'{"a": \', end="")']
  assert list(SCRIPT['_rows'](command, time.monotonic() + 60, [])) == [{}]


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
  head, *lines = SCRIPT['verdicts']([(command, row) for row in rows])
  assert head.split()[:3] == ['D', 'F', 'E'] and len(lines) == 8
  assert all(line.endswith('not measured: out of memory') for line in lines[1::2])
  # Asked: 0.85 forward, 0.75 with backward, of experts with 512 tokens or more.
  assert lines[0].split()[:5] == ['32', '16', '4', '512', 'forward']
  assert lines[0].endswith('0.80 [0.70, 0.90]   0.85 missed')
  assert lines[2].endswith('0.75 reached, grouped_mm/arm 0.80 [0.70, 0.90]')
  assert lines[4].endswith('none below 512 tokens, grouped_mm/arm 0.80 [0.70, 0.90], VOID')
  assert lines[6].endswith('missed, VOID')


@pytest.mark.parametrize(
  'word', ['--minutes=0', '--minutes=inf', '--smaller=0', '--out=/', '--pears']
)
def test_bad_flags_are_refused(word, capsys):
  with pytest.raises(SystemExit) as end:
    SCRIPT['main']([word])
  assert end.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and word.partition('=')[0] in line


@pytest.mark.slow
def test_without_an_accelerator_it_says_so():
  done = subprocess.run(
    [sys.executable, PATH], capture_output=True, text=True, check=False, timeout=120
  )
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.splitlines()[-1].startswith("error: devices='cpu': ")


@pytest.mark.parametrize('peers', [[], ['--peers']])
def test_the_launcher_installs_what_the_peers_need(peers, tmp_path):
  for name in ('launch/accelerator', 'launch/environment.sh', 'setup.cfg'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy2(tiny.REPOSITORY / name, tmp_path / name)
  for name, content in (
    ('.venv/bin/python', '#!/usr/bin/env bash\necho "$@" >> calls\n'),
    ('tools/nvidia-smi', 'exit 1\n'),
  ):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(content)
    (tmp_path / name).chmod(0o755)
  subprocess.run(
    [tmp_path / 'launch' / 'accelerator', *peers, '--minutes=1'],
    env={**os.environ, 'PATH': f'{tmp_path}/tools:{os.environ["PATH"]}', 'TPU_NAME': ''},
    check=True,
    capture_output=True,
  )
  _, install, run = (tmp_path / 'calls').read_text().splitlines()
  assert install.endswith('.[peers]' if peers else '--editable .')
  assert run == ' '.join(['launch/accelerator.py', *peers, '--minutes=1'])
