"""The benchmarks run; no test looks at what they measure, but arms must compute the same."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import cli
from moe_jax.benchmark import decode, dispatch, names, peers, routings, text, timing
from moe_jax.benchmark.arms import Shape, expert_weights
from tests import tiny


def test_ep_exchanges_the_bytes_of_the_formula():
  flags = ('--num_tokens=128', '--embed_dim=8', '--mlp_dim=4', '--num_experts=8', '--json')
  result = tiny.command('benchmark', 'ep', *flags, '--meshes=2x4', '--dtype=bfloat16')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [len(row['exchanged_bytes']) for row in rows] == [2, 4]
  for row in rows:
    # 8 groups of 16 tokens, one on each device: 8 experts with ceil(16 x 2 x 1.25 / 8) = 5 slots of
    # 8 numbers of 2 bytes, 3 of 4 parts of which leave the device.
    assert row['formula_bytes'] == 8 * 5 * 8 * 2 * 3 / 4
    assert set(row['exchanged_bytes']) == {row['formula_bytes']}
    # 256 assignments of 320 slots; 32 for each group over 8 experts.
    assert (1 - row['drop_share']) * 256 == pytest.approx((1 - row['padding']) * 320)
    assert row['tokens_per_expert'] == 4 and row['max_load'] > 1
  for meshes in ('2by4', '4x4'):
    tiny.command('benchmark', 'ep', *flags, f'--meshes={meshes}').assert_error('--meshes')


SHAPE = Shape(12, 8, 4, 2, 6.0, 'swiglu', 'float32')
SMALL = ('--num_tokens=64', '--embed_dim=8', '--mlp_dim=4', '--num_experts=4', '--json')


def small(*flags):
  """Returns small sizes, but for those that the flags give, and the flags."""
  given = {flag.partition('=')[0] for flag in flags}
  return [size for size in SMALL if size.partition('=')[0] not in given] + list(flags)


@pytest.mark.parametrize('name', names.DRAWN)
def test_routings_name_different_experts(name):
  chosen = routings.choose(name, SHAPE._replace(num_tokens=6000), 6, seed=0)
  assert all(len(set(row)) == 2 for row in chosen.tolist())
  load = np.bincount(chosen.ravel(), minlength=6) / 6000
  if name == 'round_robin':
    np.testing.assert_array_equal(load, 2 / 6)
    assert chosen[:3].tolist() == [[0, 1], [2, 3], [4, 5]]
  else:
    # The chance to be among the first two drawn, worked out from the weights (e + 1)^-A.
    weights = np.arange(1, 7) ** -(0.0 if name == 'uniform' else float(name[5:]))
    p = weights / weights.sum()
    wanted = p + [sum(p[i] * p[e] / (1 - p[i]) for i in range(6) if i != e) for e in range(6)]
    np.testing.assert_allclose(load, wanted, atol=0.02)


def test_arms_of_the_dispatch_benchmark_compute_the_same():
  # Factor 6 of 6 experts: nothing is dropped, so the arm that drops nothing agrees too.
  plan = dispatch.make_plan(SHAPE, 6, routings.choose('zipf_1', SHAPE, 6, seed=0))
  params = expert_weights(jax.random.key(0), SHAPE, 6)
  tokens = jax.random.normal(jax.random.key(1), (1, 12, 8))
  found = [
    dispatch.layer_of(arm, 'swiglu')(params, tokens, plan)
    for arm in ('einsum', 'gather', 'ragged_dot')
  ]
  for outputs in found[1:]:
    np.testing.assert_allclose(outputs, found[0], rtol=1e-5, atol=1e-6)
  assert dispatch.layer_of('copy', 'swiglu')(params, tokens, plan).shape == tokens.shape


def test_dispatch_and_layer_print_a_row_for_each_pass():
  flags = ('--routings=zipf_1', '--arms=gather,copy,ragged_dot')
  result = tiny.command('benchmark', 'dispatch', *small(*flags))
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['pass'] for row in rows] == ['forward', 'forward+backward']
  for row in rows:
    measured = set(row['arms']) | set(row['not_measured'])
    assert measured == {'products', 'balanced', 'gather', 'copy', 'ragged_dot'}
    assert row['arms']['products']['eta_bmm']['median'] == 1
    assert row['arms']['balanced']['eta_bmm']['median'] == 1
    # 64 tokens, K = 2, factor 1.25: 40 slots of each of 4 experts.
    kept = (1 - row['drop_share']) * 128
    assert kept == pytest.approx((1 - row['padding']) * 160)
    assert row['max_load'] > 1.2 and row['tokens_per_expert'] == 32
  for flags in (['--routings=luck'], ['--routings='], ['--arms=magic'], ['--tokens_per_expert=-1']):
    refused = tiny.command('benchmark', 'dispatch', *small(*flags))
    refused.assert_error(flags[0].partition('=')[0])


def test_dispatch_says_how_much_more_each_arm_grows_than_its_products(monkeypatch):
  monkeypatch.setattr(dispatch, 'SLOWEST', 1e9)  # of layers this small the dense one takes nothing
  flags = ('--num_experts=4,8', '--routings=uniform', '--arms=gather,dropless')
  result = tiny.command('benchmark', 'dispatch', *small(*flags))
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_experts'] for row in rows] == [4, 4, 8, 8]
  for row, first in zip(rows, (*rows[:2], *rows[:2]), strict=True):
    for name, arm in row['arms'].items():
      for excess, eta in (('excess', 'eta_bmm'), ('excess_balanced', 'eta_balanced')):
        grown = first['arms'][name][eta]['median'] / arm[eta]['median']
        assert arm[excess] == pytest.approx(grown)
    # What drops nothing is held against balanced rows alone, what has a capacity against both.
    assert row['arms']['dropless']['eta_bmm'] == row['arms']['dropless']['eta_balanced']
    assert row['arms']['gather']['eta_bmm'] != row['arms']['gather']['eta_balanced']


def test_dispatch_prints_both_products_and_both_excesses():
  ratio = lambda median: {'median': median, 'low': 0.5, 'high': 2.0}  # noqa: E731
  arm = {
    'eta_dense': ratio(1.11),
    'eta_bmm': ratio(1.22),
    'excess': 1.33,
    'eta_balanced': ratio(1.44),
    'excess_balanced': 1.55,
    'milliseconds': 1.0,
    'compile_seconds': 1.0,
    'temporary_bytes': 1,
  }
  row = {
    'num_experts': 4,
    'num_tokens': 64,
    'routing': 'uniform',
    'pass': 'forward',
    'tokens_per_expert': 32,
    'max_load': 1.0,
    'drop_share': 0.0,
    'padding': 0.2,
    'dense_milliseconds': 1.0,
    'null': ratio(1.0),
    'void': False,
    'arms': {'gather': arm},
    'not_measured': {},
    'peers': None,
  }
  found = re.findall(
    r'(dense/arm|products/arm|balanced/arm|excess) (\d\.\d\d)', text.of_dispatch(row)
  )
  assert found == [
    ('dense/arm', '1.11'),
    ('products/arm', '1.22'),
    ('excess', '1.33'),
    ('balanced/arm', '1.44'),
    ('excess', '1.55'),
  ]


def test_experts_of_the_benchmark_differ_and_keep_the_scale_of_their_inputs():
  params = expert_weights(jax.random.key(0), SHAPE._replace(embed_dim=256, mlp_dim=64), 6)
  for weights, width in ((params.w_in, 256), (params.w_out, 64)):
    assert len({float(expert[0, 0]) for expert in weights}) == 6
    np.testing.assert_allclose(np.std(weights, axis=(1, 2)), width**-0.5, rtol=0.05)


def test_whoever_reads_the_rows_may_leave(monkeypatch):
  def leave(*_, **__):
    raise BrokenPipeError

  monkeypatch.setattr(text, 'of_router', leave)
  left = []
  monkeypatch.setattr(cli, 'end_of_reading', lambda: left.append(True))
  result = tiny.command('benchmark', 'router', '--routers=top_k', *SMALL[1:-1])
  assert result.code == 0 and left, result.err


def test_arms_of_the_decode_benchmark_compute_the_same():
  plan = decode.plan_of(SHAPE, 6, seed=0)
  assert plan.keep.shape == (12, 1, 2) and bool(plan.keep.all())
  params = expert_weights(jax.random.key(0), SHAPE, 6)
  tokens = jax.random.normal(jax.random.key(1), (12, 1, 8))
  found = [decode.arm_of(arm, SHAPE, 6)(params, tokens, plan) for arm in decode.WAYS]
  for outputs in found[1:]:
    np.testing.assert_allclose(outputs, found[0], rtol=1e-5, atol=1e-6)


def test_decode_prints_the_layer_and_the_model(monkeypatch):
  monkeypatch.setattr(decode, 'LEAST_SECONDS', 0.001)
  flags = ('--embed_dim=8', '--mlp_dim=4', '--num_experts=8', '--json', '--num_layers=1')
  result = tiny.command('benchmark', 'decode', *flags, '--batches=1,8')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [(row['level'], row['batch']) for row in rows] == [
    ('layer', 1),
    ('model', 1),
    ('layer', 8),
    ('model', 8),
  ]
  assert [row['rows_in_block'] for row in rows] == [1, 1, 4, 4]
  for row in rows:
    assert row['void'] == (not 0.95 <= row['null']['median'] <= 1.05)
    assert all(arm['tokens_per_second'] > 0 for arm in row['arms'].values())
  assert set(rows[1]['arms']) == {'dense', 'decode', 'slots'}
  layer = rows[2]['arms']
  of_expert = 3 * 8 * 4 * 4
  assert layer['slots']['weight_bytes'] == 8 * of_expert
  assert layer['one_by_one']['weight_bytes'] == 16 * of_expert
  # 16 assignments to 8 experts in blocks of 4 rows.
  loads = np.bincount(decode.plan_of(SHAPE._replace(num_tokens=8), 8, 0).expert_index.ravel())
  assert layer['grouped']['weight_bytes'] == sum(-(-load // 4) for load in loads) * of_expert
  assert rows[2]['experts_chosen'] == np.count_nonzero(loads)
  for flag in ('--batches=0', '--batches=', '--num_layers=-1'):
    tiny.command('benchmark', 'decode', *flags, flag).assert_error(flag.partition('=')[0])


def test_layer_keeps_tokens_per_expert_and_says_how_much_more_it_grows_than_its_products():
  flags = ('--num_experts=4,8', '--tokens_per_expert=16')
  both = tiny.command('benchmark', 'layer', *small(*flags))
  both.assert_error('--num_tokens=64', '--tokens_per_expert')
  result = tiny.command(
    'benchmark', 'layer', *[f for f in small(*flags) if not f.startswith('--num_tokens')]
  )
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_tokens'] for row in rows] == [32, 32, 64, 64]
  for row, first in zip(rows, (*rows[:2], *rows[:2]), strict=True):
    assert row['tokens_per_expert'] == 16
    slots = 20 * row['num_experts']
    assert (1 - row['drop_share']) * 16 * row['num_experts'] == pytest.approx(
      (1 - row['padding']) * slots
    )
    for excess, eta in (('excess', 'eta_bmm'), ('excess_batched', 'eta_batched')):
      assert row[excess] == pytest.approx(first[eta]['median'] / row[eta]['median'])


def test_layer_in_several_groups_and_in_memory_that_is_there():
  flags = ('--num_groups=4', '--reuse_memory')
  result = tiny.command('benchmark', 'layer', *small(*flags))
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_groups'] for row in rows] == [4, 4]
  for row in rows:
    # 4 groups of 16 tokens, K = 2, factor 1.25: 10 slots of each of 4 experts in each.
    assert (1 - row['drop_share']) * 128 == pytest.approx((1 - row['padding']) * 160)
  for flag in ('--num_tokens=0', '--embed_dim=0', '--num_selected_experts=0', '--mlp_dim=-1'):
    tiny.command('benchmark', 'layer', *small(flag)).assert_error(flag.partition('=')[0])
  for value in ('0', 'nan', 'inf'):
    refused = tiny.command('benchmark', 'router', *SMALL, f'--capacity_factor={value}')
    refused.assert_error('--capacity_factor', value)
  for flag in ('--num_groups=0', '--num_groups=5'):
    tiny.command('benchmark', 'layer', *small(flag)).assert_error('--num_groups')


def test_results_are_written_over_earlier_ones():
  x = jnp.arange(8.0)
  memory = timing.Memory()
  arm = timing.compile_arm(lambda x: x + 1, x, memory=memory)
  struct = jax.eval_shape(lambda: x)
  before = memory.take(struct)
  np.testing.assert_array_equal(before, x + 1)
  memory.keep(before)
  assert arm.call() is None
  assert before.is_deleted()  # given to the call
  np.testing.assert_array_equal(memory.take(struct), x + 1)
  np.testing.assert_array_equal(memory.take(struct), 0 * x)  # nothing is left


def test_fast_arms_run_several_times_in_a_round(monkeypatch):
  # Under a clock that only arms move: 0.25 s and 2 s a call, at least 1 s in a round.
  now = [0.0]
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: now[0])
  ran = {'fast': 0, 'slow': 0}

  def arm(name, seconds):
    def call():
      ran[name] += 1
      now[0] += seconds

    return call

  arms = {'fast': arm('fast', 0.25), 'slow': arm('slow', 2.0)}
  assert timing.measure(arms, 3, least_seconds=1.0) == {'fast': [0.25] * 3, 'slow': [2.0] * 3}
  # One call to see how long it takes, then 3 rounds of 4 and of 1.
  assert ran == {'fast': 1 + 3 * 4, 'slow': 1 + 3}


@pytest.mark.parametrize(
  ('command', 'flag', 'value'),
  [
    ('decode', 'capacity_factor', 2.0),
    ('step', 'num_experts', ['8']),
    ('layer', 'meshes', ['1x8']),
    ('layer', 'config', 'configs/debug.py'),
    ('router', 'activation', 'gelu'),
    ('dispatch', 'profile', 'traces'),
  ],
)
def test_a_flag_that_the_command_does_not_read_is_refused(command, flag, value):
  given = value[0] if isinstance(value, list) else value
  refused = tiny.command('benchmark', command, f'--{flag}={given}')
  refused.assert_error(f'--{flag}={value!r}', f'not read by benchmark {command}')


@pytest.mark.parametrize('flag', ['--workdir=run', '--data_dir=data'])
def test_what_only_a_trace_needs_is_refused_without_one(flag):
  refused = tiny.command('benchmark', 'dispatch', *SMALL, '--routings=uniform', flag)
  refused.assert_error(flag.partition('=')[0], '--routings=trace')


@pytest.mark.parametrize(
  'words', [('layer', '--num_experts=4,04'), ('dispatch', '--arms=gather,copy,gather')]
)
def test_what_is_named_twice_is_refused(words):
  refused = tiny.command('benchmark', *words)
  refused.assert_error(words[1].partition('=')[0], 'more than once')


def test_help_is_no_error():
  result = tiny.command('benchmark', '--help')
  assert result.code == 0 and 'dispatch' in result.out, result.err
  of_layer = tiny.start('benchmark', 'layer', '--help')
  out, err = of_layer.communicate()
  assert of_layer.returncode == 0 and '--[no]reuse_memory' in out and not err


def test_router_says_what_it_asks_of_the_experts():
  flags = ('--routers=top_k,round_robin,soft', *SMALL)
  result = tiny.command('benchmark', 'router', *flags)
  assert result.code == 0, result.err
  rows = {row['router']: row for row in map(json.loads, result.out.splitlines())}
  even = {'tokens_per_expert': 32, 'max_load': 1, 'drop_share': 0, 'padding': 1 - 128 / 160}
  assert {name: rows['round_robin'][name] for name in even} == pytest.approx(even)
  assert rows['top_k']['tokens_per_expert'] == 32 and rows['top_k']['max_load'] > 1
  assert rows['soft']['max_load'] is None


def test_router_in_bfloat16_says_how_many_choices_differ():
  flags = ('--routers=top_k,round_robin,soft', '--router_dtype=bfloat16', '--num_tokens=2048')
  result = tiny.command('benchmark', 'router', *small(*flags))
  assert result.code == 0, result.err
  rows = {row['router']: row for row in map(json.loads, result.out.splitlines())}
  assert 0 < rows['top_k']['disagreement'] < 0.2
  assert rows['round_robin']['disagreement'] == 0
  assert rows['soft']['disagreement'] is None


def test_an_arm_that_is_too_slow_is_not_tried_with_more_experts(monkeypatch):
  monkeypatch.setattr(dispatch, 'SLOWEST', 0.0)
  monkeypatch.setattr(dispatch, 'LEAST_SECONDS', 0.0)
  shape = SHAPE._replace(num_tokens=8)
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  rows = [
    row['not_measured']['gather']
    for row in dispatch.rows(shape, num_experts=[2, 4], arms=['gather'], **options)
  ]
  assert all(why.endswith('times the dense layer at E=2') for why in rows)
  assert rows[:2] == rows[2:]


def test_an_arm_that_memory_is_too_small_for_is_left_out_and_the_others_go_on(monkeypatch):
  def layer_of(arm, activation):
    return too_large if arm == 'ragged_dot' else dispatch_layer(arm, activation)

  def too_large(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.')

  dispatch_layer = dispatch.layer_of
  monkeypatch.setattr(dispatch, 'layer_of', layer_of)
  shape, arms = SHAPE._replace(num_tokens=8), ['ragged_dot', 'gather']
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  rows = list(dispatch.rows(shape, num_experts=[2, 4], arms=arms, **options))
  assert len(rows) == 4
  for row in rows:
    assert row['not_measured'] == {'ragged_dot': 'out of memory at E=2'}
    assert 'gather' in row['arms'] and 'ragged_dot' not in row['arms']


def test_tokamax_is_an_arm_where_it_is_installed(monkeypatch):
  called = []

  def ragged_dot(*arguments):
    called.append(arguments)
    return jax.lax.ragged_dot(*arguments)

  monkeypatch.setitem(sys.modules, 'tokamax', types.SimpleNamespace(ragged_dot=ragged_dot))
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  shape = SHAPE._replace(num_tokens=8)
  for row in dispatch.rows(shape, num_experts=[2], arms=['tokamax'], **options):
    tokamax = row['arms']['tokamax']
    # It drops nothing, and is held against balanced products.
    assert tokamax['eta_bmm'] == tokamax['eta_balanced']
  assert called


def test_tokamax_is_refused_where_it_is_not(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokamax', None)
  refused = tiny.command('benchmark', 'dispatch', *SMALL, '--arms=gather,tokamax')
  refused.assert_error('--arms', 'needs the package')


def test_what_takes_no_time_is_not_left_out_as_slow(monkeypatch):
  monkeypatch.setattr(dispatch, 'SLOWEST', 0.0)
  monkeypatch.setattr(dispatch, 'LEAST_SECONDS', 1e9)
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  rows = dispatch.rows(SHAPE._replace(num_tokens=8), num_experts=[2], arms=['gather'], **options)
  assert not any(row['not_measured'] for row in rows)


def test_no_memory_for_the_references_is_one_line(monkeypatch):
  def too_large(*_, **__):
    raise jax.errors.JaxRuntimeError('INTERNAL: Error: Out of memory allocating 17179869184 bytes.')

  monkeypatch.setattr(dispatch, 'dense_weights', too_large)
  result = tiny.command('benchmark', 'dispatch', *SMALL, '--routings=uniform')
  result.assert_error("benchmark='dispatch'", 'not enough memory', '17179869184 bytes')


@pytest.mark.parametrize(
  ('text', 'is_so'),
  [
    ('RESOURCE_EXHAUSTED: Failed to allocate', True),
    ('INTERNAL: Error dispatching computation: Out of memory allocating 1 bytes.', True),
    ('CUDA out of memory. Tried to allocate', True),
    ("DefaultCPUAllocator: can't allocate memory", True),
    ('INTERNAL: an illegal memory access', False),
  ],
)
def test_no_memory_is_told_from_other_failures(text, is_so):
  assert timing.is_out_of_memory(RuntimeError(text)) == is_so


def test_any_other_failure_of_an_arm_ends_the_benchmark(monkeypatch):
  def broken(*_):
    raise jax.errors.JaxRuntimeError('INTERNAL: broken')

  monkeypatch.setattr(dispatch, 'layer_of', lambda *_: broken)
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
    list(dispatch.rows(SHAPE, num_experts=[2], arms=['gather'], **options))


def test_peers_without_memory_are_left_out_and_ours_go_on(monkeypatch):
  class OutOfMemoryError(RuntimeError):
    """As torch has it."""

  def no_memory(*_):
    raise OutOfMemoryError('CUDA out of memory.')

  monkeypatch.setattr(peers, 'arms', no_memory)
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  shape = SHAPE._replace(num_tokens=8)
  rows = dispatch.rows(shape, num_experts=[2], arms=['gather'], peers=True, **options)
  for row in rows:
    assert row['not_measured'] == {peers.GROUPED: 'out of memory at E=2'}
    assert row['peers'] is None and 'gather' in row['arms']


def test_a_trace_is_what_the_router_of_a_run_chose(tmp_path, text):
  path = tiny.config_file(tmp_path, {**text, 'mesh.data': 1, 'mesh.expert': 1})
  workdir = tmp_path / 'run'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err
  trace = routings.record(str(workdir), 300)
  assert trace.expert_index.shape[0] >= 300 and (trace.num_experts, trace.step) == (8, 6)
  assert np.all(trace.expert_index[:, 0] != trace.expert_index[:, 1])
  flags = ('--routings=trace', f'--workdir={workdir}', '--arms=gather')
  result = tiny.command('benchmark', 'dispatch', *SMALL[:3], '--json', *flags)
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [(row['num_experts'], row['routing']) for row in rows] == [(8, 'trace')] * 2
  chosen = routings.choose('trace', SHAPE._replace(num_tokens=64), 8, 0, trace)
  load = np.bincount(chosen.ravel(), minlength=8)
  assert rows[0]['max_load'] == pytest.approx(load.max() / load.mean())
  for wrong in ('--num_experts=4', '--num_selected_experts=1', f'--data_dir={tmp_path}/none'):
    refused = tiny.command('benchmark', 'dispatch', *SMALL[:3], *flags, wrong)
    refused.assert_error(wrong.partition('=')[0])
  tiny.command('benchmark', 'dispatch', *SMALL, '--routings=trace').assert_error('--workdir')


@pytest.mark.parametrize('package', ['torch', 'transformers'])
def test_peers_name_the_package_that_is_not_installed(package, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', type(sys)('torch'))
  monkeypatch.setitem(sys.modules, package, None)
  result = tiny.command('benchmark', 'dispatch', *SMALL, '--peers')
  result.assert_error('--peers', f'needs the package {package}:')


def test_sweep_prints_a_ratio_for_each_size_of_pack(tmp_path):
  path = tiny.config_file(tmp_path)
  result = tiny.command('benchmark', 'sweep', f'--config={path}', '--num_trials=2,3', '--json')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_trials'] for row in rows] == [2, 3]
  for row in rows:
    assert row['gain']['low'] <= row['gain']['median'] <= row['gain']['high']
    assert row['void'] == (not 0.95 <= row['null']['median'] <= 1.05)
  for flags in (['--num_trials=1'], ['--rounds=3']):
    result = tiny.command('benchmark', 'sweep', f'--config={path}', *flags)
    result.assert_error(flags[0].partition('=')[0])
