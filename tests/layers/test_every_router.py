"""Properties of every router of the registry, inside the layer, with the choices of its preset.

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
from moe_jax.train.state import over_scopes
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
  choice = options_of(name).choice
  names = {field.name for field in dataclasses.fields(choice)}
  changes = {field: value for field, value in (one | plain).items() if field in names}
  choice = dataclasses.replace(choice, **changes)
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
def names(request):
  """Returns the routers that the selected tests are about: with `-k NAME`, one program has one."""
  about = [
    getattr(item, 'callspec', None) and item.callspec.params.get('name')
    for item in request.session.items
    if item.path == request.path and 'names' in item.fixturenames
  ]
  return tuple(ROUTERS if None in about else sorted(set(about)))


@pytest.fixture(scope='module')
def one_device(names):
  return outcome(names, (1, 1))


def forward(cases, mesh=(1, 1), deterministic=False):
  """Returns {case: (options, inputs, state)} -> {case: (y, sums)}, all from one program."""
  mesh = make_mesh(*mesh)
  options = {name: case[0] for name, case in cases.items()}

  @jax.jit
  def program(arrays):
    return {name: run(options[name], mesh, *arrays[name], deterministic) for name in options}

  return lambda cases: jax.device_get(program({name: case[1:] for name, case in cases.items()}))


def cases_of(names, **changes):
  """Returns {router: (options, inputs, state)}."""
  options = {name: options_of(name, **changes) for name in names}
  return {name: (options[name], *drawn(options[name])) for name in names}


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


@functools.cache
def outcomes_on(mesh, names):
  """Returns the outcomes on one device and on a mesh."""
  return outcome(names, (1, 1), **MESHES[mesh]), outcome(names, mesh, **MESHES[mesh])


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('name', ROUTERS)
def test_every_mesh_gives_the_result_of_one_device(name, mesh, names):
  one_device, result = (outcomes[name] for outcomes in outcomes_on(mesh, names))
  for field in ('tokens_per_expert', 'kept_per_expert', 'tokens_all_dropped'):
    np.testing.assert_array_equal(
      result[2][field], one_device[2][field], err_msg=f'{name}: {field}'
    )
  assert_same(result, one_device, name)


@pytest.mark.parametrize('name', ROUTERS)
def test_numbers_are_finite_and_tokens_are_counted(name, one_device):
  loss, _, sums, gradients, state = one_device[name]
  assert np.isfinite(loss)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((sums, gradients, state)))
  valid = small_layer.draw(small_layer.OPTIONS).valid
  assert sums['tokens'].sum() == valid.sum()
  assert (sums['kept_per_expert'] <= sums['tokens_per_expert'].sum(0)).all()
  assert sums['kept_per_expert'].sum() > 0


@functools.cache
def choices(training, names):
  """Returns {router: (valid, choice)}, all from one program."""
  cases = cases_of(names)
  numbers = {
    name: dataclasses.replace(options.choice, capacity=4, training=training)
    for name, (options, *_) in cases.items()
  }

  @jax.jit
  def program(arrays):
    made = {}
    for name, (inputs, state) in arrays.items():
      keys = jax.random.split(jax.random.key(0), len(inputs.x))
      seen = routing.RouterInputs(inputs.x, *small_layer.info_of(inputs.valid), keys)
      router = routing.ROUTERS[name]
      made[name] = router.choose(inputs.params.router, state, seen, numbers[name])
    return made

  made = jax.device_get(program({name: case[1:] for name, case in cases.items()}))
  return {name: (cases[name][1].valid, made[name]) for name in names}


@pytest.mark.parametrize('name', ROUTERS)
@pytest.mark.parametrize('training', [True, False])
def test_a_choice_names_experts_that_exist_none_twice(name, training, names):
  valid, choice = choices(training, names)[name]
  index = choice.expert_index
  assert index.shape[:2] == valid.shape
  assert index.shape[2] in (options_of(name).choice.num_selected_experts, 8)
  assert choice.gates.shape == choice.chosen.shape == index.shape
  assert choice.router_probs.shape == (*valid.shape, 8)
  assert ((index >= 0) & (index < 8)).all()
  asked = np.sort(np.where(choice.chosen, index, -1), axis=-1)
  assert ((asked[..., 1:] != asked[..., :-1]) | (asked[..., 1:] < 0)).all()


@pytest.fixture(scope='module')
def task_gradients(names):
  """Returns {(router, K): gradients of the task loss by its weights}, all from one program."""
  cases = {}
  for name in names:
    for choice in filter(None, (options_of(name).choice, one_selected(name))):
      options = options_of(name, capacity_factor=None, choice=choice)
      cases[name, choice.num_selected_experts] = options, *drawn(options)
  mesh = make_mesh(1, 1)

  @jax.jit
  @jax.grad
  def gradients(weights, arrays):
    total = 0.0
    for key, (inputs, state) in arrays.items():
      params = inputs.params._replace(router=weights[key])
      y, _ = run(cases[key][0], mesh, inputs._replace(params=params), state)
      total += jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))
    return total

  weights = {key: inputs.params.router for key, (_, inputs, _) in cases.items()}
  return jax.device_get(gradients(weights, {key: case[1:] for key, case in cases.items()}))


@pytest.mark.parametrize('name', ROUTERS)
def test_learns_as_the_registry_says(name, task_gradients):
  """The task loss alone reaches the router's weights, with one expert too."""
  found = {k: gradients for (router, k), gradients in task_gradients.items() if router == name}
  assert set(found) >= (
    {1} if one_selected(name) else {options_of(name).choice.num_selected_experts}
  )
  for k, gradients in found.items():
    size = max((np.abs(leaf).max() for leaf in jax.tree.leaves(gradients)), default=0.0)
    assert (size > 1e-3) == routing.ROUTERS[name].learns, (k, size)


def test_three_routers_cannot_have_one_expert():
  # All experts; a first and a second choice; a softmax over the selected alone.
  found = {n for n in ROUTERS if one_selected(n) is None}
  assert found == {'dense', 'gshard', 'noisy_top_k'}, 'name such a router here, and say why'


def past_changes(options, deterministic):
  """Returns how much outputs of positions 0 to 3 change with other tokens from position 4 on.

  Args:
    options: {case: options of the layer}.
    deterministic: as in evaluation.

  Returns:
    {case: largest change}, all from one program.
  """
  cases, redrawn = {}, {}
  for case, option in options.items():
    inputs, state = drawn(option)
    inputs = inputs._replace(valid=jnp.ones_like(inputs.valid))
    other = drawn(option, seed=9)[0].x
    cases[case] = option, inputs, state
    redrawn[case] = option, inputs._replace(x=inputs.x.at[:, 4:].set(other[:, 4:])), state
  step = forward(cases, deterministic=deterministic)
  before, after = step(cases), step(redrawn)
  return {c: np.abs(before[c][0][:, :4] - after[c][0][:, :4]).max() for c in cases}


@pytest.fixture(scope='module')
def changes_in_training(names):
  """Those of {(router, sequences in a group)}."""
  # Where tokens are weighed against each other, also next to those of another sequence.
  sizes = {n: (1, 2) if routing.ROUTERS[n].balance == 'assignment' else (1,) for n in names}
  options = {(n, size): options_of(n, group_size=size) for n in names for size in sizes[n]}
  return past_changes(options, deterministic=False)


@pytest.mark.parametrize('name', ROUTERS)
def test_causal_as_the_registry_says(name, changes_in_training):
  router = routing.ROUTERS[name]
  changes = {size: c for (n, size), c in changes_in_training.items() if n == name}
  assert set(changes) == ({1, 2} if router.balance == 'assignment' else {1})
  for group_size, change in changes.items():
    assert (change < 1e-6) == router.causal, (
      f'{name}: causal={router.causal}, and with other tokens from position 4 on, {group_size} '
      f'sequences in a group, outputs of positions 0 to 3 moved by up to {change:.2g}'
    )


DECODED = [n for n in ROUTERS if not routing.ROUTERS[n].rejected]
EVALUATIONS = {'same': True, 'token_choice': False, 'threshold': False}


@pytest.fixture(scope='module')
def changes_in_evaluation(names):
  """Those of routers that decode, and of each evaluation of `expert_choice`."""
  options = {
    (name, 'preset'): options_of(name, group_size=1, capacity_factor=None)
    for name in names
    if name in DECODED
  }
  choice = options_of('expert_choice').choice
  for evaluation in EVALUATIONS if 'expert_choice' in names else ():
    changed = dataclasses.replace(choice, evaluation=evaluation)
    options['expert_choice', evaluation] = options_of('expert_choice', group_size=1, choice=changed)
  return past_changes(options, deterministic=True)


@pytest.mark.parametrize('name', DECODED)
def test_evaluation_is_causal_where_it_can_decode(name, changes_in_evaluation):
  assert options_of(name).choice.decodes
  change = changes_in_evaluation[name, 'preset']
  assert change < 1e-6, (
    f'{name} decodes, but in evaluation, with other tokens from position 4 on, outputs of '
    f'positions 0 to 3 moved by up to {change:.2g}'
  )


@pytest.mark.parametrize(('evaluation', 'leaks'), EVALUATIONS.items())
def test_expert_choice_leaks_in_one_of_its_evaluations(evaluation, leaks, changes_in_evaluation):
  choice = dataclasses.replace(options_of('expert_choice').choice, evaluation=evaluation)
  assert choice.decodes != leaks
  change = changes_in_evaluation['expert_choice', evaluation]
  assert (change > 1e-6) == leaks, change


@pytest.fixture(scope='module')
def losses_of_bad_weights(names):
  """Returns {(router, weight, bad number)}: loss, by one program; (router, '', 0): of good ones."""
  cases = cases_of(names)

  @jax.jit
  def program(weights, arrays):
    found = {}
    for name, (inputs, state) in arrays.items():
      options, params = cases[name][0], inputs.params._replace(router=weights[name])
      y, sums = run(options, make_mesh(1, 1), inputs._replace(params=params), state)
      found[name] = jnp.sum(y) + losses(options, sums, state)
    return found

  arrays = {name: case[1:] for name, case in cases.items()}
  good = {name: inputs.params.router for name, (_, inputs, _) in cases.items()}
  found = {(name, '', 0): loss for name, loss in program(good, arrays).items()}
  for i in range(max(map(len, good.values()))):
    for bad in (jnp.nan, jnp.inf):
      # The i-th weight of each router that has one.
      spoilt = {name: list(weights)[i] for name, weights in good.items() if i < len(weights)}
      changed = {
        name: {**good[name], key: good[name][key].at[0].set(bad)} for name, key in spoilt.items()
      }
      result = program({**good, **changed}, arrays)
      found |= {(name, key, bad): result[name] for name, key in spoilt.items()}
  return found


@pytest.mark.parametrize('name', ROUTERS)
def test_a_weight_that_is_not_a_number_shows_in_the_loss(name, losses_of_bad_weights):
  """Training stops at such a loss; without this, a router that went astray could be silent."""
  assert np.isfinite(losses_of_bad_weights[name, '', 0])
  inputs, _ = drawn(options_of(name))
  for key in inputs.params.router:
    for bad in (jnp.nan, jnp.inf):
      assert not np.isfinite(losses_of_bad_weights[name, key, bad]), (
        f'{name}: with {bad} in `{key}` the loss is a number, and training would go on; '
        '`router_logits` should be those before anything bounds them'
      )


DISPATCHED = [n for n in ROUTERS if routing.ROUTERS[n].mix is None]


@functools.cache
def dispatched(dispatch, mesh, names):
  cases = cases_of([name for name in names if name in DISPATCHED], dispatch=dispatch)
  return forward(cases, mesh)(cases)


# The dispatcher of decoding exchanges other things over a mesh than the others do.
@pytest.mark.parametrize(
  ('dispatch', 'mesh'), [('einsum', (1, 1)), ('dropless', (1, 1)), ('decode', (2, 4))]
)
@pytest.mark.parametrize('name', DISPATCHED)
def test_every_dispatcher_gives_the_same_result(name, dispatch, mesh, one_device, names):
  y, sums = dispatched(dispatch, mesh, names)[name]
  assert_same((y, sums._asdict()), one_device[name][1:3], name)


@pytest.fixture(scope='module')
def noise_in_padding(names):
  """Returns {router: (y, sums)} where padding holds noise, all from one program."""
  cases = cases_of(names)
  for name, (options, inputs, state) in cases.items():
    noise = 30 * jax.random.normal(jax.random.key(1), inputs.x.shape)
    x = jnp.where(inputs.valid[..., None], inputs.x, noise)
    cases[name] = options, inputs._replace(x=x), state
  return forward(cases)(cases)


@pytest.mark.parametrize('name', ROUTERS)
def test_padding_influences_nothing(name, one_device, noise_in_padding):
  y, sums = noise_in_padding[name]
  valid = np.asarray(drawn(options_of(name))[0].valid)
  expected = one_device[name][1]
  mask = valid[..., None]
  assert_same((y * mask, sums._asdict()), (expected * mask, one_device[name][2]), name)
  if routing.ROUTERS[name].mix is None:
    np.testing.assert_array_equal(y[~valid], 0)


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


def test_control_a_slot_too_few_is_noticed_in_every_router(monkeypatch, one_device):
  original = moe_layer.sizes_of

  def one_too_few(*numbers):
    sizes = original(*numbers)
    return sizes._replace(capacity=sizes.capacity - 1)

  monkeypatch.setattr(moe_layer, 'sizes_of', one_too_few)
  # The others have a slot for every token, or slots that are no token's.
  names = [name for name in ROUTERS if not routing.ROUTERS[name].keeps_all]
  cases = cases_of(names)
  for name, (y, _) in forward(cases)(cases).items():
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
      assert_same(y, one_device[name][1], name)


def test_control_sums_of_too_many_devices_are_noticed_in_every_router(monkeypatch, one_device):
  original = moe_layer._sum_over_devices
  monkeypatch.setattr(
    moe_layer, '_sum_over_devices', lambda sums: jax.tree.map(lambda a: 2 * a, original(sums))
  )
  cases = cases_of(ROUTERS)
  for name, (_, sums) in forward(cases)(cases).items():
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
