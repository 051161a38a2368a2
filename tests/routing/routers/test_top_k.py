"""Selection and gates against the oracle, ties included."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import routing
from tests import oracle
from tests.routing.routers import biased


@st.composite
def logits_and_k(draw):
  """Logits from a coarse grid, so that ties are the rule; T as odd as it comes."""
  num_experts = draw(st.integers(1, 6))
  num_tokens = draw(st.sampled_from([1, 3, max(1, num_experts - 1), 5]))
  values = st.integers(-3, 3) if draw(st.booleans()) else st.just(draw(st.integers(-2, 2)))
  rows = [[draw(values) / 2 for _ in range(num_experts)] for _ in range(num_tokens)]
  return np.array([rows], np.float32), draw(st.integers(1, num_experts))


@hypothesis.given(
  logits_and_k(),
  st.sampled_from(routing.SOFTMAX_ORDERS),
  st.sampled_from(routing.RENORMALIZATIONS),
)
def test_matches_the_oracle(drawn, softmax_order, renormalize):
  logits, k = drawn
  choice = routing.choose_top_k(
    jnp.asarray(logits),
    num_selected_experts=k,
    softmax_order=softmax_order,
    renormalize=renormalize,
  )
  for s, row in enumerate(logits[0]):
    chosen = oracle.top_k(row, k)
    np.testing.assert_array_equal(choice.expert_index[0, s], chosen)
    expected = oracle.gates(row, chosen, softmax_order, renormalize)
    np.testing.assert_allclose(choice.gates[0, s], expected, rtol=2e-6)
    np.testing.assert_allclose(choice.router_probs[0, s], oracle.softmax(row), rtol=2e-6)


def test_by_hand():
  # softmax(ln 1, ln 2, ln 5) = 1/8, 2/8, 5/8. The best two are experts 2 and 1.
  logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))

  def gates(softmax_order, renormalize):
    choice = routing.choose_top_k(
      logits, num_selected_experts=2, softmax_order=softmax_order, renormalize=renormalize
    )
    np.testing.assert_array_equal(choice.expert_index[0, 0], [2, 1])
    return choice.gates[0, 0]

  np.testing.assert_allclose(gates('before', 'none'), [5 / 8, 2 / 8], rtol=1e-6)
  np.testing.assert_allclose(gates('before', 'after_drop'), [5 / 8, 2 / 8], rtol=1e-6)
  np.testing.assert_allclose(gates('before', 'before_drop'), [5 / 7, 2 / 7], rtol=1e-6)
  np.testing.assert_allclose(gates('after', 'none'), [5 / 7, 2 / 7], rtol=1e-6)


@hypothesis.given(
  logits_and_k(),
  st.sampled_from(['sigmoid', 'sqrt_softplus']),
  st.sampled_from(['none', 'before_drop']),
)
def test_other_scores_match_the_oracle(drawn, score, renormalize):
  logits, k = drawn
  choice = routing.choose_top_k(
    jnp.asarray(logits),
    num_selected_experts=k,
    score=score,
    renormalize=renormalize,
    gate_scale=2.5,
  )
  for s, row in enumerate(logits[0]):
    # All scores rise with the logit.
    chosen = oracle.top_k(row, k)
    scores = biased.scores_of(row, score)
    np.testing.assert_array_equal(choice.expert_index[0, s], chosen)
    expected = biased.gates_of(scores, chosen, renormalize, 2.5)
    np.testing.assert_allclose(choice.gates[0, s], expected, rtol=3e-6)
    np.testing.assert_allclose(choice.router_probs[0, s], scores / scores.sum(), rtol=3e-6)


def test_other_scores_by_hand():
  # Odds 3, 1, 1/3: sigmoids 3/4, 1/2, 1/4, their sum 3/2. softplus(ln(e - 1)) = ln e = 1 and
  # softplus(ln(e^4 - 1)) = 4: roots 1 and 2.
  choose = functools.partial(routing.choose_top_k, num_selected_experts=2, gate_scale=2.0)
  sigmoid = choose(jnp.log(jnp.array([[[1 / 3, 3.0, 1.0]]])), score='sigmoid')
  np.testing.assert_array_equal(sigmoid.expert_index[0, 0], [1, 2])
  np.testing.assert_allclose(sigmoid.gates[0, 0], [2 * 3 / 5, 2 * 2 / 5], rtol=1e-6)
  np.testing.assert_allclose(sigmoid.router_probs[0, 0], [1 / 6, 1 / 2, 1 / 3], rtol=1e-6)
  logits = jnp.log(jnp.exp(jnp.array([[[1.0, 4.0]]])) - 1)
  root = choose(logits, score='sqrt_softplus', renormalize='none')
  np.testing.assert_allclose(root.gates[0, 0], [4, 2], rtol=1e-6)
  np.testing.assert_allclose(root.router_probs[0, 0], [1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize('score', ['sigmoid', 'sqrt_softplus'])
@pytest.mark.parametrize('renormalize', ['none', 'before_drop'])
def test_gradient_of_other_scores(score, renormalize):
  rng = np.random.default_rng(1)
  logits, cotangent, direction = rng.normal(size=(3, 5, 6))
  logits = logits.astype(np.float32)

  def values(z):
    choice = routing.choose_top_k(
      z[None], num_selected_experts=3, score=score, renormalize=renormalize
    )
    return jnp.sum(choice.gates[0] * cotangent[:, :3]) + jnp.sum(choice.router_probs**2)

  def expected(z):
    total = 0.0
    for s, row in enumerate(z):
      scores = biased.scores_of(row, score)
      gates = biased.gates_of(scores, oracle.top_k(row, 3), renormalize, 1.0)
      total += gates @ cotangent[s, :3] + np.sum((scores / scores.sum()) ** 2)
    return total

  slope = np.sum(np.asarray(jax.grad(values)(jnp.asarray(logits))) * direction)
  np.testing.assert_allclose(slope, oracle.central_difference(expected, logits, direction), 1e-4)


@pytest.mark.parametrize('score', routing.SCORES)
def test_logits_far_out_stay_finite(score):
  logits = jnp.array([[[-200.0, -200, -200], [200, 200, 200], [-200, 200, 0]]])

  def total(z):
    choice = routing.choose_top_k(z, num_selected_experts=2, score=score)
    return jnp.sum(choice.gates) + jnp.sum(choice.router_probs**2)

  value, gradient = jax.value_and_grad(total)(logits)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_experts_exist_for_logits_that_are_not_finite(bad):
  logits = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
  logits[0, 2, 1], logits[0, 5] = bad, bad
  index = np.sort(routing.choose_top_k(jnp.asarray(logits), num_selected_experts=2).expert_index)
  assert index.min() >= 0
  assert index.max() < 4
  assert (index[..., 0] != index[..., 1]).all()


def test_equal_logits_go_to_the_lower_index():
  choice = routing.choose_top_k(jnp.zeros((1, 2, 4)), num_selected_experts=3)
  np.testing.assert_array_equal(choice.expert_index[0], [[0, 1, 2], [0, 1, 2]])
  np.testing.assert_allclose(choice.gates, 1 / 3, rtol=1e-6)


def test_selects_on_logits_that_share_a_probability():
  # exp(-200) and exp(-201) are both 0 in float32; the larger logit is still expert 1's.
  logits = jnp.array([[[0.0, -200.0, -201.0], [0.0, -201.0, -200.0]]])
  choice = routing.choose_top_k(logits, num_selected_experts=2)
  np.testing.assert_array_equal(choice.router_probs[0, :, 1:], 0)
  np.testing.assert_array_equal(choice.expert_index[0], [[0, 1], [0, 2]])


@pytest.mark.parametrize('softmax_order', routing.SOFTMAX_ORDERS)
@pytest.mark.parametrize('renormalize', ['none', 'before_drop'])
def test_gradient_of_the_gates(softmax_order, renormalize):
  rng = np.random.default_rng(0)
  logits, cotangent, direction = rng.normal(size=(3, 5, 6))
  logits = logits.astype(np.float32)

  def gates(z):
    choice = routing.choose_top_k(
      z[None], num_selected_experts=3, softmax_order=softmax_order, renormalize=renormalize
    )
    return jnp.sum(choice.gates[0] * cotangent[:, :3])

  def expected(z):
    chosen = [oracle.top_k(row, 3) for row in z]
    rows = [
      oracle.gates(row, e, softmax_order, renormalize) for row, e in zip(z, chosen, strict=True)
    ]
    return np.sum(np.array(rows) * cotangent[:, :3])

  slope = np.sum(np.asarray(jax.grad(gates)(jnp.asarray(logits))) * direction)
  np.testing.assert_allclose(slope, oracle.central_difference(expected, logits, direction), 1e-4)


def test_one_selected_expert_learns_only_without_renormalisation():
  logits = jnp.array([[[0.5, 0.1, -0.3]]])

  def gate(z, renormalize):
    return jnp.sum(routing.choose_top_k(z, num_selected_experts=1, renormalize=renormalize).gates)

  assert np.abs(jax.grad(gate)(logits, 'none')).max() > 0.1
  np.testing.assert_allclose(jax.grad(gate)(logits, 'before_drop'), 0, atol=1e-7)


def test_jitter_is_uniform_noise_of_the_groups_key():
  keys = jax.random.split(jax.random.key(0), 4)
  noise = routing.jitter(jnp.ones((4, 50, 20)), keys, 0.1)
  assert noise.min() >= 0.9
  assert noise.max() <= 1.1
  np.testing.assert_allclose(np.mean(noise), 1.0, atol=4 * 0.2 / np.sqrt(12 * 4000))
  np.testing.assert_allclose(np.std(noise), 0.2 / np.sqrt(12), rtol=0.03)
  # A group's noise depends on its own key and on nothing else.
  np.testing.assert_array_equal(routing.jitter(jnp.ones((2, 50, 20)), keys[2:], 0.1), noise[2:])
  assert not np.array_equal(noise[0], noise[1])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_selected_experts': 4}, 'num_selected_experts=4'),
    ({'num_selected_experts': 0}, 'num_selected_experts=0'),
    ({'softmax_order': 'both'}, "softmax_order='both'"),
    ({'renormalize': 'always'}, "renormalize='always'"),
  ],
)
def test_names_the_bad_value(changes, message):
  with pytest.raises(ValueError, match=message):
    routing.choose_top_k(jnp.zeros((1, 2, 3)), **{'num_selected_experts': 1, **changes})


def test_rejects_logits_of_lower_precision():
  with pytest.raises(ValueError, match='bfloat16'):
    routing.choose_top_k(jnp.zeros((1, 2, 3), jnp.bfloat16), num_selected_experts=1)
