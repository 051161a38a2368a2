"""Configs that no machine holds are refused in one line before anything is built."""

import pytest

from moe_jax.errors import UserError
from moe_jax.run import size
from moe_jax.schema import SCHEMA
from tests import tiny

GIB = 2**30


def test_the_largest_field_is_named(monkeypatch):
  monkeypatch.setattr(size, '_memory', lambda: GIB)
  size.check_size(tiny.config(), 258)
  # 2 layers x 2^20 experts x (16 x 32 + 16 x 16) weights x 4 bytes = 6 GiB.
  config = tiny.config({'moe.num_experts': 2**20})
  with pytest.raises(UserError, match=r'moe.num_experts=1048576: the parameters would take 6 GiB,'):
    size.check_size(config, 258)
  monkeypatch.setattr(size, '_memory', lambda: 7 * GIB)
  size.check_size(config, 258)
  # 2^26 x 16 tokens x 16 numbers x 4 bytes = 64 GiB.
  config = tiny.config({'data.batch_size': 2**26})
  with pytest.raises(UserError, match=r'data.batch_size=67108864: the tokens of a batch.* 64 GiB'):
    size.check_size(config, 258)
  monkeypatch.setattr(size, '_memory', lambda: None)
  size.check_size(config, 258)


@pytest.mark.parametrize('field', [*size._MODEL_FIELDS, *size._BATCH_FIELDS[:2]])
def test_every_such_field_at_its_bound_is_refused(field):
  room, _, name = field.partition('.')
  largest = 2**30 if field == 'moe.num_experts' else 2**31 - 2
  assert SCHEMA[room][name].check(largest)
  config = tiny.config({'model.head_dim': 8, 'model.num_kv_heads': 1, 'mesh.data': 1})
  if field == 'model.mlp_dim':
    config.moe.every = 2
  config[room][name] = largest
  with pytest.raises(UserError, match=f'^{field}={largest}: .* GiB of memory here'):
    size.check_size(config, 258)


def test_the_command_says_so_in_one_line(text, tmp_path):
  path, workdir = tiny.config_file(tmp_path, text), tmp_path / 'run'
  for override in ('moe.num_experts=1073741824', 'data.sequence_length=2147483647'):
    flags = f'--config={path}', f'--config.{override}', '--config.mesh.expert=1'
    tiny.command('train', *flags, f'--workdir={workdir}').assert_error(override, 'GiB')
  assert not workdir.exists()
