"""Which variables join a process to a run; nothing here opens a connection."""

import jax
import pytest
from jax._src import xla_bridge

from moe_jax import errors
from moe_jax.parallel import distributed

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
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *arguments: made.append(arguments))
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

  def refuse(*arguments):
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
