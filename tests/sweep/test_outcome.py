"""Outcomes of trials on disk: what was written comes back, anything else is damage."""

import pytest

from moe_jax.errors import DamagedError
from moe_jax.sweep import outcome

_OUTCOME = {'status': 'finished', 'evaluations': {'dropless': {'loss': 2.5}}, 'digests': {}}


def test_what_was_written_comes_back(tmp_path):
  assert outcome.read(tmp_path, 'a') is None
  outcome.write(tmp_path, 'a', _OUTCOME)
  assert outcome.read(tmp_path, 'a') == _OUTCOME


@pytest.mark.parametrize(
  'change',
  [
    lambda content: content[:-9],
    lambda content: content.replace(b'2.5', b'1.5'),
    lambda content: b'',
    lambda content: b'\xff' + content,
    lambda content: b'[]',
    lambda content: b'{}',
    lambda content: b'3',
    lambda content: b'[' * 20_000,
    lambda content: b'7' * 5_000,
  ],
  ids=range(9),
)
def test_anything_else_is_damage(tmp_path, change):
  outcome.write(tmp_path, 'a', _OUTCOME)
  path = outcome.path_of(tmp_path, 'a')
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(DamagedError, match='a.json'):
    outcome.read(tmp_path, 'a')
