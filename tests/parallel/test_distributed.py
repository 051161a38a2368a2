"""Variables that join a process to a run; nothing here opens a connection."""

import jax
import pytest
from jax._src import xla_bridge

from moe_jax import errors
from moe_jax.parallel import distributed, watch

COORDINATOR, COUNT, INDEX = (
  'MOE_JAX_COORDINATOR',
  'MOE_JAX_NUM_PROCESSES',
  'MOE_JAX_PROCESS_ID',
)
HERE = 'localhost:1234'
SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '0',
}


@pytest.fixture
def calls(monkeypatch):
  """Returns the arguments of every call of jax.distributed.initialize."""
  made = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *words, **more: made.append(words))
  for name in (COORDINATOR, COUNT, INDEX, *SLURM):
    monkeypatch.delenv(name, raising=False)
  return made


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, []),
    ({COORDINATOR: 'auto'}, [()]),
    ({COORDINATOR: 'auto', **SLURM}, [()]),
    ({COORDINATOR: 'localhost:1234', COUNT: '2', INDEX: '1'}, [('localhost:1234', 2, 1)]),
    ({COORDINATOR: '[::1]:1', COUNT: '1', INDEX: '0'}, [('[::1]:1', 1, 0)]),
  ],
)
def test_joins(environment, expected, calls, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  distributed.join_processes()
  assert calls == expected


@pytest.mark.parametrize(
  ('environment', 'field'),
  [
    ({COUNT: '2'}, COORDINATOR),
    ({INDEX: '0'}, COORDINATOR),
    ({COORDINATOR: HERE, COUNT: '2'}, INDEX),
    ({COORDINATOR: HERE, INDEX: '0'}, COUNT),
    ({COORDINATOR: HERE, COUNT: 'two', INDEX: '0'}, COUNT),
    ({COORDINATOR: HERE, COUNT: '0', INDEX: '0'}, f'{COUNT}=0: must be at least 1'),
    ({COORDINATOR: HERE, COUNT: '2', INDEX: '2'}, f'{INDEX}=2: .*0..1'),
    ({COORDINATOR: HERE, COUNT: '2', INDEX: '-1'}, INDEX),
    ({COORDINATOR: HERE, COUNT: '2', INDEX: '²'}, INDEX),
    ({COORDINATOR: HERE, COUNT: '2', INDEX: '9' * 5000}, INDEX),
    ({COORDINATOR: HERE, COUNT: '2', INDEX: ''}, INDEX),
    ({COORDINATOR: HERE, COUNT: '1', INDEX: '0', watch.TIMEOUT: '9'}, f'{watch.TIMEOUT}=.9.'),
    ({COORDINATOR: 'auto', watch.TIMEOUT: 'long'}, f'{watch.TIMEOUT}=.long.'),
    ({COORDINATOR: 'localhost', COUNT: '2', INDEX: '0'}, f'{COORDINATOR}=.localhost.: .*host:port'),
    ({COORDINATOR: '', COUNT: '2', INDEX: '0'}, 'host:port'),
    ({COORDINATOR: ':1', COUNT: '2', INDEX: '0'}, 'host:port'),
    ({COORDINATOR: 'localhost:0', COUNT: '2', INDEX: '0'}, 'port in 1..65535'),
    ({COORDINATOR: 'localhost:65536', COUNT: '2', INDEX: '0'}, 'port in 1..65535'),
    ({COORDINATOR: 'localhost:http', COUNT: '2', INDEX: '0'}, 'port in 1..65535'),
    ({COORDINATOR: 'a..b:1', COUNT: '2', INDEX: '0'}, 'no such host'),
  ],
)
def test_names_the_variable_that_is_wrong(environment, field, calls, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(errors.UserError, match=field):
    distributed.join_processes()
  assert not calls


NO_CLUSTER = ValueError('coordinator_address should be defined.')


@pytest.mark.parametrize(
  ('environment', 'error', 'words'),
  [
    ({COORDINATOR: 'auto'}, NO_CLUSTER, f'{COORDINATOR}=.auto.: found no cluster to join'),
    ({COORDINATOR: 'auto', **SLURM}, KeyError('X'), 'found no cluster'),
    (
      {COORDINATOR: 'auto', **SLURM, 'SLURM_PROCID': 'one'},
      ValueError('int'),
      "PROCID='one'",
    ),
    ({COORDINATOR: 'auto', **SLURM, 'SLURM_NTASKS': ''}, NO_CLUSTER, 'did not set SLURM_NTASKS'),
    ({COORDINATOR: 'auto', 'SLURM_JOB_ID': '7'}, NO_CLUSTER, 'set SLURM_STEP_NODELIST, .* srun'),
    (
      {COORDINATOR: HERE, COUNT: '1', INDEX: '0'},
      RuntimeError('in use'),
      'can.* used: in use',
    ),
  ],
)
def test_what_jax_refuses_is_one_line(environment, error, words, calls, monkeypatch):
  """No scheduler, half of one, one whose variables it can't read, a port that is in use."""

  def refuse(*arguments, **more):
    raise error

  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, 'initialize', refuse)
  with pytest.raises(errors.UserError, match=words):
    distributed.join_processes()


def test_jax_itself_finds_no_cluster_here(monkeypatch):
  for name in SLURM:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv(COORDINATOR, 'auto')
  monkeypatch.setenv('SLURM_JOB_ID', '7')
  # As in a process that has not computed yet.
  monkeypatch.setattr(xla_bridge, 'backends_are_initialized', lambda: False)
  with pytest.raises(errors.UserError, match='Slurm did not set SLURM_STEP_NODELIST'):
    distributed.join_processes()


def test_the_silent_process_is_the_one_that_is_named():
  """Three processes, seen by process 1; each says a new number every 10 s, the limit is 60."""
  seen = watch.Watch(1, 3, 60.0, 0.0)
  for now in map(float, range(10, 100, 10)):
    assert seen.look({0: str(now), 1: str(now), 2: str(now)}, now) == []
  # Process 2 says nothing new after 90.
  for now in map(float, range(100, 160, 10)):
    assert seen.look({0: str(now), 1: str(now), 2: '90.0'}, now) == []
  assert seen.look({0: '160', 1: '160', 2: '90.0'}, 160.0) == [2]
  # The store is with process 0; without it nobody else is to blame.
  seen = watch.Watch(1, 3, 60.0, 0.0)
  for now in map(float, range(10, 70, 10)):
    assert seen.look(None, now) == []
  assert seen.look(None, 70.0) == [0]
  # Process 0 sees 1 and 2 stop together; one that never said anything counts from the start.
  seen = watch.Watch(0, 3, 60.0, 0.0)
  assert [seen.look({0: str(now)}, float(now)) for now in range(10, 80, 10)] == [[]] * 6 + [[1, 2]]


def test_who_was_stopped_itself_accuses_nobody():
  seen = watch.Watch(0, 2, 60.0, 0.0)
  assert seen.look({1: '1'}, 10.0) == []
  # Stopped for an hour, in which the other one went on, or not.
  assert seen.look({1: '1'}, 3610.0) == []
  assert seen.look({1: '2'}, 3620.0) == []


def test_giving_up_is_one_line(capsys):
  codes = []
  watch.give_up([1], 2, 60.0, codes.append)
  assert codes == [watch.LOST_EXIT_CODE]
  error = capsys.readouterr().err.strip()
  assert error.startswith('error: process 1 of 2 does not answer for 60 s') and '\n' not in error
