"""The benchmarks run; no test looks at what they measure, but arms must compute the same."""

import json
import sys

import jax
import numpy as np
import pytest

from moe_jax.benchmark import dispatch, routings
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


@pytest.mark.parametrize('name', routings.DRAWN)
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
  result = tiny.command('benchmark', 'dispatch', *SMALL, *flags)
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
  for flags in (['--routings=luck'], ['--arms=magic'], ['--tokens_per_expert=-1']):
    refused = tiny.command('benchmark', 'dispatch', *SMALL, *flags)
    refused.assert_error(flags[0].partition('=')[0])


def test_layer_keeps_tokens_per_expert_and_says_how_much_more_it_grows_than_its_products():
  flags = ('--num_experts=4,8', '--tokens_per_expert=16')
  result = tiny.command('benchmark', 'layer', *SMALL, *flags)
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['num_tokens'] for row in rows] == [32, 32, 64, 64]
  for row, first in zip(rows, (*rows[:2], *rows[:2]), strict=True):
    assert row['tokens_per_expert'] == 16
    slots = 20 * row['num_experts']
    assert (1 - row['drop_share']) * 16 * row['num_experts'] == pytest.approx(
      (1 - row['padding']) * slots
    )
    grown = first['eta_bmm']['median'] / row['eta_bmm']['median']
    assert row['excess'] == pytest.approx(grown)


def test_router_says_what_it_asks_of_the_experts():
  flags = ('--num_experts=4', '--routers=top_k,round_robin,soft', *SMALL)
  result = tiny.command('benchmark', 'router', *flags)
  assert result.code == 0, result.err
  rows = {row['router']: row for row in map(json.loads, result.out.splitlines())}
  even = {'tokens_per_expert': 32, 'max_load': 1, 'drop_share': 0, 'padding': 1 - 128 / 160}
  assert {name: rows['round_robin'][name] for name in even} == pytest.approx(even)
  assert rows['top_k']['tokens_per_expert'] == 32 and rows['top_k']['max_load'] > 1
  assert rows['soft']['max_load'] is None


def test_an_arm_that_is_too_slow_is_not_tried_with_more_experts(monkeypatch):
  monkeypatch.setattr(dispatch, 'SLOWEST', 0.0)
  shape = SHAPE._replace(num_tokens=8)
  options = {'routings': ['uniform'], 'tokens_per_expert': 0, 'rounds': 9, 'seed': 0}
  rows = [
    row['not_measured']['gather']
    for row in dispatch.rows(shape, num_experts=[2, 4], arms=['gather'], **options)
  ]
  assert all(why.endswith('times the dense layer at E=2') for why in rows)
  assert rows[:2] == rows[2:]


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
  for wrong in ('--num_experts=4', '--num_selected_experts=1'):
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
