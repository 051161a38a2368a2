"""`launch/accelerator.py`: its check runs on any device, and its benchmarks are ones there are."""

import runpy

import pytest

from tests import tiny

SCRIPT = runpy.run_path(str(tiny.REPOSITORY / 'launch' / 'accelerator.py'))


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
