"""The parts that the suites of `moe_jax.benchmark` share."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.benchmark.harness import cases, names, parsers, peers, routings, tables, timing
from moe_jax.benchmark.harness.shape import Shape, with_tokens_per_expert
from moe_jax.errors import UserError

SHAPE = Shape(12, 8, 4, 2, 6.0, 'swiglu', 'float32')


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


def test_a_trace_fits_its_model_alone():
  trace = routings.Trace(np.array([[0, 1], [2, 3], [1, 0]], np.int32), 4, layer=0, step=6)
  shape = SHAPE._replace(num_tokens=2)
  chosen = functools.partial(routings.choose, 'trace', seed=0)
  np.testing.assert_array_equal(chosen(shape, 4, trace=trace), [[0, 1], [2, 3]])
  for wrong, num_experts, flag in (
    ({}, 8, '--num_experts=8'),
    ({'num_selected_experts': 1}, 4, '--num_selected_experts=1'),
    ({'num_tokens': 4}, 4, '--num_tokens=4'),
  ):
    with pytest.raises(UserError, match=f'^{flag}: '):
      chosen(shape._replace(**wrong), num_experts, trace=trace)


def test_experts_of_the_benchmark_differ_and_keep_the_scale_of_their_inputs():
  params = cases.expert_weights(jax.random.key(0), SHAPE._replace(embed_dim=256, mlp_dim=64), 6)
  for weights, width in ((params.w_in, 256), (params.w_out, 64)):
    assert len({float(expert[0, 0]) for expert in weights}) == 6
    np.testing.assert_allclose(np.std(weights, axis=(1, 2)), width**-0.5, rtol=0.05)


def test_the_load_of_a_row_by_hand():
  # 12 assignments to 3 experts; 9 of them in 4 slots each.
  found = cases.load_statistics([6, 4, 2], kept=9, slots=12)
  assert found == {'tokens_per_expert': 4, 'max_load': 1.5, 'drop_share': 0.25, 'padding': 0.25}
  assert cases.load_statistics([6, 4, 2], kept=12, slots=None)['padding'] is None
  # Matmuls / arm went from 0.8 to 0.4: the arm's time grew twice as much as theirs.
  assert cases.excess(0.4, first_eta_bmm=0.8) == 2.0


def test_tokens_may_grow_with_the_experts():
  assert with_tokens_per_expert(SHAPE, 0, 64) == SHAPE
  # 64 experts with 16 tokens each, of 2 experts a token.
  assert with_tokens_per_expert(SHAPE, 16, 64).num_tokens == 512


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


def test_ratios_are_medians_with_quartiles_and_an_invalid_row_is_marked():
  ratio = timing.ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
  assert ratio == (2.0, 1.5, 2.5) and str(ratio) == '2.00 [1.50, 2.50]'
  for median, invalid in ((0.94, True), (0.95, False), (1.05, False), (1.06, True)):
    assert timing.is_invalid(tables.Ratio(median, 1, 1)) == invalid
  assert 'INVALID' in tables.invalid({'void': True}) and not tables.invalid({'void': False})


@pytest.mark.parametrize(
  ('parser', 'text', 'values'),
  [
    (parsers.numbers(2), '2,16', [2, 16]),
    (parsers.numbers(2), '1', 'must be numbers >= 2'),
    (parsers.numbers(2), '2,x', 'must be numbers >= 2'),
    (parsers.numbers(2), '', 'must be numbers >= 2'),
    (parsers.numbers(2), '4,8,04', 'names 4 more than once'),
    (parsers.names(names.ROUTINGS), 'trace,uniform', ['trace', 'uniform']),
    (parsers.names(names.ROUTINGS), 'unifrom', 'trace; did you mean uniform'),
    (parsers.PositiveNumber(), '1.25', 1.25),
    (parsers.PositiveNumber(), 'nan', 'above 0 and finite'),
  ],
)
def test_values_of_flags(parser, text, values):
  if not isinstance(values, str):
    assert parser.parse(text) == values
    return
  with pytest.raises(ValueError, match=values):
    parser.parse(text)


@pytest.mark.parametrize('package', ['torch', 'transformers', 'tokamax'])
def test_a_package_that_is_not_installed_is_named(package, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', type(sys)('torch'))
  monkeypatch.setitem(sys.modules, package, None)
  flag = '--arms' if package == 'tokamax' else '--peers'
  with pytest.raises(UserError, match=f'^{flag}=.*needs the package.* {package}$'):
    peers.tokamax_ragged_dot() if package == 'tokamax' else peers.libraries()
