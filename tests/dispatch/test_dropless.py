"""The dropless dispatcher against a NumPy simulation: any loads, any sizes, on any mesh."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import dispatch, routing
from moe_jax.dispatch import blocks as blocks_lib
from moe_jax.dispatch import dropless
from moe_jax.parallel.mesh import BATCH_AXES, EXPERT_AXIS, make_mesh

NUM_EXPERTS, WIDTH = 4, 3


def experts(rows, weights, filled=None):
  """One product and one nonlinearity: enough for gradients of everything."""
  return jnp.tanh(jnp.einsum('ecd,edf->ecf', rows, weights))


def layer(mesh, k):
  """Returns (tokens [N D], expert_index [N K], keep, weights, gates [N K]) -> y [N D]."""
  by_token = PartitionSpec(BATCH_AXES)
  alone = ('data',) if mesh.shape['data'] == 1 else ()
  by_expert = PartitionSpec((*alone, EXPERT_AXIS))

  def local(tokens, expert, keep, weights, gates):
    plan = plan_of(expert, keep, gates)
    return dispatch.run_plan(
      'dropless',
      tokens[None],
      plan,
      weights=weights,
      experts=experts,
      axis_name=EXPERT_AXIS,
      num_selected=k,
    )[0]

  specs = (by_token, by_token, by_token, by_expert, by_token)
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=by_token)


def plan_of(expert, keep, gates):
  """One group of all tokens; who is not kept did not ask."""
  size, k = expert.shape
  choice = routing.choose_top_k(
    jnp.zeros((1, size, NUM_EXPERTS)), num_selected_experts=k, renormalize='none'
  )
  choice = choice._replace(expert_index=expert[None], chosen=keep[None], gates=gates[None])
  key = jax.random.split(jax.random.key(0), 1)
  valid = jnp.ones((1, size), bool)
  return routing.make_plan(choice, valid, key, capacity=size, renormalize='none')


def expected(tokens, expert, keep, weights, gates):
  """y_n = sum_k gate tanh(x_n W_e), and by the chain rule the gradients of sum(y c), in float64."""
  tokens, weights, gates = (np.asarray(a, np.float64) for a in (tokens, weights, gates))
  cotangent = np.cos(np.arange(tokens.size)).reshape(tokens.shape)
  y, of_tokens = np.zeros_like(tokens), np.zeros_like(tokens)
  of_weights, of_gates = np.zeros_like(weights), np.zeros_like(gates)
  for n, k in np.ndindex(expert.shape):
    if not keep[n, k]:
      continue
    e = expert[n, k]
    hidden = np.tanh(tokens[n] @ weights[e])
    y[n] += gates[n, k] * hidden
    of_gates[n, k] = hidden @ cotangent[n]
    slope = gates[n, k] * cotangent[n] * (1 - hidden**2)
    of_tokens[n] += weights[e] @ slope
    of_weights[e] += np.outer(tokens[n], slope)
  return y, of_tokens, of_weights, of_gates


def draw(num_tokens, k, probabilities, seed, kept=0.9):
  rng = np.random.default_rng(seed)
  expert = np.stack(
    [rng.choice(NUM_EXPERTS, size=k, replace=False, p=probabilities) for _ in range(num_tokens)]
  )
  return (
    jnp.asarray(rng.normal(size=(num_tokens, WIDTH)), jnp.float32),
    jnp.asarray(expert, jnp.int32),
    jnp.asarray(rng.random((num_tokens, k)) < kept),
    jnp.asarray(rng.normal(size=(NUM_EXPERTS, WIDTH, WIDTH)), jnp.float32),
    jnp.asarray(rng.random((num_tokens, k)), jnp.float32),
  )


def run(mesh, k, arguments):
  """Returns y and the gradients of sum(y c) for tokens, weights and gates."""
  tokens = arguments[0]
  cotangent = jnp.cos(jnp.arange(tokens.size, dtype=jnp.float32)).reshape(tokens.shape)

  def loss(tokens, weights, gates):
    y = layer(mesh, k)(tokens, *arguments[1:3], weights, gates)
    return jnp.sum(y * cotangent), y

  gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, y), gradients = jax.jit(gradient)(tokens, *arguments[3:])
  return y, *gradients


def check(actual, arguments):
  keep = np.asarray(arguments[2])
  for name, one, other in zip(
    ('y', 'tokens', 'weights', 'gates'), actual, expected(*arguments), strict=True
  ):
    one = np.where(keep, one, 0) if name == 'gates' else one
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.fixture
def small_sizes(monkeypatch):
  """Bases, blocks and rounds so small that most rows go through the loops."""

  def set_sizes(base, block, rows):
    sizes = dropless.Sizes(base, block, rows)
    monkeypatch.setattr(dropless, 'sizes_of', lambda *_: sizes)

  return set_sizes


SKEWED = (0.7, 0.1, 0.1, 0.1)
EVEN = (0.25,) * 4


@pytest.mark.parametrize('sizes', [(1, 2, 2), (3, 4, 5), (7, 1, 1)])
@pytest.mark.parametrize(('data', 'expert'), [(1, 1), (1, 4), (2, 2), (2, 4), (4, 1)])
def test_what_is_beyond_the_base_is_computed(data, expert, sizes, small_sizes):
  small_sizes(*sizes)
  arguments = draw(64, 2, SKEWED, seed=0)
  check(run(make_mesh(data, expert), 2, arguments), arguments)


@pytest.mark.parametrize('probabilities', [EVEN, SKEWED])
@pytest.mark.parametrize(('data', 'expert'), [(1, 1), (2, 4)])
def test_its_own_sizes_give_the_same(data, expert, probabilities):
  arguments = draw(128, 2, probabilities, seed=1)
  check(run(make_mesh(data, expert), 2, arguments), arguments)


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
  num_tokens=st.integers(1, 40),
  k=st.integers(1, 4),
  share=st.floats(0.0, 1.0),
  base=st.integers(1, 12),
  block=st.integers(1, 9),
  seed=st.integers(0, 99),
)
def test_any_loads(num_tokens, k, share, base, block, seed):
  sizes = dropless.Sizes(min(base, num_tokens), block, 4)
  probabilities = np.full(4, share / 4) + np.array([1 - share, 0, 0, 0])
  probabilities = np.maximum(probabilities, 1e-6) / np.maximum(probabilities, 1e-6).sum()
  arguments = draw(num_tokens, k, probabilities, seed)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dropless, 'sizes_of', lambda *_: sizes)
    check(run(make_mesh(1, 1), k, arguments), arguments)


def test_one_expert_takes_all_and_none_is_kept(small_sizes):
  small_sizes(2, 4, 4)
  arguments = draw(16, 1, (1.0, 0, 0, 0), seed=2, kept=2)
  check(run(make_mesh(1, 4), 1, arguments), arguments)
  arguments = draw(16, 1, EVEN, seed=2, kept=-1)
  y, *gradients = run(make_mesh(1, 4), 1, arguments)
  assert not y.any() and not any(g.any() for g in gradients)


@pytest.mark.parametrize('lost', ['weights', 'tokens', 'scales'])
@pytest.mark.parametrize('mesh', [(1, 1), (1, 4)])
def test_control_a_gradient_that_is_lost_in_the_loops_is_noticed(
  lost, mesh, small_sizes, monkeypatch
):
  small_sizes(1, 2, 2)
  arguments = draw(32, 2, SKEWED, seed=3)
  right = blocks_lib.backward

  def wrong(gradients, *rest):
    return right(gradients, *rest)._replace(**{lost: getattr(gradients, lost)})

  monkeypatch.setattr(blocks_lib, 'backward', wrong)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    check(run(make_mesh(*mesh), 2, arguments), arguments)


def test_control_a_round_too_few_is_noticed(small_sizes, monkeypatch):
  small_sizes(1, 2, 2)
  arguments = draw(32, 2, SKEWED, seed=3)
  right = dropless._Rounds.__init__

  def wrong(self, *rest):
    right(self, *rest)
    self._num_rounds -= 1

  monkeypatch.setattr(dropless._Rounds, '__init__', wrong)
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    check(run(make_mesh(1, 4), 2, arguments), arguments)


def test_blocks_by_hand():
  # Loads 3, 0, 1 and blocks of 2: expert 0 has blocks (0, 2), (3, -), expert 2 has (4, -); the
  # row 1 goes to no expert. M = 5 marks an empty place.
  expert = jnp.array([0, 3, 0, 0, 2])
  rank = jnp.array([0, 0, 1, 2, 0])
  made = blocks_lib.make_blocks(expert, rank, jnp.array([3, 0, 1]), 2)
  np.testing.assert_array_equal(made.ends, [2, 2, 3])
  np.testing.assert_array_equal(made.items[:3], [[0, 2], [3, 5], [4, 5]])
  assert (made.items[3:] == 5).all()


def test_sizes_by_hand():
  # 4,096 tokens, K = 2, E = 64: mean 128, base 128 + 3 sqrt(128) = 161.9, up to a multiple of 8.
  # A block of 2 sqrt(128) = 22.6 rows, down to a power of 2. A sixteenth of the 8,192 in a round.
  assert dropless.sizes_of(4096, 64, 2, 1) == dropless.Sizes(168, 16, 512)
  # Half a token for each expert: base 0.5 + 3 * 0.71, never more than the tokens there are.
  assert dropless.sizes_of(1, 2, 1, 1).base == 1


def test_memory_does_not_grow_with_the_largest_load():
  # Of C = N slots for each of 4 experts the buffers alone would hold 4 N rows.
  tokens = 4096
  arguments = jax.eval_shape(functools.partial(draw, tokens, 1, EVEN, 0))
  program = jax.jit(functools.partial(run, make_mesh(1, 1), 1)).lower(arguments).compile()
  row = 4 * WIDTH
  assert program.memory_analysis().temp_size_in_bytes < 4 * tokens * 4 * row
