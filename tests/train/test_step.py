"""One optimizer step: what it computes, on any mesh, in any number of micro-batches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.decoder import forward
from moe_jax.run import divergence
from moe_jax.train import objective
from moe_jax.train.state import init_state, over_scopes, state_shardings
from moe_jax.train.step import put_batch
from tests import tiny


def _weights(*values):
  # As the loop makes them: their dtype is part of what is compiled.
  return objective.LossWeights(*(jnp.asarray(value, jnp.float32) for value in values))


NO_WEIGHTS = _weights(0, 0, 0, 0, 0, 0)
# So large that an error in the auxiliary gradient cannot hide behind the task's.
LARGE_WEIGHTS = _weights(5, 1, 3, 2, 2, 4)
# An expert can take every token of its group. Needed where padding, which counts in the capacity,
# is not the same.
DROPLESS = {'moe.capacity_factor': 4.0}


@pytest.mark.parametrize('mesh', [(2, 4), (8, 1), (1, 8)])
def test_a_step_is_the_same_on_every_mesh(mesh):
  rows = tiny.batch(16, 16)
  one, many = tiny.trainer(), tiny.trainer(mesh=mesh)
  expected, metrics = one(rows, LARGE_WEIGHTS), many(rows, LARGE_WEIGHTS)
  tiny.assert_close(metrics, expected)
  tiny.assert_close(many.state.params, one.state.params)
  # Routing itself is the same to the last token, and some were dropped.
  for name in ('tokens_per_expert', 'kept_per_expert', 'tokens_all_dropped'):
    counts = getattr(metrics.router_sums, name), getattr(expected.router_sums, name)
    np.testing.assert_array_equal(*counts)
  sums = expected.router_sums
  assert np.sum(sums.kept_per_expert) < np.sum(sums.tokens_per_expert)


def _auxiliary_gradient(trainer, rows):
  """The gradient of the auxiliary losses alone: with them, minus without."""
  whole, _ = trainer.gradient(rows, LARGE_WEIGHTS)
  task, _ = trainer.gradient(rows, NO_WEIGHTS)
  return jax.tree.map(jnp.subtract, whole, task)['layers']['block_0']['moe']['router']


@pytest.mark.parametrize('scope', ['global', 'device', 'group', 'sequence'])
def test_four_micro_batches_are_one_batch(scope):
  rows = tiny.batch(16, 16)
  common = {'moe.balance_scope': scope, 'train.accumulation_scope': 'batch'}
  one = tiny.trainer(common)
  four = tiny.trainer({**common, 'train.accumulation_steps': 4})
  expected, expected_parts = one.gradient(rows, LARGE_WEIGHTS)
  result, parts = four.gradient(rows, LARGE_WEIGHTS)
  tiny.assert_close(result, expected)
  for name in ('cross_entropy', 'objective', 'auxiliary'):
    tiny.assert_close(getattr(parts, name), getattr(expected_parts, name))
  # Sums add up, and the largest number is the largest of all micro-batches.
  sums = [over_scopes(part.router_sums)._asdict() for part in (parts, expected_parts)]
  tiny.assert_close(*sums)
  auxiliary = _auxiliary_gradient(one, rows)
  assert np.max(np.abs(auxiliary)) > 1e-3
  tiny.assert_close(_auxiliary_gradient(four, rows), auxiliary, 1e-4)


def test_scope_microbatch_is_the_token_weighted_mean_of_the_micro_batches():
  rows = tiny.batch(16, 16)
  result, parts = tiny.trainer({'train.accumulation_steps': 4}).gradient(rows, LARGE_WEIGHTS)
  single = tiny.trainer({'data.batch_size': 4})
  tokens, grads, losses = [], [], []
  for start in range(0, 16, 4):
    micro = {name: value[start : start + 4] for name, value in rows.items()}
    grad, part = single.gradient(micro, LARGE_WEIGHTS)
    tokens.append((micro['segment_ids'] > 0).sum())
    grads.append(grad)
    losses.append(part.auxiliary)
  share = np.asarray(tokens) / np.sum(tokens)
  assert len(set(tokens)) > 1

  def mean(*values):
    return sum(weight * np.asarray(value) for weight, value in zip(share, values, strict=True))

  tiny.assert_close(result, jax.tree.map(mean, *grads))
  tiny.assert_close(parts.auxiliary, jax.tree.map(mean, *losses))


def test_scope_running_takes_the_loads_of_the_micro_batches_so_far():
  # In micro-batch i: E sum_e f_e P_ie, f from the counts of micro-batches 0..i, P_i its own.
  rows = tiny.batch(16, 16)
  scope = {'train.accumulation_scope': 'running'}
  trainer = tiny.trainer({**scope, 'train.accumulation_steps': 4})
  weights = NO_WEIGHTS._replace(load_balancing=jnp.float32(1))
  gradient, parts = trainer.gradient(rows, weights)
  task, _ = trainer.gradient(rows, NO_WEIGHTS)
  single = tiny.trainer({**scope, 'data.batch_size': 4})
  start_params = single.state.params

  def sums_at(params):
    single.state = single.state._replace(params=params)
    micros = ({k: v[i : i + 4] for k, v in rows.items()} for i in range(0, 16, 4))
    return [over_scopes(single.gradient(m, NO_WEIGHTS)[1].router_sums) for m in micros]

  at_start = jax.tree.map(lambda x: np.asarray(x, np.float64), sums_at(start_params))
  so_far = np.cumsum(np.array([s.tokens_per_expert for s in at_start]), axis=0)
  load = so_far / so_far.sum(-1, keepdims=True)  # [micro-batches, L, E]
  tokens = np.array([s.tokens[0] for s in at_start])

  def loss(sums):
    prob = np.array([np.asarray(s.prob_sum, np.float64) for s in sums]) / tokens[:, None, None]
    values = load.shape[-1] * np.sum(load * prob, axis=-1)  # [micro-batches, L]
    return tokens @ values / tokens.sum()

  np.testing.assert_allclose(parts.auxiliary.load_balancing, loss(at_start), rtol=1e-5)
  counts = np.array([s.tokens_per_expert for s in at_start])
  own = counts / counts.sum(-1, keepdims=True)
  assert np.abs(own - load).max() > 0.01  # not what microbatch would have

  # Slope along a direction of the last layer's router, whose own tokens do not depend on it.
  router = np.asarray(start_params['layers']['block_0']['moe']['router'])
  direction = np.zeros(router.shape, np.float32)
  direction[-1] = np.random.default_rng(0).normal(size=router.shape[1:])

  def at(epsilon):
    params = jax.tree.map(np.asarray, start_params)
    params['layers']['block_0']['moe']['router'] = router + epsilon * direction
    return sums_at(params)

  slope = (loss(at(1e-2))[-1] - loss(at(-1e-2))[-1]) / 2e-2 / load.shape[1]  # mean over layers
  auxiliary = jax.tree.map(jnp.subtract, gradient, task)['layers']['block_0']['moe']['router']
  assert abs(slope) > 1e-4
  np.testing.assert_allclose(np.sum(np.asarray(auxiliary) * direction), slope, rtol=2e-2)


def test_rates_and_weights_are_arguments_of_one_program():
  config = {'moe.router': 'loss_free', 'optim.name': 'adamw', 'optim.warmup_steps': 0}
  rows = tiny.batch(16, 16)
  one = tiny.trainer(config)
  for changes in ({'optim.learning_rate': 0.05}, {'moe.bias_rate': 0.5}):
    other = tiny.trainer({**config, **changes})
    other(rows, LARGE_WEIGHTS)
    one.reset()
    one(rows, LARGE_WEIGHTS)
    unchanged = jax.device_get(one.state)
    one.reset()
    known, one.hyperparameters = one.hyperparameters, other.hyperparameters
    one(rows, LARGE_WEIGHTS)
    one.hyperparameters = known
    # The first step's program, told the other's numbers, does what the other's does.
    tiny.assert_equal(one.state, other.state)
    moved = 'params' if 'optim.learning_rate' in changes else 'router_state'
    differs = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(getattr(unchanged, moved)),
        jax.tree.leaves(getattr(one.state, moved)),
        strict=True,
      )
    ]
    assert not all(differs)
  assert one.step._cache_size() == 1


def test_a_router_state_that_is_not_finite_ends_the_run():
  trainer = tiny.trainer({'moe.router': 'loss_free', 'optim.name': 'adamw'})
  metrics = trainer(tiny.batch(16, 16), LARGE_WEIGHTS)
  record = {'objective': 1.0, 'grad_norm': 1.0}
  assert divergence.not_finite(metrics, record) is None
  state = trainer.state
  bias = {'bias': state.router_state['bias'].at[0, 0].set(jnp.inf)}
  trainer.state = state._replace(router_state=bias)
  metrics = trainer(tiny.batch(16, 16), LARGE_WEIGHTS)
  # The loss does not show it: the expert is chosen by everyone, its gate is as before.
  assert np.isfinite(metrics.objective)
  assert divergence.not_finite(metrics, record)[0] == 'router_state'
  assert divergence.not_finite(metrics, {**record, 'objective': np.inf}) == ('loss', np.inf)
  assert divergence.not_finite(metrics, {**record, 'grad_norm': np.inf}) == (
    'gradient norm',
    np.inf,
  )


def test_the_average_load_is_a_moving_average_over_steps():
  trainer = tiny.trainer({'train.load_decay': 0.75})
  average = 0.0
  for seed in range(3):
    metrics = trainer(tiny.batch(16, 16, seed), LARGE_WEIGHTS)
    counts = np.asarray(metrics.router_sums.tokens_per_expert, np.float64)
    average = 0.75 * average + 0.25 * counts / counts.sum(-1, keepdims=True)
    np.testing.assert_allclose(metrics.average_load, average, rtol=1e-5)
  np.testing.assert_array_equal(trainer.state.average_load['experts'], metrics.average_load)


def test_accumulation_is_the_same_on_a_mesh():
  rows = tiny.batch(32, 16)
  overrides = {
    'data.batch_size': 32,
    'train.accumulation_steps': 4,
    'train.accumulation_scope': 'batch',
  }
  expected = tiny.trainer(overrides).gradient(rows, LARGE_WEIGHTS)
  tiny.assert_close(tiny.trainer(overrides, (2, 4)).gradient(rows, LARGE_WEIGHTS), expected)


def test_an_sgd_step_is_parameters_minus_learning_rate_times_gradient():
  trainer, rows = tiny.trainer(), tiny.batch(16, 16)
  before = tiny.leaves(trainer.state.params)
  grads = tiny.leaves(trainer.gradient(rows, LARGE_WEIGHTS)[0])
  metrics = trainer(rows, LARGE_WEIGHTS)
  after = tiny.leaves(trainer.state.params)
  tiny.assert_close(after, {name: before[name] - 0.1 * grads[name] for name in before})
  norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
  np.testing.assert_allclose(metrics.learning_rate, 0.1)
  assert trainer.state.step == 1


def test_the_reported_loss_has_no_auxiliary_part():
  trainer, rows = tiny.trainer(), tiny.batch(16, 16)
  batch = put_batch(rows, trainer.task)
  read = (batch[name] for name in ('inputs', 'segment_ids', 'positions'))
  compiled = jax.jit(lambda params, *read: forward(trainer.task.network, params, *read))
  logits = compiled(trainer.state.params, *read).logits
  nats = tiny.cross_entropy_sum(logits, batch['targets'], batch['segment_ids'])
  tokens = (rows['segment_ids'] > 0).sum()
  metrics = trainer(rows, LARGE_WEIGHTS)
  np.testing.assert_allclose(metrics.cross_entropy, nats / tokens, rtol=1e-5)
  added = objective.weighted_sum(metrics.auxiliary, LARGE_WEIGHTS, 'mean')
  np.testing.assert_allclose(metrics.objective, nats / tokens + added, rtol=1e-5)
  assert added > 1
  assert metrics.tokens == tokens


def without_slots(result):
  """(gradient, parts) without the number of slots, which grows with padding."""
  gradient, parts = result
  return gradient, parts._replace(router_sums=parts.router_sums._replace(slots=None))


def test_rows_of_padding_change_nothing_whatever_stands_in_them():
  rows = tiny.batch(4, 16)
  longer = {name: np.pad(value, ((0, 12), (0, 0))) for name, value in rows.items()}
  padding = longer['segment_ids'] == 0
  longer['inputs'][padding], longer['targets'][padding] = 77, 99
  short = tiny.trainer({**DROPLESS, 'data.batch_size': 4}).gradient(rows, LARGE_WEIGHTS)
  result = tiny.trainer(DROPLESS).gradient(longer, LARGE_WEIGHTS)
  tiny.assert_close(without_slots(result), without_slots(short))


def test_packed_documents_are_computed_as_if_each_had_a_row():
  packed = tiny.batch(4, 16, padded=False)
  apart = {name: np.zeros((16, 16), np.int32) for name in packed}
  for row in range(4):
    for document in (1, 2):
      cells = packed['segment_ids'][row] == document
      for name, value in packed.items():
        apart[name][2 * row + document - 1, : cells.sum()] = value[row, cells]
  apart['segment_ids'] = np.minimum(apart['segment_ids'], 1)
  one = tiny.trainer({**DROPLESS, 'data.batch_size': 4}).gradient(packed, LARGE_WEIGHTS)
  result = tiny.trainer(DROPLESS).gradient(apart, LARGE_WEIGHTS)
  tiny.assert_close(without_slots(one), without_slots(result))


def test_weights_are_arguments_and_weight_zero_still_reports():
  trainer = tiny.trainer()
  for _ in range(2):
    trainer(tiny.batch(16, 16), LARGE_WEIGHTS)
  before = trainer.step._cache_size()
  metrics = trainer(tiny.batch(16, 16, seed=1), NO_WEIGHTS)
  assert trainer.step._cache_size() == before
  np.testing.assert_allclose(metrics.objective, metrics.cross_entropy)
  assert np.all(np.asarray(metrics.auxiliary.load_balancing) > 0.9)
  assert np.all(np.asarray(metrics.auxiliary.router_z) > 0)
  assert np.all(np.asarray(metrics.auxiliary.importance) > 0)
  assert np.all(np.asarray(metrics.auxiliary.entropy) > 0)
  assert np.all(np.asarray(metrics.auxiliary.device_balance) > 0.9)


def _is_expert_matrix(name):
  return re.search(r"'moe'\]\['w_(in|out)'\]", name) is not None


@pytest.mark.parametrize(
  # How many arrays the optimizer keeps for each parameter.
  ('optimizer', 'kept'),
  [('sgd', 1), ('adamw', 2), ('muon', 1), ('adafactor', 3)],
)
def test_experts_stay_sharded_with_their_optimizer_state(optimizer, kept):
  overrides = {'optim.name': optimizer, 'optim.momentum': 0.9}
  trainer = tiny.trainer(overrides, (2, 4))
  old = trainer.state
  before = jax.tree.map(lambda x: x.sharding, old)
  compiled = trainer.step.lower(
    old, put_batch(tiny.batch(16, 16), trainer.task), trainer.hyperparameters
  ).compile()
  _assert_no_experts_gathered(compiled.as_text())
  trainer(tiny.batch(16, 16), NO_WEIGHTS)
  # Donated. (What no update reads, Adafactor's placeholders, stays behind.)
  assert all(
    leaf.is_deleted()
    for leaf in jax.tree.leaves((old.params, old.opt_state))
    if leaf.size > 8 and leaf.shape[-1] > 1
  )
  assert before == jax.tree.map(lambda x: x.sharding, trainer.state)
  num_sharded = 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(trainer.state)[0]:
    name, shape = jax.tree_util.keystr(path), leaf.shape
    if _is_expert_matrix(name) and leaf.ndim >= 3:
      num_sharded += 1
      layers, experts, *rest = shape
      # E / expert axis = 8 / 4: two experts on each of the 8 devices.
      shape = (layers, experts // 4, *rest)
    assert [shard.data.shape for shard in leaf.addressable_shards] == [shape] * 8, name
  assert num_sharded == 2 * (1 + kept)


def _assert_no_experts_gathered(text):
  """No collective may bring together the experts of several devices, whole or part by part."""
  gathers = re.findall(r'= *\(?(\w+\[[\d,]*\])\S* all-gather', text)
  # An expert's matrices are D x 2F = 16 x 32 and F x D = 16 x 16.
  assert not [shape for shape in gathers if re.search(r'16,(16|32)\]', shape)], gathers
  assert 'all-to-all' in text


@pytest.mark.parametrize('scope', ['global', 'device'])
def test_initial_state_is_made_sharded_and_is_the_same_as_on_one_device(scope):
  expected = tiny.trainer().state
  trainer = tiny.trainer({'moe.balance_scope': scope}, (2, 4))
  with jax.set_mesh(trainer.mesh):
    made = init_state(trainer.task, trainer.optimizer, 0)
  tiny.assert_equal(made, expected)
  for leaf, sharding in zip(
    jax.tree.leaves(made),
    jax.tree.leaves(state_shardings(trainer.task, trainer.optimizer)),
    strict=True,
  ):
    assert leaf.sharding == sharding


def test_overfits_one_batch():
  overrides = {'optim.name': 'adamw', 'optim.learning_rate': 0.01, 'model.embed_dim': 32}
  trainer = tiny.trainer({**overrides, 'train.num_steps': 250})
  rows = tiny.batch(16, 16)
  weights = _weights(0.01, 0.001, 0, 0, 0, 0)
  first = float(trainer(rows, weights).cross_entropy)
  for _ in range(249):
    metrics = trainer(rows, weights)
  assert first > 5
  assert float(metrics.cross_entropy) < 0.05
