"""Churn: what part of the assignments changed between two checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import eval_batches
from moe_jax.models.build import build_task
from moe_jax.models.decoder import Decoder, forward
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import setup
from moe_jax.train import routing_change
from moe_jax.train.state import init_params, params_shardings
from tests import tiny

LENGTH, BATCH = 16, 16


def test_churn_by_hand():
  # Layer 0: 10 and 10 assignments, 7 in both: 3 of 10 changed. Layer 1: 4 and 8, 3 in both:
  # 1 - 2 * 3 / 12. Layer 2: no token selected any.
  overlap = routing_change.Overlap(
    *(np.array(n, float) for n in ([10, 4, 0], [10, 8, 0], [7, 3, 0]))
  )
  np.testing.assert_allclose(routing_change._summary(overlap)['router/churn'], [0.3, 0.5, 1.0])


@pytest.fixture(scope='module')
def dataset(text):
  return setup.dataset_of(tiny.config(text))


def model_and_weights(mesh, router='top_k'):
  """A model whose forward pass says its choices, and weights before and after some change."""
  overrides = {'moe.router': router}
  if router == 'expert_choice':
    overrides['moe.renormalize'] = 'none'
  overrides |= {'mesh.data': mesh[0], 'mesh.expert': mesh[1]}
  model = build_task(
    tiny.config(overrides), make_mesh(*mesh), tiny.VOCAB_SIZE, 'eval'
  ).with_selected()
  one = build_task(tiny.config(overrides), make_mesh(1, 1), tiny.VOCAB_SIZE, 'eval')
  state = model.init_router_state()
  shardings = params_shardings(model)
  weights = []
  for seed in (0, 1):
    params = jax.device_get(jax.jit(functools.partial(init_params, one))(jnp.int32(0)))
    moe = params['layers']['block_0']['moe']
    noise = np.random.default_rng(seed).normal(size=moe['router'].shape) * 0.02
    moe['router'] = moe['router'] + np.float32(seed) * noise.astype(np.float32)
    weights.append(routing_change.Weights(jax.device_put(params, shardings), state))
  return model, weights


def churn_of(dataset, mesh, router='top_k', same=False):
  model, weights = model_and_weights(mesh, router)
  with jax.set_mesh(model.mesh):
    return routing_change.churn(
      routing_change.make_overlap_step(model),
      model,
      weights[0],
      weights[0] if same else weights[1],
      dataset,
      split='test',
      sequence_length=LENGTH,
      batch_size=BATCH,
    )


def test_counts_sets_of_experts_token_by_token(dataset):
  model, weights = model_and_weights((1, 1))
  read = ('inputs', 'segment_ids', 'positions')
  choose = jax.jit(lambda params, *rows: forward(model.network, params, *rows).choices)
  shared, asked = np.zeros(2), np.zeros(2)
  windows = dataset.windows('test', LENGTH)
  for rows in eval_batches(windows, batch_size=1, process_index=0, process_count=1):
    one, other = (np.asarray(choose(w.params, *(rows[name] for name in read))) for w in weights)
    assert ((one >= 0).all(-1) == (rows['segment_ids'] > 0)).all()
    for layer in range(2):
      for a, b in zip(one[layer].reshape(-1, 2), other[layer].reshape(-1, 2), strict=True):
        shared[layer] += len({*a.tolist()} & {*b.tolist()} - {-1})
        asked[layer] += (a >= 0).sum()
  result = churn_of(dataset, (1, 1))
  # Domains are packed apart; who is chosen depends on the token's document alone, but for layer 1,
  # where drops in layer 0 tell.
  np.testing.assert_allclose(result['router/churn'], 1 - shared / asked, rtol=0, atol=0.01)
  assert 0.02 < result['router/churn'][0] < 0.98
  assert list(result['domains']) == ['prose', 'verse']


@pytest.mark.parametrize('router', ['top_k', 'expert_choice', 'remoe'])
def test_is_the_same_on_any_mesh_and_zero_for_the_same_weights(dataset, router):
  expected = churn_of(dataset, (1, 1), router)
  assert 0 < expected['router/churn'][0] < 1
  result = churn_of(dataset, (2, 4), router)
  np.testing.assert_allclose(result['router/churn'], expected['router/churn'], atol=1e-6)
  assert churn_of(dataset, (1, 1), router, same=True)['router/churn'] == [0, 0]


def test_what_a_rounded_product_of_the_router_changes(dataset):
  """A few assignments: those whose logits are close."""
  model, weights = model_and_weights((2, 4))
  choice = dataclasses.replace(model.moe.choice, router_dtype='bfloat16')
  moe = dataclasses.replace(model.moe, choice=choice)
  options = dataclasses.replace(model.network.options, moe=moe)
  narrow = dataclasses.replace(model, network=Decoder(options, model.mesh))
  step = routing_change.make_overlap_step(model, narrow)
  with jax.set_mesh(model.mesh):
    result = routing_change.churn(
      step,
      model,
      weights[1],
      weights[1],
      dataset,
      split='test',
      sequence_length=LENGTH,
      batch_size=BATCH,
    )
  assert 0 < result['router/churn'][0] < 0.1
