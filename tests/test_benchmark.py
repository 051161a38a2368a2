"""The benchmarks run; no test looks at what they measure, but arms must compute the same."""

import json

import jax
import numpy as np
import pytest

from moe_jax.benchmark import decode, dispatch
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
  for meshes in ('2by4', '4x4'):
    tiny.command('benchmark', 'ep', *flags, f'--meshes={meshes}').assert_error('--meshes')


SHAPE = Shape(12, 8, 4, 2, 6.0, 'swiglu', 'float32')
SMALL = ('--num_tokens=64', '--embed_dim=8', '--mlp_dim=4', '--num_experts=4', '--json')


@pytest.mark.parametrize('name', dispatch.ROUTINGS)
def test_routings_name_different_experts(name):
  chosen = dispatch.choose(name, SHAPE._replace(num_tokens=6000), 6, seed=0)
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
  plan = dispatch.make_plan(SHAPE, 6, dispatch.choose('zipf_1', SHAPE, 6, seed=0))
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
  result = tiny.command('benchmark', 'dispatch', *SMALL, '--routings=zipf_1', '--arms=gather,copy')
  assert result.code == 0, result.err
  rows = [json.loads(line) for line in result.out.splitlines()]
  assert [row['pass'] for row in rows] == ['forward', 'forward+backward']
  for row in rows:
    assert set(row['arms']) | set(row['not_measured']) == {'products', 'gather', 'copy'}
    assert row['arms']['products']['eta_bmm']['median'] == 1
    # 64 tokens, K = 2, factor 1.25: 40 slots of each of 4 experts.
    kept = (1 - row['drop_share']) * 128
    assert kept == pytest.approx((1 - row['padding']) * 160)
    assert row['max_load'] > 1.2 and row['tokens_per_expert'] == 32
  result = tiny.command('benchmark', 'layer', *SMALL)
  assert result.code == 0, result.err
  for row in map(json.loads, result.out.splitlines()):
    assert (1 - row['drop_share']) * 128 == pytest.approx((1 - row['padding']) * 160)
  for flags in (['--routings=luck'], ['--arms=magic'], ['--tokens_per_expert=-1']):
    refused = tiny.command('benchmark', 'dispatch', *SMALL, *flags)
    refused.assert_error(flags[0].partition('=')[0])


def test_arms_of_the_decode_benchmark_compute_the_same():
  plan = decode.plan_of(SHAPE, 6, seed=0)
  assert plan.keep.shape == (12, 1, 2) and bool(plan.keep.all())
  params = expert_weights(jax.random.key(0), SHAPE, 6)
  tokens = jax.random.normal(jax.random.key(1), (12, 1, 8))
  found = [decode.arm_of(arm, SHAPE, 6)(params, tokens, plan) for arm in decode.WAYS]
  for outputs in found[1:]:
    np.testing.assert_allclose(outputs, found[0], rtol=1e-5, atol=1e-6)


def test_decode_prints_the_layer_and_the_model():
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
