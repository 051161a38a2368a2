"""Traces and tables: names survive into programs, and parts add up to the time of the clock."""

import dataclasses
import gzip
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import profiling
from moe_jax.errors import UserError
from moe_jax.layers import moe_layer
from moe_jax.parallel.mesh import make_mesh
from tests import tiny
from tests.layers import small_layer

PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4])->f32[4]}

%wrapped (p: f32[4,4], q: f32[4]) -> f32[4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %dot.1 = f32[4]{0} dot(%p, %q), metadata={op_name="jit(step)/jvp(experts)/dot_general"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(8)} parameter(0)
  %while.1 = (s32[], /*index=1*/f32[4]{0}) while(%x), body=%b, metadata={op_name="jit(step)/while"}
  %dot.2 = f32[4]{0} dot(%x, %x), lhs_contracting_dims={0}
  %ynn_fusion = f32[4]{0} fusion(%dot.2), kind=kCustom, calls=%wrapped
  %copy.3 = f32[4]{0} copy(%add.1)
  ROOT %add.1 = f32[4]{0} add(%dot.2, %x), metadata={op_name="jit(step)/attention/router/add"}
}
"""


def test_operations_of_a_program_and_their_parts():
  assert profiling.module_name(PROGRAM) == 'jit_step'
  found = profiling.operations(PROGRAM)
  assert found.containers == {'while.1'}
  # The innermost scope counts. A fusion is what it wraps; a product whose name was lost is what
  # uses it first, a copy that nothing uses is what it copies.
  parts = {'add.1': 'router', 'dot.1': 'experts', 'ynn_fusion': 'experts', 'while.1': 'other'}
  assert found.part.items() >= (parts | {'dot.2': 'experts', 'copy.3': 'router'}).items()


@pytest.mark.parametrize(
  ('op_name', 'part'),
  [
    ('jit(step)/transpose(jvp(attention))/dot_general', 'attention'),
    ('jit(step)/while/body/moe/shard_map/dispatch/gather', 'dispatch'),
    ('jit(step)/experts/while/body/routers/add', 'experts'),
    ('jit(step)/attention_norm/mul', 'other'),
    ('', 'other'),
  ],
)
def test_the_part_is_the_innermost_that_is_named(op_name, part):
  assert profiling.part_of(op_name) == part


@hypothesis.given(
  spans=hnp.arrays(np.int64, st.tuples(st.integers(0, 6), st.just(2)), elements=st.integers(0, 9)),
  rows=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_what_runs_at_once_shares_the_time(spans, rows):
  spans = np.sort(spans, axis=1)
  spans = spans[spans[:, 0] < spans[:, 1]]
  rows = np.array(rows[: len(spans)], int)
  found = profiling._shared_time(spans, rows, 6)
  # Tick by tick: rows from 3 on last as long as what is within them, and yield to it.
  expected = np.zeros(6)
  for tick in range(9):
    running = [row for row, (start, end) in zip(rows, spans, strict=True) if start <= tick < end]
    running = [row for row in running if row < 3] or running
    for row in running:
      expected[row] += 1 / len(running)
  np.testing.assert_allclose(found * 1e9, expected, atol=1e-9)


def load(folder):
  """Returns the table of a trace, which must load."""
  (trace,) = folder.glob('plugins/profile/*/*.xplane.pb')
  assert list(jax.profiler.ProfileData.from_file(str(trace)).planes)
  with gzip.open(trace.parent / 'perfetto_trace.json.gz') as file:
    assert json.load(file)['traceEvents']
  table = json.loads((folder / profiling.TABLE).read_text())
  assert list(table['parts']) == [*profiling.PARTS, 'other', 'idle']
  shares = [row['share'] for row in table['parts'].values()]
  assert sum(shares) == pytest.approx(1) and min(shares) > -1e-9
  seconds = sum(row['seconds_per_step'] for row in table['parts'].values())
  assert seconds == pytest.approx(table['seconds_per_step'])
  return table


def test_calls_are_traced_and_their_time_is_where_the_work_is(tmp_path):
  def work(x):
    with jax.named_scope('experts'):
      for _ in range(30):
        x = jnp.tanh(x @ x)
    with jax.named_scope('router'):
      return x + 1

  x = jnp.ones((256, 256))
  compiled = jax.jit(work).lower(x).compile()
  call = lambda: jax.block_until_ready(compiled(x))  # noqa: E731
  call()
  table = profiling.trace_calls(call, compiled.as_text(), '--profile', str(tmp_path), 2)
  written = load(tmp_path)
  assert written == table.to_json() and written['steps'] == 2
  # 1 GFLOP against 65,536 additions.
  parts = written['parts']
  assert parts['experts']['seconds_per_step'] > parts['router']['seconds_per_step'] > 0
  assert parts['attention']['share'] == 0
  lines = str(table).splitlines()
  assert [line.split()[0] for line in lines] == ['part', *written['parts'], 'all']


@pytest.mark.parametrize('name', ['einsum', 'gather', 'dropless'])
def test_every_dispatcher_names_its_parts(name):
  options = dataclasses.replace(small_layer.OPTIONS, dispatch=name)
  inputs = small_layer.draw(options)
  info, keys = small_layer.info_of(inputs.valid), small_layer.group_keys(options, len(inputs.x))

  def loss(params):
    layer = moe_layer.moe_layer(
      inputs.x,
      info,
      params,
      state={},
      keys=keys,
      mesh=make_mesh(1, 1),
      options=options,
      deterministic=True,
    )
    return jnp.sum(layer.y**2)

  program = jax.jit(jax.grad(loss)).lower(inputs.params).compile().as_text()
  parts = set(profiling.operations(program).part.values())
  assert parts >= {'router', 'plan', 'dispatch', 'experts', 'combine'}


def test_a_run_is_traced(tmp_path, text):
  path = tiny.config_file(tmp_path, {**text, 'moe.num_shared_experts': 1, 'train.num_steps': 4})
  flags = (f'--config={path}', f'--workdir={tmp_path / "run"}')
  result = tiny.command('train', *flags, f'--profile={tmp_path / "trace"}')
  assert result.code == 0, result.err
  assert '2 steps traced' in result.out
  table = load(tmp_path / 'trace')
  assert table['steps'] == 2
  # Each part of the model runs in a step, and bears its name in the trace.
  for part in profiling.PARTS:
    assert table['parts'][part]['seconds_per_step'] > 0, part
    assert part in result.out
  again = tiny.command('train', *flags, f'--profile={tmp_path / "trace"}')
  again.assert_error('--profile')


def test_directories_that_cannot_be(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  for directory in ('', str(file), str(file / 'below')):
    with pytest.raises(UserError, match='^--profile='):
      profiling.check_directory('--profile', directory)
    tiny.command('benchmark', 'layer', f'--profile={directory}').assert_error('--profile')
  path = tiny.config_file(tmp_path)
  flags = (f'--config={path}', f'--workdir={tmp_path / "run"}', f'--profile={file}')
  tiny.command('train', *flags).assert_error('--profile')
  assert not (tmp_path / 'run').exists()
  tiny.command('benchmark', 'dispatch', f'--profile={tmp_path}').assert_error('--profile')
