"""Counts of the experts that tokens selected, against loops over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.models.build import build_task
from moe_jax.models.task import Selected
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.sharding import batch_sharding
from moe_jax.train import routing_counts
from tests import tiny

NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE = 2, 8, tiny.VOCAB_SIZE


def test_membership_by_hand():
  # A token that selects 2 and 0; one that selects only 3; padding.
  choices = jnp.array([[[2, 0], [3, -1], [-1, -1]]])
  expected = [[[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]]
  np.testing.assert_array_equal(routing_counts.membership(choices, 4), np.array(expected, bool))


def model_of(mesh, router='top_k', **overrides):
  overrides = {f'{key}': value for key, value in overrides.items()}
  settings = {'mesh.data': mesh[0], 'mesh.expert': mesh[1], 'moe.router': router, **overrides}
  return build_task(tiny.config(settings), make_mesh(*mesh), VOCAB_SIZE, 'eval')


def batches():
  """Choices of any number of experts, none of padding; ids that repeat."""
  rng = np.random.default_rng(0)
  for _ in range(2):
    valid = rng.random((8, 5)) < 0.8
    inputs = rng.integers(0, VOCAB_SIZE, (8, 5)) % 7
    choices = np.argsort(rng.random((NUM_LAYERS, 8, 5, NUM_EXPERTS)), -1)[..., :3]
    selected = valid[None, ..., None] & (rng.random(choices.shape) < 0.7)
    yield np.where(selected, choices, -1).astype(np.int32), inputs.astype(np.int32), valid


def counted_by_loops():
  tokens = np.zeros(VOCAB_SIZE, int)
  by_token = np.zeros((NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS), int)
  together = np.zeros((NUM_LAYERS, NUM_EXPERTS, NUM_EXPERTS), int)
  by_number = np.zeros((NUM_LAYERS, NUM_EXPERTS + 1), int)
  for choices, inputs, valid in batches():
    for b, t in np.argwhere(valid):
      tokens[inputs[b, t]] += 1
      for layer in range(NUM_LAYERS):
        selected = [e for e in choices[layer, b, t].tolist() if e >= 0]
        by_number[layer, len(selected)] += 1
        for e in selected:
          by_token[layer, inputs[b, t], e] += 1
          for f in selected:
            together[layer, e, f] += 1
  return tokens, by_token, together, by_number


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_counts_are_those_of_loops_on_any_mesh(mesh):
  model = model_of(mesh)
  add = jax.jit(functools.partial(routing_counts.add_batch, mesh=model.mesh), donate_argnums=0)
  counts = routing_counts.new_counts(model)
  for choices, inputs, valid in batches():
    rows = jax.device_put((inputs, valid), batch_sharding(model.mesh))
    counts = add(counts, Selected(choices, *rows))
  found = routing_counts.fetch(counts, model.mesh)
  for one, other in zip(found, counted_by_loops(), strict=True):
    np.testing.assert_array_equal(one, other)


def test_too_large_a_table_of_token_ids_is_not_kept(monkeypatch):
  model = model_of((1, 1))
  entries = NUM_LAYERS * VOCAB_SIZE * NUM_EXPERTS
  monkeypatch.setattr(routing_counts, 'MOST_ENTRIES', entries)
  assert routing_counts.new_counts(model).by_token.shape[1:] == (2, VOCAB_SIZE, 8)
  monkeypatch.setattr(routing_counts, 'MOST_ENTRIES', entries - 1)
  assert routing_counts.new_counts(model).by_token is None


def test_nothing_is_counted_where_nobody_is_chosen():
  dense = model_of((1, 1), **{'moe.num_experts': 0})
  mixture = model_of((1, 1), 'dense', **{'moe.num_selected_experts': 8, 'moe.renormalize': 'none'})
  for model, reason in ((dense, 'no experts'), (mixture, 'every token goes to every expert')):
    assert reason in routing_counts.why_not(model)
    assert routing_counts.new_counts(model) is None
  chosen = model_of((1, 1))
  assert not routing_counts.why_not(chosen)
  assert chosen.with_selected().moe.returns_choices and dense.with_selected() is dense
