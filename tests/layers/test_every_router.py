"""What must hold of every router of the registry, inside the layer, with the choices of its preset.

The same loss, gradients, sums and state on any mesh; the same result by any dispatcher; `causal`
and `learns` as the registry says; padding that influences nothing.
"""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as schema
from moe_jax import routing
from moe_jax.experts import implementations
from moe_jax.layers import moe_layer
from moe_jax.parallel.mesh import make_mesh
from moe_jax.routing import groups
from moe_jax.train.step import over_scopes
from tests import tiny
from tests.layers import small_layer

ROUTERS = sorted(routing.ROUTERS)
PRESETS = sorted(p.stem for p in (tiny.REPOSITORY / 'configs' / 'presets').glob('[a-z]*.py'))
# Slots for half, three quarters and five quarters of the assignments; the balance of the batch, of
# each sequence and of each routing group.
MESHES = {
  (2, 4): {'capacity_factor': 0.75, 'balance_scopes': 1},
  (8, 1): {'capacity_factor': 0.5, 'balance_scopes': 16},
  (1, 8): {'capacity_factor': 1.25, 'balance_scopes': 8},
}


def options_of(name, **changes):
  """The options of a router's preset, with slots for three quarters of the assignments."""
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  choice = schema.router_options(config)
  assert choice.num_experts == 8
  settings = {'router': name, 'choice': choice, 'group_size': 2, 'capacity_factor': 0.75}
  return small_layer.make_options(**{**settings, **changes})


def one_selected(name):
  """The same with K = 1, and gates that a router with one expert can learn from; None if never."""
  one = {'num_selected_experts': 1, 'num_selected_groups': 1}
  plain = {'renormalize': 'none', 'softmax_order': 'before'}
  choice = dataclasses.replace(options_of(name).choice, **one, **plain)
  return None if routing.ROUTERS[name].allowed(choice) else choice


def drawn(options, seed=0):
  """Inputs, weights and a state in which no expert is like another."""
  inputs = small_layer.draw(options, seed=seed)
  router = routing.ROUTERS[options.router]
  rng = np.random.default_rng(seed + 1)
  weights = {
    name: jnp.asarray(rng.normal(size=weight.shape), jnp.float32)
    for name, weight in router.params(options.choice, small_layer.WIDTH).items()
  }
  state = router.state(options.choice, small_layer.WIDTH, small_layer.VOCAB_SIZE)
  if router.from_counts is not None:
    state = router.from_counts(state, np.arange(small_layer.VOCAB_SIZE) % 5, options.choice)
  if 'bias' in state:
    state['bias'] = state['bias'] + jnp.asarray(rng.normal(size=8) / 10, jnp.float32)
  if 'coefficient' in state:
    state['coefficient'] = jnp.full_like(state['coefficient'], 0.3)
  return inputs._replace(params=inputs.params._replace(router=weights)), state


def run(options, mesh, inputs, state, deterministic=False):
  """Returns y and sums."""
  keys = small_layer.group_keys(options, inputs.x.shape[0])
  info = small_layer.info_of(inputs.valid)
  layer = moe_layer.moe_layer(
    inputs.x,
    info,
    inputs.params,
    state=state,
    keys=keys,
    mesh=mesh,
    options=options,
    deterministic=deterministic,
  )
  return layer.y, layer.sums


def losses(options, sums, state):
  """All losses that the router's sums can bear, of comparable size."""
  router = routing.ROUTERS[options.router]
  own = router.loss(sums, state, options.choice) if router.loss else 0.0
  return small_layer.auxiliary(sums, options) + 0.1 * routing.entropy_loss(sums) + own


def outcome(names, mesh, **changes):
  """Returns {router: (loss, y, sums, gradients, next state)}, all from one program."""
  mesh = make_mesh(*mesh)

  def one(options, inputs, state):
    def loss(x, params):
      y, sums = run(options, mesh, inputs._replace(x=x, params=params), state)
      cotangent = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
      return jnp.sum(y * cotangent) + losses(options, sums, state), (y, sums)

    (value, (y, sums)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      inputs.x, inputs.params
    )
    router = routing.ROUTERS[options.router]
    new = state
    if router.update is not None:
      total = jax.tree.map(lambda a: a[0], over_scopes(jax.tree.map(lambda a: a[None], sums)))
      new = router.update(state, total, options.choice)
    return value, y, sums._asdict(), gradients, new

  cases = {name: (options_of(name, **changes), *drawn(options_of(name))) for name in names}

  @jax.jit
  def program(arrays):
    return {name: one(cases[name][0], *arrays[name]) for name in names}

  return jax.device_get(program({name: case[1:] for name, case in cases.items()}))


@pytest.fixture(scope='module', autouse=True)
def few_weights_are_many():
  """Lets `gather` and `dropless` tell small experts, too, which rows are filled."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(implementations, 'LEAST_WEIGHTS', 1)
    yield


@pytest.fixture(scope='module')
def one_device():
  return outcome(ROUTERS, (1, 1))


def assert_same(result, expected, name):
  flat, _ = jax.tree_util.tree_flatten_with_path(result)
  wanted = jax.tree.leaves(expected)
  assert len(flat) == len(wanted)
  for (path, value), other in zip(flat, wanted, strict=True):
    scale = max(np.abs(other).max(initial=0), 1e-6)
    where = f'{name}{jax.tree_util.keystr(path)}'
    np.testing.assert_allclose(value / scale, other / scale, rtol=0, atol=2e-5, err_msg=where)


def test_every_router_has_a_preset_and_tests_of_its_own():
  missing = sorted(set(ROUTERS) - set(PRESETS))
  assert not missing, f'add configs/presets/NAME.py for {missing}'
  tests = [*(tiny.REPOSITORY / 'tests' / 'routing' / 'routers').glob('test_*.py')]
  tested = {path.stem.removeprefix('test_') for path in tests}
  assert tested == set(ROUTERS), (
    f'tests/routing/routers/test_NAME.py: add {sorted(set(ROUTERS) - tested)}, '
    f'remove {sorted(tested - set(ROUTERS))}'
  )
  for path in tests:
    text = path.read_text(encoding='utf-8')
    assert re.search(r'def test_\w*by_hand', text), f'{path.name}: no hand-worked case'
    assert path.stem == 'test_random_choice' or 'oracle' in text, f'{path.name}: no oracle'


@pytest.mark.parametrize('mesh', MESHES)
def test_every_mesh_gives_the_result_of_one_device(mesh):
  one_device = outcome(ROUTERS, (1, 1), **MESHES[mesh])
  result = outcome(ROUTERS, mesh, **MESHES[mesh])
  for name in ROUTERS:
    counts = 'tokens_per_expert', 'kept_per_expert', 'tokens_all_dropped'
    for field in counts:
      np.testing.assert_array_equal(
        result[name][2][field], one_device[name][2][field], err_msg=f'{name}: {field}'
      )
    assert_same(result[name], one_device[name], name)


@pytest.mark.parametrize('name', ROUTERS)
def test_numbers_are_finite_and_tokens_are_counted(name, one_device):
  loss, _, sums, gradients, state = one_device[name]
  assert np.isfinite(loss)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients, state)))
  valid = small_layer.draw(small_layer.OPTIONS).valid
  assert sums['tokens'].sum() == valid.sum()
  assert (sums['kept_per_expert'] <= sums['tokens_per_expert'].sum(0)).all()
  assert sums['kept_per_expert'].sum() > 0


@pytest.mark.parametrize('name', ROUTERS)
@pytest.mark.parametrize('training', [True, False])
def test_a_choice_names_experts_that_exist_none_twice(name, training):
  options = options_of(name)
  inputs, state = drawn(options)
  info = small_layer.info_of(inputs.valid)
  router = routing.ROUTERS[name]
  numbers = dataclasses.replace(options.choice, capacity=4, training=training)
  seen = routing.RouterInputs(inputs.x, *info, jax.random.split(jax.random.key(0), len(inputs.x)))
  choice = jax.jit(lambda params: router.choose(params, state, seen, numbers))(inputs.params.router)
  index = np.asarray(choice.expert_index)
  assert index.shape == (*inputs.valid.shape, router.num_assignments(numbers))
  assert choice.router_probs.shape == (*inputs.valid.shape, 8)
  assert ((index >= 0) & (index < 8)).all()
  asked = np.sort(np.where(choice.chosen, index, -1), axis=-1)
  assert ((asked[..., 1:] != asked[..., :-1]) | (asked[..., 1:] < 0)).all()


@pytest.mark.parametrize('name', ROUTERS)
def test_learns_as_the_registry_says(name):
  """The task loss alone reaches the router's weights, with one expert too."""
  router = routing.ROUTERS[name]
  for choice in filter(None, (options_of(name).choice, one_selected(name))):
    options = options_of(name, capacity_factor=None, choice=choice)
    inputs, state = drawn(options)

    def loss(weights, options=options, inputs=inputs, state=state):
      params = inputs.params._replace(router=weights)
      y, _ = run(options, make_mesh(1, 1), inputs._replace(params=params), state)
      return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    gradients = jax.jit(jax.grad(loss))(inputs.params.router)
    size = max((np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)), default=0.0)
    assert (size > 1e-3) == router.learns, (choice.num_selected_experts, size)


def test_three_routers_cannot_have_one_expert():
  # All experts; a first and a second choice; a softmax over the selected alone.
  found = {n for n in ROUTERS if one_selected(n) is None}
  assert found == {'dense', 'gshard', 'noisy_top_k'}, 'name such a router here, and say why'


def _past_changes(name, deterministic, **changes):
  """How much the output of the first half of 16 rows changes when the second half is redrawn."""
  options = options_of(name, **{'group_size': 1, **changes})
  inputs, state = drawn(options)
  other = drawn(options, seed=9)[0]
  inputs = inputs._replace(valid=jnp.ones_like(inputs.valid))
  redrawn = inputs._replace(x=inputs.x.at[:, 4:].set(other.x[:, 4:]))
  step = jax.jit(lambda inputs: run(options, make_mesh(1, 1), inputs, state, deterministic)[0])
  return float(np.abs(step(inputs)[:, :4] - step(redrawn)[:, :4]).max())


@pytest.mark.parametrize('name', ROUTERS)
def test_causal_as_the_registry_says(name):
  router = routing.ROUTERS[name]
  # Where tokens are weighed against each other, also beside those of another sequence.
  for group_size in (1, 2) if router.balance == 'assignment' else (1,):
    change = _past_changes(name, False, group_size=group_size)
    assert (change < 1e-6) == router.causal, (
      f'{name}: causal={router.causal}, and with other tokens from position 4 on, {group_size} '
      f'sequences in a group, outputs of positions 0 to 3 moved by up to {change:.2g}'
    )


@pytest.mark.parametrize('name', [n for n in ROUTERS if not routing.ROUTERS[n].rejected])
def test_evaluation_is_causal_where_it_can_decode(name):
  options = options_of(name)
  assert routing.ROUTERS[name].decodes(options.choice)
  change = _past_changes(name, True, capacity_factor=None)
  assert change < 1e-6, (
    f'{name} decodes, but in evaluation, with other tokens from position 4 on, outputs of '
    f'positions 0 to 3 moved by up to {change:.2g}'
  )


@pytest.mark.parametrize(
  ('evaluation', 'leaks'), [('same', True), ('token_choice', False), ('threshold', False)]
)
def test_expert_choice_leaks_in_one_of_its_evaluations(evaluation, leaks):
  choice = dataclasses.replace(options_of('expert_choice').choice, evaluation=evaluation)
  assert routing.ROUTERS['expert_choice'].decodes(choice) != leaks
  change = _past_changes('expert_choice', True, choice=choice)
  assert (change > 1e-6) == leaks, change


@pytest.mark.parametrize('name', ROUTERS)
def test_a_weight_that_is_not_a_number_shows_in_the_loss(name):
  """Training stops at such a loss; without this, a router that went astray could be silent."""
  options = options_of(name)
  inputs, state = drawn(options)

  @jax.jit
  def loss(params):
    y, sums = run(options, make_mesh(1, 1), inputs._replace(params=params), state)
    return jnp.sum(y) + losses(options, sums, state)

  assert np.isfinite(loss(inputs.params))
  for key, weight in inputs.params.router.items():
    for bad in (jnp.nan, jnp.inf):
      weights = {**inputs.params.router, key: weight.at[0].set(bad)}
      assert not np.isfinite(loss(inputs.params._replace(router=weights))), (key, bad)


# The dispatcher of decoding exchanges other things over a mesh than the others do.
@pytest.mark.parametrize(
  ('dispatch', 'mesh'), [('einsum', (1, 1)), ('dropless', (1, 1)), ('decode', (2, 4))]
)
@pytest.mark.parametrize('name', [n for n in ROUTERS if routing.ROUTERS[n].mix is None])
def test_every_dispatcher_gives_the_same_result(name, dispatch, mesh, one_device):
  options = options_of(name, dispatch=dispatch)
  inputs, state = drawn(options)
  y, sums = jax.jit(lambda inputs: run(options, make_mesh(*mesh), inputs, state))(inputs)
  assert_same((y, sums._asdict()), one_device[name][1:3], name)


@pytest.mark.parametrize('name', ROUTERS)
def test_padding_influences_nothing(name, one_device):
  options = options_of(name)
  inputs, state = drawn(options)
  noise = 30 * jax.random.normal(jax.random.key(1), inputs.x.shape)
  x = jnp.where(inputs.valid[..., None], inputs.x, noise)
  step = jax.jit(lambda x: run(options, make_mesh(1, 1), inputs._replace(x=x), state))
  y, sums = step(x)
  mask = np.asarray(inputs.valid)[..., None]
  expected = one_device[name][1]
  assert_same((y * mask, sums._asdict()), (expected * mask, one_device[name][2]), name)
  if routing.ROUTERS[name].mix is None:
    np.testing.assert_array_equal(np.asarray(y)[~np.asarray(inputs.valid)], 0)


def test_control_numbers_of_one_device_are_refused(monkeypatch):
  """The router's own sums, its loss and state hang on them, left without their psum."""
  original, tried = moe_layer._sum_over_devices, []
  for name in ROUTERS:
    options = options_of(name)
    inputs, state = drawn(options)
    trace = functools.partial(jax.eval_shape, functools.partial(run, options, make_mesh(1, 2)))
    monkeypatch.setattr(moe_layer, '_sum_over_devices', lambda sums: sums)
    with pytest.raises(ValueError, match='out_specs'):
      trace(inputs, state)
    if has_sums(options, inputs, state):
      tried.append(name)
      monkeypatch.setattr(moe_layer, '_sum_over_devices', lambda s: original(s)._replace(own=s.own))
      with pytest.raises(ValueError, match='out_specs'):
        trace(inputs, state)
  assert {'gshard', 'group_limited', 'kmeans', 'quantile', 'remoe', 'vmoe'} <= set(tried)


def forward(names):
  """Returns {router: (y, sums)} on one device, all from one program."""
  mesh = make_mesh(1, 1)
  cases = {name: (options_of(name), *drawn(options_of(name))) for name in names}

  @jax.jit
  def program(arrays):
    return {name: run(cases[name][0], mesh, *arrays[name]) for name in names}

  return jax.device_get(program({name: case[1:] for name, case in cases.items()}))


def test_control_a_slot_too_few_is_noticed_in_every_router(monkeypatch, one_device):
  original = moe_layer.sizes_of

  def one_too_few(*numbers):
    sizes = original(*numbers)
    return sizes._replace(capacity=sizes.capacity - 1)

  monkeypatch.setattr(moe_layer, 'sizes_of', one_too_few)
  # The others have a slot for every token, or slots that are no token's.
  names = [name for name in ROUTERS if not routing.ROUTERS[name].keeps_all]
  for name, (y, _) in forward(names).items():
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
      assert_same(y, one_device[name][1], name)


def test_control_sums_of_too_many_devices_are_noticed_in_every_router(monkeypatch, one_device):
  original = moe_layer._sum_over_devices
  monkeypatch.setattr(
    moe_layer, '_sum_over_devices', lambda sums: jax.tree.map(lambda a: 2 * a, original(sums))
  )
  for name, (_, sums) in forward(ROUTERS).items():
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
      assert_same(sums._asdict(), one_device[name][2], name)


def has_sums(options, inputs, state):
  router = routing.ROUTERS[options.router]
  x = groups.to_groups(inputs.x, options.group_size)
  size = x.shape[:2]
  places = jnp.zeros(size, jnp.int32)
  arguments = routing.RouterInputs(
    x, jnp.ones(size, bool), places, places, small_layer.group_keys(options)
  )
  choice = jax.eval_shape(
    lambda: router.choose(inputs.params.router, state, arguments, options.choice)
  )
  return bool(choice.sums)


def test_control_a_state_fed_with_twice_the_sums_is_noticed(monkeypatch, one_device):
  # What a psum too many does to quantile's bias: counts double, and so do thresholds times tokens.
  original = moe_layer._sum_over_devices

  def doubled(sums):
    total = original(sums)
    return total._replace(own=jax.tree.map(lambda a: 2 * a, total.own))

  monkeypatch.setattr(moe_layer, '_sum_over_devices', doubled)
  result = outcome(['quantile', 'remoe'], (1, 2))
  for name in ('quantile', 'remoe'):
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
      assert_same(result[name], one_device[name], name)
