"""Nearest centroids and how they move, against loops in float64."""

import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.routing.router import RouterInputs
from moe_jax.routing.routers import kmeans
from moe_jax.routing.routers.kmeans import Options
from tests import oracle

choose = jax.jit(kmeans.choose, static_argnums=3)

# Groups, tokens, experts, selected experts.
SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (2, 5, 5, 5), (2, 8, 6, 1)]
DIM = 4


def run_update(state, own, options):
  return kmeans.update(state, types.SimpleNamespace(own=own), options)


update = jax.jit(run_update, static_argnums=2)


def inputs_of(tokens, valid=None):
  groups, size, _ = tokens.shape
  return RouterInputs(
    tokens=jnp.asarray(tokens, jnp.float32),
    valid=jnp.ones((groups, size), bool) if valid is None else jnp.asarray(valid),
    token_ids=jnp.zeros((groups, size), jnp.int32),
    positions=jnp.zeros((groups, size), jnp.int32),
    keys=jax.random.split(jax.random.key(0), groups),
  )


def unit(vector):
  return np.asarray(vector) / np.sqrt(np.sum(np.square(vector)))


def state_of(centroids):
  zeros = jnp.zeros(len(centroids))
  return {
    'centroids': jnp.asarray(centroids, jnp.float32),
    'counts': zeros,
    'empty_steps': zeros,
  }


def layer_norm(token):
  mean = sum(token) / DIM
  variance = sum((value - mean) ** 2 for value in token) / DIM
  return np.array([(value - mean) / np.sqrt(variance + 1e-6) for value in token])


def choose_oracle(token, centroids, k, temperature):
  """Products, chosen experts and gates of one token."""
  x_hat = layer_norm(token)
  similarity = np.array([sum(x_hat[d] * mu[d] for d in range(DIM)) for mu in centroids])
  chosen = oracle.top_k(similarity, k)
  return similarity, chosen, oracle.softmax(similarity[chosen] / temperature)


@hypothesis.given(st.integers(0, 1000), st.sampled_from(SHAPES), st.sampled_from([1.0, 0.25]))
def test_choice_matches_the_oracle(seed, shape, temperature):
  rng = np.random.default_rng(seed)
  groups, size, num_experts, k = shape
  tokens = rng.normal(size=(groups, size, DIM)).astype(np.float32)
  # Tokens without a direction are as near to one centroid as to any; so are equal centroids.
  tokens[rng.random((groups, size)) < 0.2] = 2.0
  directions = np.array([unit(row) for row in rng.normal(size=(3, DIM))], np.float32)
  centroids = directions[rng.integers(0, 3, num_experts)]
  valid = rng.random((groups, size)) < 0.7
  options = Options(num_experts, k, kmeans_temperature=temperature)
  choice = choose({}, state_of(centroids), inputs_of(tokens, valid), options)
  assert choice.chosen.all()
  for g in range(groups):
    batch_sum, count = np.zeros((num_experts, DIM)), np.zeros(num_experts)
    for s in range(size):
      token = tokens[g, s].astype(np.float64)
      similarity, chosen, gates = choose_oracle(token, centroids, k, temperature)
      np.testing.assert_array_equal(choice.expert_index[g, s], chosen)
      np.testing.assert_allclose(choice.gates[g, s], gates, rtol=1e-4)
      np.testing.assert_allclose(
        choice.router_probs[g, s], oracle.softmax(similarity / temperature), rtol=1e-4
      )
      np.testing.assert_allclose(
        choice.router_logits[g, s], similarity / temperature, rtol=1e-4, atol=1e-5
      )
      for e in chosen:
        batch_sum[e] += layer_norm(token) * valid[g, s]
        count[e] += valid[g, s]
    np.testing.assert_allclose(choice.sums['centroid_sum'][g], batch_sum, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(choice.sums['centroid_count'][g], count)


def test_choice_by_hand():
  # (1, 3, 1, 3): mean 2, standard deviation 1, x_hat = (-1, 1, -1, 1), up to the 1e-6. Products
  # with (0, 1, 0, 0), (0, 0, 1, 0), (0, .6, 0, .8): 1, -1, 1.4. Gates e^1.4 and e^1: e^.4 to 1.
  centroids = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0.6, 0, 0.8]])
  choice = kmeans.choose(
    {}, state_of(centroids), inputs_of(np.array([[[1.0, 3, 1, 3]]])), Options(3, 2)
  )
  np.testing.assert_allclose(choice.router_logits[0, 0], [1, -1, 1.4], rtol=1e-5)
  np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 0])
  np.testing.assert_allclose(choice.gates[0, 0], [np.exp(0.4), 1] / (1 + np.exp(0.4)), rtol=1e-5)


def test_the_best_product_is_the_nearest_centroid():
  rng = np.random.default_rng(5)
  tokens = rng.normal(size=(1, 8, DIM))
  centroids = kmeans.new_state(Options(6, 1), DIM, 10)['centroids']
  np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
  choice = choose({}, state_of(centroids), inputs_of(tokens), Options(6, 1))
  for s in range(8):
    distances = [np.linalg.norm(layer_norm(tokens[0, s]) - mu) for mu in np.asarray(centroids)]
    assert choice.expert_index[0, s, 0] == np.argmin(distances)
  np.testing.assert_array_equal(choice.gates, 1)


def update_oracle(state, batch_sum, count, options, directions):
  """One expert at a time; `directions` are where re-seeded centroids go, a fixed table."""
  new = {name: np.array(value, np.float64) for name, value in state.items()}
  if sum(count) == 0:
    return new
  for e, tokens in enumerate(count):
    new['counts'][e] += tokens
    if tokens == 0:
      new['empty_steps'][e] += 1
      continue
    new['empty_steps'][e] = 0
    mean, old = batch_sum[e] / tokens, new['centroids'][e]
    if options.kmeans_update == 'ema':
      moved = options.kmeans_decay * old + (1 - options.kmeans_decay) * mean
    else:
      rate = tokens / new['counts'][e]
      moved = (1 - rate) * old + rate * mean
    new['centroids'][e] = unit(moved)
  fullest = new['centroids'][int(np.argmax(count))].copy()
  for e in range(len(count)):
    if new['empty_steps'][e] >= options.kmeans_reseed_after:
      new['centroids'][e] = unit(fullest + 0.1 * directions[e])
      new['counts'][e] = new['empty_steps'][e] = 0
  return new


@pytest.mark.parametrize('rule', kmeans.UPDATES)
def test_update_matches_the_oracle_over_many_steps(rule):
  rng = np.random.default_rng(0)
  options = Options(4, 1, kmeans_update=rule, kmeans_decay=0.9, kmeans_reseed_after=3)
  directions = np.asarray(kmeans._unit_directions(kmeans.RESEED_SEED, 4, DIM))
  state = kmeans.new_state(options, DIM, 10)
  expected, reseeded = {name: np.array(value, np.float64) for name, value in state.items()}, 0
  for step in range(28):
    # Expert 3 starves for 5 steps of 7, expert 1 now and then; two steps are of padding alone.
    count = rng.integers(1, 6, 4) * [1, step % 3 > 0, 1, step % 7 < 2] * (step not in (4, 5))
    batch_sum = rng.normal(size=(4, DIM)) * count[:, None]
    own = {
      'centroid_sum': jnp.asarray(batch_sum, jnp.float32),
      'centroid_count': jnp.float32(count),
    }
    state = update(state, own, options)
    reseeded += expected['empty_steps'][3] == 2 and count.any() and count[3] == 0
    expected = update_oracle(expected, batch_sum, count, options, directions)
    for name in expected:
      np.testing.assert_allclose(state[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
  assert reseeded == 4


def test_updates_by_hand():
  # One expert at (1, 0, 0, 0), two tokens that add up to (0, 4, 0, 0): their mean is (0, 2, 0, 0).
  own = {'centroid_sum': jnp.array([[0.0, 4, 0, 0]]), 'centroid_count': jnp.array([2.0])}
  # Decay 3/4: (.75, .5, 0, 0), of length sqrt(13) / 4: (3, 2, 0, 0) / sqrt(13).
  options = Options(1, 1, kmeans_decay=0.75)
  state = update(state_of([[1.0, 0, 0, 0]]), own, options)
  np.testing.assert_allclose(state['centroids'][0], [3 / 13**0.5, 2 / 13**0.5, 0, 0], rtol=1e-6)
  # 6 tokens before, 2 now: rate 1/4, the same. Without any before: rate 1, on the mean itself.
  options = Options(1, 1, kmeans_update='minibatch')
  start = {**state_of([[1.0, 0, 0, 0]]), 'counts': jnp.array([6.0])}
  state = update(start, own, options)
  np.testing.assert_allclose(state['centroids'][0], [3 / 13**0.5, 2 / 13**0.5, 0, 0], rtol=1e-6)
  assert state['counts'][0] == 8
  state = update(state_of([[1.0, 0, 0, 0]]), own, options)
  np.testing.assert_allclose(state['centroids'][0], [0, 1, 0, 0], atol=1e-7)


def test_a_mean_that_cancels_the_centroid_leaves_it():
  # Half of (1, 0, 0, 0) and half of (-1, 0, 0, 0) have no direction.
  own = {'centroid_sum': jnp.array([[-3.0, 0, 0, 0]]), 'centroid_count': jnp.array([3.0])}
  state = update(state_of([[1.0, 0, 0, 0]]), own, Options(1, 1, kmeans_decay=0.5))
  np.testing.assert_array_equal(state['centroids'][0], [1, 0, 0, 0])


def test_reseeded_centroids_are_near_the_fullest_and_not_at_one_point():
  options = Options(4, 1, kmeans_reseed_after=1, kmeans_decay=0.0)
  own = {
    'centroid_sum': jnp.zeros((4, DIM)).at[2, 0].set(5.0),
    'centroid_count': jnp.array([0.0, 0, 5, 0]),
  }
  centroids = update(kmeans.new_state(options, DIM, 10), own, options)['centroids']
  np.testing.assert_allclose(centroids[2], [1, 0, 0, 0], atol=1e-6)
  # An offset of 0.1 turns by at most asin(0.1).
  assert (centroids @ centroids[2]).min() >= np.sqrt(1 - 0.01) - 1e-6
  for one, other in [(0, 1), (0, 3), (1, 3)]:
    assert np.linalg.norm(centroids[one] - centroids[other]) > 0.01


@pytest.mark.parametrize('rule', kmeans.UPDATES)
def test_finds_the_clusters_of_the_tokens(rule):
  """Four clusters, four centroids that all begin in one corner: each ends with a cluster."""
  rng = np.random.default_rng(0)
  centers = np.array([layer_norm(row) for row in 3 * np.eye(DIM)])
  labels = np.arange(32) % 4
  options = Options(4, 1, kmeans_update=rule, kmeans_decay=0.9, kmeans_reseed_after=5)
  corner = np.array([unit(centers[0] + 0.01 * rng.normal(size=DIM)) for _ in range(4)])
  state, best = state_of(corner), []
  for _ in range(60):
    tokens = centers[labels] + 0.1 * rng.normal(size=(32, DIM))
    choice = choose({}, state, inputs_of(tokens[None]), options)
    best.append(float(jnp.mean(jnp.max(choice.router_logits, axis=-1))))
    own = {name: value[0] for name, value in choice.sums.items()}
    state = update(state, own, options)
  by_cluster = [set(np.asarray(choice.expert_index)[0, labels == i, 0]) for i in range(4)]
  assert [len(experts) for experts in by_cluster] == [1, 1, 1, 1]
  assert len(set.union(*by_cluster)) == 4
  # x_hat has length 2, a centroid 1: the product is 2 at best.
  assert best[0] < 1
  assert best[-1] > 1.95


def test_gradient_of_the_gates_reaches_the_token_and_not_the_centroids():
  rng = np.random.default_rng(0)
  tokens, direction = rng.normal(size=(2, 1, 5, DIM)).astype(np.float32).astype(np.float64)
  centroids = np.array([unit(row) for row in rng.normal(size=(6, DIM))])
  cotangent = rng.normal(size=(5, 3))
  options = Options(6, 3, kmeans_temperature=0.5)

  def gates(tokens, state):
    choice = kmeans.choose({}, state, inputs_of(tokens), options)
    # The sums must be constants: they are no loss.
    own = sum(jnp.sum(jnp.square(value)) for value in choice.sums.values())
    return jnp.sum(choice.gates[0] * jnp.asarray(cotangent, jnp.float32)) + own

  def expected(tokens):
    rows = [choose_oracle(token, centroids, 3, 0.5)[2] for token in tokens[0]]
    return np.sum(np.array(rows) * cotangent)

  of_tokens, of_state = jax.jit(jax.grad(gates, argnums=(0, 1)))(
    jnp.asarray(tokens, jnp.float32), state_of(centroids)
  )
  slope = np.sum(np.asarray(of_tokens) * direction)
  np.testing.assert_allclose(slope, oracle.central_difference(expected, tokens, direction), 1e-3)
  np.testing.assert_array_equal(of_state['centroids'], 0)


@pytest.mark.parametrize('case', ['equal', 'collapse', 'all_experts', 'one_token', 'padding'])
def test_degenerate_inputs_stay_finite(case):
  rng = np.random.default_rng(0)
  tokens = rng.normal(size=(1, 1 if case == 'one_token' else 3, DIM))
  if case == 'equal':
    tokens[:] = 1.0
  if case == 'collapse':
    tokens[:] = [[1e4, 0, 0, 0]]
  valid = np.full(tokens.shape[:2], case != 'padding')
  options = Options(4, 4 if case == 'all_experts' else 2, kmeans_reseed_after=1)
  state = kmeans.new_state(options, DIM, 10)

  def total(tokens):
    choice = kmeans.choose({}, state, inputs_of(tokens, valid), options)
    return jnp.sum(jnp.square(choice.gates)) + jnp.sum(jnp.square(choice.router_probs)), choice

  gradient, choice = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(tokens, jnp.float32))
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(np.sum(choice.gates, axis=-1), 1, rtol=1e-6)
  if case == 'equal':
    np.testing.assert_array_equal(choice.expert_index[0], 3 * [[0, 1]])
  new = update(state, {name: value[0] for name, value in choice.sums.items()}, options)
  for value in new.values():
    assert np.isfinite(value).all()
  if case == 'padding':
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_a_token_that_is_no_number_still_names_experts():
  tokens = np.array([[[np.nan] * DIM, [np.inf, 0, 0, 0], [3e38, -3e38, 0, 0], [1, 2, 3, 4]]])
  options = Options(4, 2)
  choice = choose({}, kmeans.new_state(options, DIM, 10), inputs_of(tokens), options)
  assert choice.expert_index.min() >= 0
  assert choice.expert_index.max() < 4
  assert np.isfinite(choice.gates[0, 3]).all()


def test_padding_and_later_tokens_change_nothing():
  rng = np.random.default_rng(1)
  options = Options(4, 2)
  tokens, state = rng.normal(size=(1, 7, DIM)), kmeans.new_state(options, DIM, 10)
  valid = np.arange(7)[None] < 4
  changed = np.where(valid[..., None], tokens, np.nan)
  choice = choose({}, state, inputs_of(tokens, valid), options)
  other = choose({}, state, inputs_of(changed, valid), options)
  jax.tree.map(np.testing.assert_array_equal, choice.sums, other.sums)
  np.testing.assert_array_equal(choice.expert_index[:, :4], other.expert_index[:, :4])
  np.testing.assert_array_equal(choice.gates[:, :4], other.gates[:, :4])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('kmeans_update', 'lloyd'),
    ('kmeans_decay', 1.0),
    ('kmeans_temperature', 0.0),
    ('kmeans_reseed_after', 0),
  ],
)
def test_names_the_bad_option(field, value):
  assert kmeans.ROUTER.allowed(Options(4, 1)) is None
  assert kmeans.ROUTER.allowed(Options(4, 1, **{field: value}))[0] == field
