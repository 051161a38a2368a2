"""The suites run; no test looks at what they measure, but arms must compute the same.

Flags that are refused are in tests/test_arguments.py.
"""

import importlib
import json
import re
import shlex
import sys
import types

import jax
import numpy as np
import pytest

from moe_jax import cli
from moe_jax.benchmark.harness import peers, routings
from moe_jax.benchmark.harness.cases import expert_weights
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.benchmark.harness.timing import Compiled
from moe_jax.benchmark.suites import decode_rows, dispatch, dispatch_rows, router, router_rows
from tests import tiny

SHAPE = Shape(12, 8, 4, 2, 6.0, 'swiglu', 'float32')
SMALL = ('--embed_dim=8', '--mlp_dim=4')
SUITES = ('decode', 'dispatch', 'ep', 'layer', 'router', 'step', 'sweep')


def rows_of(suite, *flags):
  """Returns the rows that a suite prints for small layers."""
  result = tiny.command('benchmark', suite, *flags, '--json')
  assert result.code == 0, result.err
  return [json.loads(line) for line in result.out.splitlines()]


@pytest.mark.parametrize('name', SUITES)
def test_examples_of_the_help_are_right(name, monkeypatch):
  suite = importlib.import_module(f'moe_jax.benchmark.suites.{name}')
  ran = []
  monkeypatch.setattr(suite, 'run', lambda: ran.append(name))
  examples = re.findall(r'^  .*?python -m moe_jax\.benchmark (.*)$', suite.__doc__, re.MULTILINE)
  for example in examples:
    result = tiny.command('benchmark', *shlex.split(example))
    assert result.code == 0, (example, result.err)
  assert len(examples) >= 2 and ran == [name] * len(examples)


def test_ep_exchanges_the_bytes_of_the_formula():
  flags = ('--num_tokens=128', '--num_experts=8', '--meshes=2x4', '--dtype=bfloat16')
  rows = rows_of('ep', *SMALL, *flags)
  assert [len(row['exchanged_bytes']) for row in rows] == [2, 4]
  for row in rows:
    # 8 groups of 16 tokens, one on each device: 8 experts with ceil(16 x 2 x 1.25 / 8) = 5 slots of
    # 8 numbers of 2 bytes, 3 of 4 parts of which leave the device.
    assert row['formula_bytes'] == 8 * 5 * 8 * 2 * 3 / 4
    assert set(row['exchanged_bytes']) == {row['formula_bytes']}
    # 256 assignments of 320 slots; 32 for each group over 8 experts.
    assert (1 - row['drop_share']) * 256 == pytest.approx((1 - row['padding']) * 320)
    assert row['tokens_per_expert'] == 4 and row['max_load'] > 1
  refused = tiny.command('benchmark', 'ep', *SMALL, '--num_experts=8', '--meshes=4x4')
  refused.assert_error('--meshes', 'need 16 devices')


def test_arms_of_dispatch_compute_the_same(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokamax', types.SimpleNamespace(ragged_dot=jax.lax.ragged_dot))
  # Factor 6 of 6 experts: nothing is dropped, so the arms that drop nothing agree, too.
  plan = dispatch_rows.make_plan(SHAPE, 6, routings.choose('zipf_1', SHAPE, 6, seed=0))
  params = expert_weights(jax.random.key(0), SHAPE, 6)
  tokens = jax.random.normal(jax.random.key(1), (1, 12, 8))
  found = {
    arm: jax.jit(dispatch_rows.layer_of(arm, 'swiglu'))(params, tokens, plan)
    for arm in ('einsum', 'gather', 'dropless', 'ragged_dot', 'tokamax', 'copy')
  }
  assert found.pop('copy').shape == tokens.shape
  for arm, outputs in found.items():
    np.testing.assert_allclose(outputs, found['einsum'], rtol=1e-5, atol=1e-6, err_msg=arm)


@pytest.fixture
def dispatch_in_seconds(monkeypatch):
  """Returns a function that sets the seconds of arms, or their errors, and gives the rows.

  Nothing is compiled; matmuls take a second for each row of an expert.
  """

  def rows(seconds, num_experts, **options):
    compiled = []

    def compile_arm(layer, _, x, *rest, memory=None):
      if isinstance(layer, str):
        compiled.append((layer, x.shape, rest[0].source_index.shape[1]))
        taken = seconds(layer, rest[0].source_index.shape[1])
      else:
        taken = seconds('dense', 0) if x.shape[0] == 1 else float(x.shape[1])
      if isinstance(taken, Exception):
        raise taken
      call = lambda: taken  # noqa: E731
      return Compiled(call, taken, 0.0, 0)

    monkeypatch.setattr(dispatch_rows, 'compile_arm', compile_arm)
    monkeypatch.setattr(dispatch_rows, 'timed', lambda layer, backward: layer)
    monkeypatch.setattr(dispatch_rows, 'layer_of', lambda arm, activation: arm)
    monkeypatch.setattr(
      dispatch_rows,
      'measure',
      lambda arms, rounds, *_: {name: [call()] * rounds for name, call in arms.items()},
    )
    shape = SHAPE._replace(num_tokens=8, capacity_factor=1.25)
    options = {'tokens_per_expert': 0, 'rounds': 9, 'seed': 0, 'routings': ['uniform']} | options
    found = list(dispatch_rows.rows(shape, num_experts=num_experts, **options))
    assert [row['num_experts'] for row in found] == [e for e in num_experts for _ in range(2)]
    return found, compiled

  return rows


def test_dispatch_holds_each_arm_against_its_matmuls(dispatch_in_seconds):
  taken = {'gather': {4: 10.0, 8: 15.0}, 'dropless': {4: 8.0, 8: 8.0}}
  taken['tokamax'] = taken['dropless']
  seconds = lambda arm, experts: 1.0 if arm == 'dense' else taken[arm][experts]  # noqa: E731
  rows, _ = dispatch_in_seconds(seconds, [4, 8], arms=['gather', 'dropless', 'tokamax'])
  # 8 tokens of 2 experts: at E = 4 an expert has 4 rows balanced, and 5 slots by the factor 1.25;
  # at E = 8 it has 2 and 3. Fraction of its own matmuls and of balanced ones, and by how much more
  # than those the arm grew: 15 / 10 over 3 / 5 and 2 / 4, 8 / 8 over 2 / 4.
  gather = {4: (5 / 10, 1, 4 / 10, 1), 8: (3 / 15, 2.5, 2 / 15, 3)}
  dropless = {4: (4 / 8, 1, 4 / 8, 1), 8: (2 / 8, 2, 2 / 8, 2)}
  for row in rows:
    for name, wanted in (('gather', gather), ('dropless', dropless), ('tokamax', dropless)):
      arm = row['arms'][name]
      found = arm['eta_bmm']['median'], arm['excess']
      found += arm['eta_balanced']['median'], arm['excess_balanced']
      assert found == pytest.approx(wanted[row['num_experts']]), (name, row['num_experts'])
    assert row['arms']['products']['eta_bmm']['median'] == 1
    assert row['arms']['balanced']['eta_bmm']['median'] == 1


def test_an_arm_that_is_too_slow_is_not_tried_with_more_experts(dispatch_in_seconds):
  # Over 20 times the dense layer: not the arm that takes 20 times as long.
  taken = {'dense': 1.0, 'gather': 30.0, 'einsum': 20.0}
  rows, compiled = dispatch_in_seconds(lambda arm, _: taken[arm], [2, 4], arms=['gather', 'einsum'])
  for row in rows:
    assert row['not_measured'] == {'gather': '30 times the dense layer at E=2'}
    assert 'einsum' in row['arms'] and 'gather' not in row['arms']
  assert [experts for arm, _, experts in compiled if arm == 'gather'] == [2, 2]
  # Nothing is slow that takes less than half a second.
  taken |= {'dense': 0.001, 'gather': 0.4}
  rows, _ = dispatch_in_seconds(lambda arm, _: taken[arm], [2], arms=['gather'])
  assert not any(row['not_measured'] for row in rows)


def test_an_arm_or_peer_that_memory_is_too_small_for_is_left_out(dispatch_in_seconds, monkeypatch):
  class OutOfMemoryError(RuntimeError):
    """As torch has it."""

  def no_memory(*_):
    raise OutOfMemoryError('CUDA out of memory.')

  monkeypatch.setattr(peers, 'arms', no_memory)
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.')
  seconds = lambda arm, _: error if arm == 'ragged_dot' else 1.0  # noqa: E731
  arms = ['ragged_dot', 'gather']
  rows, _ = dispatch_in_seconds(seconds, [2, 4], arms=arms, peers=True)
  for row in rows:
    missing = dict.fromkeys(('ragged_dot', peers.GROUPED), 'out of memory at E=2')
    assert row['not_measured'] == missing and row['peers'] is None
    assert 'gather' in row['arms'] and 'ragged_dot' not in row['arms']
  broken = jax.errors.JaxRuntimeError('INTERNAL: broken')
  with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
    dispatch_in_seconds(lambda arm, _: 1.0 if arm == 'dense' else broken, [2], arms=arms)


def test_dispatch_prints_both_matmuls_and_both_excesses():
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
  found = re.findall(r'(dense/arm|matmuls/arm|balanced/arm|excess) (\d\.\d\d)', dispatch.line(row))
  assert found == [
    ('dense/arm', '1.11'),
    ('matmuls/arm', '1.22'),
    ('excess', '1.33'),
    ('balanced/arm', '1.44'),
    ('excess', '1.55'),
  ]


def test_dispatch_under_the_routing_of_a_run(tmp_path, text):
  overrides = {'mesh.data': 1, 'mesh.expert': 1, 'train.num_steps': 1, 'train.checkpoint_every': 1}
  path = tiny.config_file(tmp_path, {**text, **overrides})
  workdir = tmp_path / 'run'
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  assert result.code == 0, result.err
  trace = routings.record(str(workdir), 300)
  assert trace.expert_index.shape[0] >= 300 and (trace.num_experts, trace.step) == (8, 1)
  assert np.all(trace.expert_index[:, 0] != trace.expert_index[:, 1])
  flags = ('--num_tokens=64', '--routings=trace', f'--workdir={workdir}')
  rows = rows_of('dispatch', *SMALL, *flags, '--arms=gather,ragged_dot')
  assert [row['pass'] for row in rows] == ['forward', 'forward+backward']
  chosen = routings.choose('trace', SHAPE._replace(num_tokens=64), 8, 0, trace)
  load = np.bincount(chosen.ravel(), minlength=8)
  for row in rows:
    assert (row['num_experts'], row['routing']) == (8, 'trace')
    measured = set(row['arms']) | set(row['not_measured'])
    assert measured == {'products', 'balanced', 'gather', 'ragged_dot'}
    # 64 tokens, K = 2, factor 1.25: 20 slots of each of 8 experts.
    kept = (1 - row['drop_share']) * 128
    assert kept == pytest.approx((1 - row['padding']) * 160)
    assert row['max_load'] == pytest.approx(load.max() / load.mean())
  refused = tiny.command('benchmark', 'dispatch', *flags, f'--data_dir={tmp_path}/none')
  refused.assert_error('--data_dir')


def test_no_memory_for_the_references_is_one_line(monkeypatch):
  def too_large(*_, **__):
    raise jax.errors.JaxRuntimeError('INTERNAL: Error: Out of memory allocating 17179869184 bytes.')

  monkeypatch.setattr(dispatch_rows, 'dense_weights', too_large)
  flags = (*SMALL, '--num_tokens=8', '--num_experts=4', '--routings=uniform')
  result = tiny.command('benchmark', 'dispatch', *flags)
  result.assert_error("benchmark='dispatch'", 'not enough memory', '17179869184 bytes')


def test_packages_that_are_not_installed_are_missed_before_anything_is_measured(monkeypatch):
  monkeypatch.setattr(dispatch_rows, 'rows', lambda *_, **__: pytest.fail('measured'))
  monkeypatch.setitem(sys.modules, 'torch', None)
  monkeypatch.setitem(sys.modules, 'tokamax', None)
  for flag in ('--peers', '--arms=gather,tokamax'):
    refused = tiny.command('benchmark', 'dispatch', flag)
    refused.assert_error(flag.partition('=')[0], 'needs the package')


def test_the_reader_of_the_rows_may_leave(monkeypatch):
  def leave(_):
    raise BrokenPipeError

  left = []
  monkeypatch.setattr(router_rows, 'rows', lambda **_: [{}])
  monkeypatch.setattr(router, 'line', lambda _: 'a line')
  monkeypatch.setattr(cli, 'end_of_reading', lambda: left.append(True))
  monkeypatch.setattr('builtins.print', lambda *_, **__: leave(_))
  result = tiny.command('benchmark', 'router')
  assert result.code == 0 and left, result.err


def test_arms_of_decode_compute_the_same():
  plan = decode_rows.plan_of(SHAPE, 6, seed=0)
  assert plan.keep.shape == (12, 1, 2) and bool(plan.keep.all())
  params = expert_weights(jax.random.key(0), SHAPE, 6)
  tokens = jax.random.normal(jax.random.key(1), (12, 1, 8))
  arms = decode_rows.IMPLEMENTATIONS
  found = [jax.jit(decode_rows.arm_of(arm, SHAPE, 6))(params, tokens, plan) for arm in arms]
  for arm, outputs in zip(arms[1:], found[1:], strict=True):
    np.testing.assert_allclose(outputs, found[0], rtol=1e-5, atol=1e-6, err_msg=arm)


def test_decode_prints_the_layer_and_the_model(monkeypatch):
  monkeypatch.setattr(decode_rows, 'LEAST_SECONDS', 0.001)
  rows = rows_of('decode', *SMALL, '--num_experts=8', '--num_layers=1', '--batches=8')
  assert [(row['level'], row['batch'], row['rows_in_block']) for row in rows] == [
    ('layer', 8, 4),
    ('model', 8, 4),
  ]
  for row in rows:
    assert row['void'] == (not 0.95 <= row['null']['median'] <= 1.05)
    assert all(arm['tokens_per_second'] > 0 for arm in row['arms'].values())
  assert set(rows[1]['arms']) == {'dense', 'decode', 'slots'}
  layer = rows[0]['arms']
  of_expert = 3 * 8 * 4 * 4
  assert layer['slots']['weight_bytes'] == 8 * of_expert
  assert layer['one_by_one']['weight_bytes'] == 16 * of_expert
  # 16 assignments to 8 experts in blocks of 4 rows.
  plan = decode_rows.plan_of(SHAPE._replace(num_tokens=8), 8, 0)
  loads = np.bincount(plan.expert_index.ravel())
  assert layer['grouped']['weight_bytes'] == sum(-(-load // 4) for load in loads) * of_expert
  assert rows[0]['experts_chosen'] == np.count_nonzero(loads)


def test_layer_keeps_tokens_per_expert_and_holds_itself_against_its_first_row():
  flags = ('--num_experts=4,8', '--tokens_per_expert=16', '--num_groups=4', '--reuse_memory')
  rows = rows_of('layer', *SMALL, *flags)
  assert [(row['num_tokens'], row['num_groups']) for row in rows] == [(32, 4)] * 2 + [(64, 4)] * 2
  for row, first in zip(rows, (*rows[:2], *rows[:2]), strict=True):
    assert row['tokens_per_expert'] == 16
    # At E = 4 (8) 4 groups of 8 (16) tokens, K = 2, factor 1.25: 5 slots of each expert in each.
    kept = (1 - row['drop_share']) * 16 * row['num_experts']
    assert kept == pytest.approx((1 - row['padding']) * 4 * 5 * row['num_experts'])
    for excess, eta in (('excess', 'eta_bmm'), ('excess_batched', 'eta_batched')):
      assert row[excess] == pytest.approx(first[eta]['median'] / row[eta]['median'])
  refused = tiny.command('benchmark', 'layer', *SMALL, '--num_tokens=64', '--num_groups=5')
  refused.assert_error('--num_groups=5', 'must divide 64 tokens')


def test_router_holds_load_and_choices_in_bfloat16():
  flags = ('--routers=top_k,round_robin,soft', '--router_dtype=bfloat16', '--num_tokens=2048')
  rows = rows_of('router', *SMALL, *flags, '--num_experts=4')
  top_k, round_robin, soft = rows
  assert [row['router'] for row in rows] == ['top_k', 'round_robin', 'soft']
  # 4,096 assignments to 4 experts with 1,280 slots each.
  even = {'tokens_per_expert': 1024, 'max_load': 1, 'drop_share': 0, 'padding': 0.2}
  assert {name: round_robin[name] for name in even} == pytest.approx(even)
  assert top_k['tokens_per_expert'] == 1024 and top_k['max_load'] > 1
  assert 0 < top_k['disagreement'] < 0.2 and round_robin['disagreement'] == 0
  assert soft['max_load'] is None and soft['disagreement'] is None


def small_config(tmp_path, text):
  """Writes a config of one layer on one device and returns its path."""
  overrides = {'mesh.data': 1, 'mesh.expert': 1, 'model.num_layers': 1}
  return tiny.config_file(tmp_path, {**text, **overrides})


def test_step_splits_its_time(tmp_path, text):
  flags = (f'--config={small_config(tmp_path, text)}', '--steps=3')
  result = tiny.command('benchmark', 'step', *flags)
  assert result.code == 0, result.err
  device, *parts = result.out.splitlines()
  assert device.startswith('on ')
  shares = [float(line.split()[1].rstrip('%')) for line in parts[:3]]
  assert [line.split()[0] for line in parts[:3]] == ['forward', 'backward', 'optimizer']
  assert sum(shares) == pytest.approx(100, abs=0.2)
  assert parts[3].startswith('data wait') and parts[3].endswith('of 3 real steps')
  assert parts[4] == 'compilations of the step: 1'


def test_sweep_prints_a_ratio_for_each_size_of_pack(tmp_path, text):
  (row,) = rows_of('sweep', f'--config={small_config(tmp_path, text)}', '--num_trials=2')
  assert row['num_trials'] == 2
  assert row['gain']['low'] <= row['gain']['median'] <= row['gain']['high']
  assert row['void'] == (not 0.95 <= row['null']['median'] <= 1.05)
