"""Evaluation: every token of a split once, on any mesh."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import data
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.models.decoder import forward
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import setup
from moe_jax.train import evaluate, evaluation_batches
from moe_jax.train.expert_similarity import expert_similarity
from moe_jax.train.state import init_params, params_shardings
from tests import tiny

LENGTH, BATCH = 16, 16


@functools.cache
def _model(mesh):
  config = tiny.config({'mesh.data': mesh[0], 'mesh.expert': mesh[1]})
  model = build_task(config, make_mesh(*mesh), tiny.VOCAB_SIZE, 'eval')
  params = jax.jit(
    lambda: init_params(_model((1, 1))[0] if mesh != (1, 1) else model, jnp.int32(0))
  )
  return model, jax.device_put(jax.device_get(params()), params_shardings(model))


@functools.cache
def _step(mesh):
  return evaluate.make_eval_step(_model(mesh)[0])


def _evaluate(dataset, mesh=(1, 1), split='test', with_matrices=True, **more):
  more['with_matrices'] = with_matrices
  model, params = _model(mesh)
  sizes = {'sequence_length': LENGTH, 'batch_size': BATCH}
  with jax.set_mesh(model.mesh):
    return evaluate.evaluate(_step(mesh), model, params, {}, dataset, split=split, **sizes, **more)


@pytest.fixture(scope='module')
def dataset(text):
  return setup.dataset_of(tiny.config(text))


@pytest.fixture(scope='module')
def result(dataset):
  return _evaluate(dataset)


def test_bits_per_byte_is_that_of_all_windows(dataset, result):
  """Computed apart: log-softmax in NumPy, window by window, over the bytes of the documents."""
  model, params = _model((1, 1))
  logits = jax.jit(lambda params, *rows: forward(model.network, params, *rows).logits)
  nats, tokens = 0.0, 0
  windows = dataset.windows('test', LENGTH)
  for index in range(len(windows)):
    row = {name: np.asarray(value)[None] for name, value in windows[index].items()}
    out = np.asarray(
      logits(params, row['inputs'], row['segment_ids'], row['positions']), np.float64
    )
    log_probs = out - np.log(np.sum(np.exp(out), -1, keepdims=True))
    picked = np.take_along_axis(log_probs, row['targets'][..., None], -1)[..., 0]
    nats -= picked[row['segment_ids'] > 0].sum()
    tokens += (row['segment_ids'] > 0).sum()
  num_bytes = sum(len(text) for text in dataset.document_text('test'))
  assert result['tokens'] == tokens == dataset.num_tokens('test')
  assert result['bytes'] == num_bytes
  # Domains are packed apart, so windows differ, and with them which tokens are dropped: hence 1e-3.
  np.testing.assert_allclose(result['loss'], nats / tokens, rtol=1e-3)
  np.testing.assert_allclose(result['bits_per_byte'], nats / math.log(2) / num_bytes, rtol=1e-3)


def test_domains_add_up_to_all(result):
  domains = result['domains']
  assert list(domains) == ['prose', 'verse']
  for name in ('tokens', 'bytes'):
    assert sum(domain[name] for domain in domains.values()) == result[name]
  nats = sum(domain['loss'] * domain['tokens'] for domain in domains.values())
  np.testing.assert_allclose(result['loss'], nats / result['tokens'], rtol=1e-6)
  load = sum(np.asarray(d['router/load']) * d['tokens'] for d in domains.values())
  np.testing.assert_allclose(result['router/load'], load / result['tokens'], rtol=1e-6)


def test_the_mesh_does_not_matter(dataset, result):
  other = _evaluate(dataset, mesh=(2, 4))
  for name in ('loss', 'bits_per_byte', 'router/entropy'):
    np.testing.assert_allclose(other[name], result[name], rtol=1e-5)
  for name in ('router/load', 'router/load_kept', 'router/coactivation_matrix'):
    np.testing.assert_array_equal(other[name], result[name])
  for name in MEASURES:
    np.testing.assert_allclose(other[f'router/{name}'], result[f'router/{name}'], rtol=1e-5)


MEASURES = (
  'expert_domain_mi',
  'expert_token_mi',
  'domain_load_overlap',
  'coactivation',
  'expert_similarity',
)


def test_specialisation_is_that_of_the_choices_of_all_tokens(dataset, result):
  """Counted apart, token by token, from what the forward pass says of its choices."""
  model, params = _model((1, 1))
  model = model.with_selected()
  read = ('inputs', 'segment_ids', 'positions')
  choose = jax.jit(lambda params, *rows: forward(model.network, params, *rows).choices)
  labels, sets = [], []
  for number, domain in enumerate(dataset.domains):
    for batch in evaluation_batches.domain_batches(dataset, model, 'test', domain, LENGTH, BATCH):
      choices = np.asarray(choose(params, *(batch[name] for name in read)))
      for b, t in np.argwhere(np.asarray(batch['segment_ids']) > 0):
        labels.append((number, int(batch['inputs'][b, t])))
        sets.append([[e in choices[layer, b, t] for e in range(8)] for layer in range(2)])
  labels, sets = np.array(labels), np.array(sets, int)
  assert len(labels) == result['tokens'] and (sets.sum(-1) == 2).all()
  for layer in range(2):
    asked = sets[:, layer]
    for label, name in enumerate(('domain', 'token')):
      joint = np.zeros((tiny.VOCAB_SIZE, 8))
      np.add.at(joint, labels[:, label], asked)
      p = joint / joint.sum()
      independent = p.sum(0) * p.sum(1, keepdims=True)
      seen = p > 0
      expected = np.sum(p[seen] * np.log2(p[seen] / independent[seen]))
      found = [result[f'router/expert_{name}_mi{end}'][layer] for end in ('', '_baseline')]
      assert sum(found) == pytest.approx(expected)
      assert 0 < found[1] < expected
    loads = np.array([d['router/load'][layer] for d in result['domains'].values()])
    overlap = np.minimum(*loads).sum()
    assert result['router/domain_load_overlap'][layer] == pytest.approx(overlap, rel=1e-5)
    shares = asked.T @ asked / asked.sum(0)[:, None]
    np.testing.assert_allclose(result['router/coactivation_matrix'][layer], shares)


def test_similarity_of_experts_is_the_mean_absolute_cosine(result):
  _, params = _model((1, 1))
  moe = params['layers']['block_0']['moe']
  for layer in range(2):
    means = []
    for name in ('w_in', 'w_out'):
      rows = np.asarray(moe[name][layer], np.float64).reshape(8, -1)
      rows /= np.linalg.norm(rows, axis=1, keepdims=True)
      means.append(np.mean([abs(rows[e] @ rows[f]) for e in range(8) for f in range(e)]))
    assert result['router/expert_similarity'][layer] == pytest.approx(np.mean(means), rel=1e-4)
    # New experts are as alike as random directions.
    assert result['router/expert_similarity_baseline'][layer] == pytest.approx(
      np.mean(means), rel=0.25
    )


def test_experts_that_are_equal_have_similarity_1():
  model, params = _model((1, 1))
  moe = params['layers']['block_0']['moe']
  same = {name: jnp.repeat(moe[name][:, :1], 8, axis=1) for name in ('w_in', 'w_out')}
  params = {'layers': {'block_0': {'moe': same}}}
  found = expert_similarity(model, params)['router/expert_similarity']
  np.testing.assert_allclose(found, 1, rtol=1e-5)


@pytest.mark.parametrize('router', ['remoe', 'dense'])
def test_routers_without_k_choices_of_each_token(dataset, router):
  """ReMoE selects any number of experts; where all are taken there is no choice to measure."""
  overrides = {'mesh.data': 1, 'mesh.expert': 1, 'moe.router': router, 'model.num_layers': 1}
  if router == 'dense':
    overrides |= {'moe.num_selected_experts': 8, 'moe.renormalize': 'none'}
  model = build_task(tiny.config(overrides), make_mesh(1, 1), tiny.VOCAB_SIZE, 'eval')
  sizes = {'sequence_length': LENGTH, 'batch_size': BATCH}
  state = model.init_router_state()
  with jax.set_mesh(model.mesh):
    params = jax.jit(lambda: init_params(model, jnp.int32(0)))()
    step = evaluate.make_eval_step(model)
    found = evaluate.evaluate(step, model, params, state, dataset, split='test', **sizes)
  measured = {name for name in MEASURES if f'router/{name}' in found}
  assert measured == ({*MEASURES} if router == 'remoe' else {'expert_similarity'})
  if router == 'remoe':
    # New routers: half of the experts, by the token's embedding alone.
    assert found['router/expert_token_mi'][0] > 10 * found['router/expert_token_mi_baseline'][0]


def test_matrices_are_left_out_unless_wanted(dataset, result):
  plain = _evaluate(dataset, with_matrices=False)
  assert {*result} - {*plain} == {'router/coactivation_matrix'}
  assert json.dumps(plain, allow_nan=False)


def test_trials_evaluated_together_get_what_they_get_alone(dataset):
  """On a mesh; tables of counts included."""
  model, params = _model((2, 4))
  sizes = {'split': 'test', 'sequence_length': LENGTH, 'batch_size': BATCH}
  with jax.set_mesh(model.mesh):
    new = jax.jit(lambda: init_params(model, jnp.int32(1)), out_shardings=params_shardings(model))
    weights = [(params, {}), (new(), {})]
    together = evaluate.evaluate_packed(
      evaluate.make_eval_step(model, packed=True), model, weights, dataset, **sizes
    )
    alone = [
      evaluate.evaluate(_step((2, 4)), model, *of_trial, dataset, **sizes) for of_trial in weights
    ]
  assert together[0]['router/load'] != together[1]['router/load']
  for one, other in zip(together, alone, strict=True):
    assert one.keys() == other.keys() and 'router/expert_token_mi' in one
    assert one['domains'].keys() == other['domains'].keys()
    pairs = [(one, other), *((one['domains'][d], other['domains'][d]) for d in one['domains'])]
    for summary, wanted in pairs:
      for name, value in wanted.items():
        if name not in ('split', 'domains'):
          np.testing.assert_allclose(summary[name], value, 1e-5, 1e-6, err_msg=name)


def test_evaluation_is_not_random(dataset, result):
  assert _evaluate(dataset) == result


def test_each_batch_is_counted(dataset):
  seen = []
  _evaluate(dataset, split='train', on_batch=lambda: seen.append(None))
  assert len(seen) == evaluation_batches.num_batches(dataset, 'train', LENGTH, BATCH) > 2


def test_a_part_of_the_split_has_no_bits_per_byte(dataset):
  part = _evaluate(dataset, split='train', max_batches=1)
  assert 'bits_per_byte' not in part
  assert part['tokens'] < dataset.num_tokens('train')


def test_a_split_that_is_not_there_is_an_error(dataset):
  with pytest.raises(UserError, match="split='tset'"):
    _evaluate(dataset, split='tset')


def test_a_split_without_documents_is_an_error(tmp_path):
  (tmp_path / 'one.txt').write_text('The only document is trained on.')
  single = data.open_dataset(f'text:{tmp_path}', data_dir=str(tmp_path / 'data'))
  with pytest.raises(UserError, match="split='test'"):
    _evaluate(single)
