"""Schedules at points worked by hand, and what each optimizer does to which parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as schema
from moe_jax import optim

OPTIMIZERS = ('adamw', 'adafactor', 'muon', 'sgd')


def _optim(**fields):
  config = schema.get_config().optim
  config.update(learning_rate=1.0, warmup_steps=10, final_fraction=0.1, schedule='constant')
  config.update(fields)
  return config


@pytest.mark.parametrize(
  ('schedule', 'points'),
  [
    ('constant', {0: 0, 5: 0.5, 10: 1, 110: 1}),
    # Half way from 10 to 110 the cosine is at (1 + 0.1) / 2.
    ('cosine', {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1, 200: 0.1}),
    ('linear', {0: 0, 5: 0.5, 10: 1, 35: 0.775, 60: 0.55, 110: 0.1, 200: 0.1}),
    # The last 22 of 110 steps decay: from 88.
    ('wsd', {0: 0, 10: 1, 60: 1, 88: 1, 99: 0.55, 110: 0.1, 200: 0.1}),
  ],
)
def test_schedule(schedule, points):
  rate = optim.make_schedule(_optim(schedule=schedule, decay_fraction=0.2), 110)
  for step, expected in points.items():
    np.testing.assert_allclose(rate(step), expected, atol=1e-6, err_msg=str(step))


@pytest.mark.parametrize('schedule', ['constant', 'cosine', 'linear', 'wsd'])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
  rate = optim.make_schedule(_optim(schedule=schedule, warmup_steps=0), 100)
  np.testing.assert_allclose(rate(0), 1.0)


def _params():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  moe = {'router': normal(2, 8, 4), 'noise': normal(2, 8, 4)}  # as in noisy_top_k
  moe |= {'w_in': normal(2, 4, 8, 16), 'w_out': normal(2, 4, 16, 8)}
  block = {'moe': moe, 'attention': {'query': normal(2, 8, 8)}, 'norm': {'scale': normal(2, 8)}}
  return {
    'embedding': normal(20, 8),
    'output': normal(8, 20),
    'final_norm': {'scale': normal(8)},
    'layers': {'block_0': block},
  }


def _updates(fields, grads, params, steps=1):
  optimizer = optim.make_optimizer(_optim(warmup_steps=0, **fields), 100)
  state = optimizer.init(params)
  for _ in range(steps):
    updates, state = optimizer.update(grads, state, params)
  return updates


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_decreases_a_quadratic(name):
  params = _params()
  optimizer = optim.make_optimizer(
    _optim(name=name, learning_rate=0.02, warmup_steps=0, weight_decay=0.0, momentum=0.9), 100
  )

  def loss(params):
    return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return jax.tree.map(jnp.add, params, updates), state

  before, state = params, optimizer.init(params)
  for _ in range(30):
    params, state = step(params, state)
  for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True):
    assert jnp.sum(jnp.square(two)) < jnp.sum(jnp.square(one))


def test_clipping_scales_all_gradients_by_their_common_norm():
  params = _params()
  grads = jax.tree.map(jnp.ones_like, params)
  norm = np.sqrt(sum(g.size for g in jax.tree.leaves(grads)))
  fields = {'name': 'sgd', 'momentum': 0.0, 'weight_decay': 0.0}
  for clip_norm, expected in ((2.0, 2 / norm), (1e6, 1.0), (0.0, 1.0)):
    updates = _updates({**fields, 'clip_norm': clip_norm}, grads, params)
    for update in jax.tree.leaves(updates):
      np.testing.assert_allclose(update, -expected, rtol=1e-5)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_weight_decay_shrinks_matrices_of_layers_alone(name):
  params = _params()
  zeros = jax.tree.map(jnp.zeros_like, params)
  fields = {'name': name, 'weight_decay': 0.1, 'learning_rate': 0.5, 'momentum': 0.0}
  updates = _updates(fields, zeros, params)
  flat = jax.tree_util.tree_flatten_with_path(updates)[0]
  decayed = set()
  for (path, update), param in zip(flat, jax.tree.leaves(params), strict=True):
    leaf = path[-1].key
    if np.any(update):
      decayed.add(leaf)
      # Decoupled: learning rate x decay x weight, whatever the gradient.
      np.testing.assert_allclose(update, -0.05 * param, rtol=1e-5)
  # Muon leaves the router to AdamW, without decay.
  assert decayed == {'query', 'w_in', 'w_out'} | (set() if name == 'muon' else {'router', 'noise'})


def test_muon_makes_each_matrix_of_each_expert_orthogonal():
  params = _params()
  grads = jax.tree.map(lambda p: p * 7.0, params)
  fields = {'name': 'muon', 'weight_decay': 0.0, 'clip_norm': 0.0}
  moe = _updates(fields, grads, params)['layers']['block_0']['moe']
  for name in ('w_in', 'w_out'):
    # Scaled by 0.2 sqrt(larger side), as an AdamW update.
    matrices = np.asarray(moe[name]) / (0.2 * 4)
    singular = np.linalg.svd(matrices, compute_uv=False)
    assert singular.shape == (2, 4, 8)
    assert np.all((singular > 0.5) & (singular < 1.5))
  # Each on its own: another gradient for one expert leaves the others' updates alone.
  other = jax.tree.map(lambda g: g, grads)
  w_in = other['layers']['block_0']['moe']['w_in']
  other['layers']['block_0']['moe']['w_in'] = w_in.at[0, 0].multiply(-3.0)
  changed = _updates(fields, other, params)['layers']['block_0']['moe']['w_in']
  np.testing.assert_allclose(changed[0, 1:], moe['w_in'][0, 1:], atol=1e-6)
  np.testing.assert_allclose(changed[0, 0], -moe['w_in'][0, 0], atol=1e-5)


def test_muon_gives_the_rest_its_own_learning_rate():
  params = _params()
  fields = {'name': 'muon', 'learning_rate': 0.1, 'adam_learning_rate': 0.01, 'weight_decay': 0.0}
  updates = _updates(fields, params, params)
  # The first AdamW update is learning rate x sign of the gradient.
  moe = updates['layers']['block_0']['moe']
  for update in (updates['embedding'], moe['router'], moe['noise']):
    np.testing.assert_allclose(np.abs(update), 0.01, rtol=1e-3)


def test_sgd_momentum():
  params = {'embedding': jnp.ones((2, 2))}
  grads = {'embedding': jnp.full((2, 2), 0.5)}
  fields = {'name': 'sgd', 'momentum': 0.5, 'clip_norm': 0.0}
  # 0.5, then 0.5 + 0.5 * 0.5.
  np.testing.assert_allclose(_updates(fields, grads, params, steps=2)['embedding'], -0.75)
