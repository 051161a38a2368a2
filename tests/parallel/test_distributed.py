"""Which variables join a process to a run; nothing here opens a connection."""

import jax
import pytest

from moe_jax import errors
from moe_jax.parallel import distributed

COORDINATOR, COUNT, INDEX = (
  'MOE_JAX_COORDINATOR',
  'MOE_JAX_NUM_PROCESSES',
  'MOE_JAX_PROCESS_ID',
)


@pytest.fixture
def calls(monkeypatch):
  """Returns the arguments of every call of jax.distributed.initialize."""
  made = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *arguments: made.append(arguments))
  for name in (COORDINATOR, COUNT, INDEX):
    monkeypatch.delenv(name, raising=False)
  return made


@pytest.mark.parametrize(
  ('environment', 'expected'),
  [
    ({}, []),
    ({COORDINATOR: 'auto'}, [()]),
    ({COORDINATOR: 'host:1234', COUNT: '2', INDEX: '1'}, [('host:1234', 2, 1)]),
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
    ({COORDINATOR: 'host:1', COUNT: '2'}, INDEX),
    ({COORDINATOR: 'host:1', INDEX: '0'}, COUNT),
    ({COORDINATOR: 'host:1', COUNT: 'two', INDEX: '0'}, COUNT),
    ({COORDINATOR: 'host:1', COUNT: '2', INDEX: '2'}, INDEX),
    ({COORDINATOR: 'host:1', COUNT: '2', INDEX: '-1'}, INDEX),
  ],
)
def test_names_the_variable_that_is_wrong(environment, field, calls, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(errors.UserError, match=field):
    distributed.join_processes()
  assert not calls
