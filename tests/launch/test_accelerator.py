"""`launch/accelerator.py`: its check runs on any device, and its benchmarks are ones there are."""

import runpy

import pytest

from tests import tiny

SCRIPT = runpy.run_path(str(tiny.REPOSITORY / 'launch' / 'accelerator.py'))


def test_the_check_finds_nothing_on_a_cpu(capsys):
  assert SCRIPT['check']() < SCRIPT['TOLERANCE']
  assert len(capsys.readouterr().out.splitlines()) == 1 + len(SCRIPT['CASES'])


@pytest.mark.parametrize('peers', [False, True])
def test_benchmarks_are_ones_there_are(peers):
  commands = SCRIPT['commands'](peers)
  assert len(commands) == 2 + len(SCRIPT['SHAPES'])
  for module, name, *arguments in commands:
    assert (module, name) == ('-m', 'moe_jax.benchmark')
    assert ('--peers' in arguments) == (peers and arguments[0] == 'dispatch')
    result = tiny.command('benchmark', *arguments, '--only_check_args')
    assert result.code == 0, result.err
    assert not result.out
  wrong = tiny.command('benchmark', *arguments, '--of_no_such_name', '--only_check_args')
  wrong.assert_error('of_no_such_name')
