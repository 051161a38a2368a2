"""Every optimizer on stacked parameters against the same optimizer on each matrix alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as schema
from moe_jax import optim, stacks

RATE, DECAY, STEPS = 0.1, 0.2, 3
# Layers, width, hidden units. 128 is where Optax begins to factor.
L, D, F = 2, 128, 144
FIELDS = {
  'adamw': {},
  'adafactor': {},
  'muon': {'adam_learning_rate': 0.05, 'momentum': 0.8},
  'sgd': {'momentum': 0.8},
}


def _params(rng, experts):
  """Experts narrower than 128, as many as `experts`; a gated dense layer; one that is not gated."""

  def normal(*shape):
    return np.asarray(rng.normal(size=shape), np.float32)

  moe = {'router': normal(L, 4, 8)}
  moe |= {'w_in': normal(L, experts, 4, 2 * F), 'w_out': normal(L, experts, F, 4)}
  block = {
    'moe': moe,
    'shared': {'w_in': normal(L, D, 2 * F), 'w_out': normal(L, F, D)},
    'mlp': {'w_in': normal(L, D, F), 'w_out': normal(L, F, D)},
    'norm': {'scale': normal(L, D)},
  }
  return {
    'embedding': normal(130, D),
    'final_norm': {'scale': normal(D)},
    'layers': {'block_0': block},
  }


def _gradients(rng, params):
  """Gradients of very unequal size: of layers, of experts, of gate and value."""

  def one(p):
    size = 10.0 ** rng.integers(-3, 3, size=(*p.shape[:-2], 1, 1)) if p.ndim > 2 else 1.0
    halves = np.where(np.arange(p.shape[-1]) < p.shape[-1] // 2, 1.0, 30.0)
    return np.asarray(rng.normal(size=p.shape) * size * halves, np.float32)

  return jax.tree.map(one, params)


def _alone(params):
  """Returns {name: (matrix or vector, kind)}: what each was before it was stacked."""
  found = {}
  for path, array in jax.tree_util.tree_flatten_with_path(params)[0]:
    name = jax.tree_util.keystr(path)
    if path[0].key != 'layers':
      found[name] = array, 'other'
    elif 'scale' in name:
      found |= {f'{name} {layer}': (array[layer], 'other') for layer in range(L)}
    else:
      rank_2 = array.reshape(-1, *array.shape[-2:])
      gated = 'w_in' in name and 'mlp' not in name
      halves = np.split(rank_2, 2, axis=2) if gated else [rank_2]
      kind = 'router' if 'router' in name else 'matrix'
      for number, half in enumerate(halves):
        found |= {f'{name} {i} half {number}': (m, kind) for i, m in enumerate(half)}
  return found


def _rule(name, kind):
  """The optimizer for one matrix or vector by itself, of Optax's parts alone."""
  decay = 0.0 if kind == 'other' else DECAY
  if name == 'adamw' or (name == 'muon' and kind != 'matrix'):
    rate = RATE if name == 'adamw' else 0.05
    return optax.adamw(rate, 0.9, 0.95, 1e-8, weight_decay=decay if name == 'adamw' else 0.0)
  parts = {
    'sgd': [optax.add_decayed_weights(decay), optax.trace(0.8)],
    'adafactor': [
      *(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
      optax.add_decayed_weights(decay),
    ],
    'muon': [
      optax.trace(0.8, nesterov=True),
      optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()
      ),
      optax.stateless(lambda u, p: jax.tree.map(lambda x: 0.2 * max(x.shape) ** 0.5 * x, u)),
      optax.add_decayed_weights(DECAY),
    ],
  }
  return optax.chain(*parts[name], optax.scale(-RATE))


@functools.cache
def _step(name, kind):
  rule = _rule(name, kind)

  @jax.jit
  def step(grad, state, param):
    update, state = rule.update(grad, state, param)
    return param + update, state

  return rule.init, step


def _expected(name, params, gradients):
  """The parameters after the steps, each matrix and vector by itself."""
  result = {}
  split = [_alone(gradient) for gradient in gradients]
  for key, (param, kind) in _alone(params).items():
    init, step = _step(name, kind)
    state = init(jnp.asarray(param))
    for gradient in split:
      param, state = step(gradient[key][0], state, param)
    result[key] = np.asarray(param)
  return result


def _stacked(name, params, gradients):
  fields = schema.get_config().optim
  fields.update(name=name, learning_rate=RATE, weight_decay=DECAY, schedule='constant')
  fields.update(warmup_steps=0, clip_norm=0.0, **FIELDS[name])
  optimizer = optim.make_optimizer(fields, 100)

  @jax.jit
  def step(gradient, state, params):
    updates, state = optimizer.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  params = jax.tree.map(jnp.asarray, params)
  state = optimizer.init(params)
  for gradient in gradients:
    params, state = step(gradient, state, params)
  return jax.device_get(params)


@functools.cache
def _case(name):
  rng = np.random.default_rng(0)
  # With Adafactor so many that they would be one of the two largest dimensions of the stack.
  params = _params(rng, 150 if name == 'adafactor' else 3)
  gradients = [_gradients(rng, params) for _ in range(STEPS)]
  return params, gradients, _expected(name, params, gradients)


def _difference(name):
  """Returns the largest difference of any matrix, as a share of its largest change."""
  params, gradients, expected = _case(name)
  before, after = _alone(params), _alone(_stacked(name, params, gradients))
  assert before.keys() == after.keys() == expected.keys()
  shares = []
  for key, wanted in expected.items():
    change = np.abs(wanted - before[key][0]).max()
    assert change > 1e-3
    shares.append(np.abs(after[key][0] - wanted).max() / change)
  return max(shares)


@pytest.mark.parametrize('name', FIELDS)
def test_each_matrix_and_vector_is_updated_as_if_it_were_alone(name):
  # Muon's five iterations of matrix products are rounded otherwise when they are batched.
  assert _difference(name) < (1e-3 if name == 'muon' else 1e-5)


def _whole(params):
  return jax.tree.map(lambda p: stacks.Stack(p.ndim, 1), params)


def _fused(original):
  def fused(params):
    is_leaf = lambda x: isinstance(x, stacks.Stack)  # noqa: E731
    return jax.tree.map(lambda s: s._replace(halves=1), original(params), is_leaf=is_leaf)

  return fused


def test_control_a_statistic_of_a_stack_is_noticed(monkeypatch):
  original = stacks.stacks_of
  monkeypatch.setattr(stacks, 'stacks_of', _whole)
  assert _difference('adafactor') > 0.1
  monkeypatch.setattr(stacks, 'stacks_of', _fused(original))
  assert _difference('adafactor') > 0.1
  assert _difference('muon') > 0.1


@pytest.mark.parametrize('name', [n for n in FIELDS if n != 'muon'])
def test_control_decay_of_stacked_vectors_is_noticed(monkeypatch, name):
  """Muon leaves them to AdamW, which decays nothing there."""
  monkeypatch.setattr(stacks, 'is_matrix', lambda p, **more: jax.tree.map(lambda x: x.ndim > 1, p))
  assert _difference(name) > 0.01


def test_scales_are_vectors_however_many_dimensions_number_them():
  params = {'layers': {'moe': {'scale': jnp.ones((2, 3, 8)), 'w': jnp.ones((2, 3, 8))}}}
  assert stacks.is_matrix(params)['layers']['moe'] == {'scale': False, 'w': True}
  found = stacks.stacks_of(params)['layers']['moe']
  assert found == {'scale': stacks.Stack(1, 1), 'w': stacks.Stack(2, 1)}


@pytest.mark.parametrize(('name', 'part'), [('muon', 'gate'), ('adafactor', 'expert')])
def test_what_others_are_given_moves_no_update_by_hand(name, part):
  """The value's gradient x 10 changes the gate's update by 0, as expert 0's x 1,000 that of 1."""
  rng = np.random.default_rng(1)
  shapes = (1, 16, 48) if part == 'gate' else (1, 256, 4, 256)
  w_in = jnp.asarray(rng.normal(size=shapes), jnp.float32)
  w_out = jnp.swapaxes(w_in, -1, -2)[..., : shapes[-1] // 2, :]
  layer = {'mlp' if part == 'gate' else 'moe': {'w_in': w_in, 'w_out': w_out}}
  params = {'layers': {'block_0': layer}}
  scale = jnp.where(jnp.arange(48) < 24, 1.0, 10.0)[None, None]
  if part == 'expert':
    scale = jnp.where(jnp.arange(256) == 0, 1000.0, 1.0)[None, :, None, None]
  updates = []
  for factor in (jnp.ones_like(scale), scale):
    gradient = jax.tree.map(lambda x: x, params)
    (neighbours,) = gradient['layers']['block_0'].values()
    neighbours['w_in'] = w_in * factor
    moved = jax.tree.leaves(_stacked(name, params, [gradient]))[0] - w_in
    updates.append(moved[..., :24] if part == 'gate' else moved[:, 1:])
  np.testing.assert_array_equal(*updates)
  assert np.abs(updates[0]).max() > 1e-3
