"""The compiled decoder exchanges tokens twice a layer, twice more in its gradient; no gathers."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.dispatch import exchange
from moe_jax.models.decoder import forward
from moe_jax.parallel.mesh import EXPERT_AXIS
from moe_jax.parallel.sharding import batch_sharding
from tests import tiny
from tests.models import small_decoder


def computations(text):
  """Returns the text of each computation of an HLO module by name."""
  found = re.findall(r'^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL)
  return dict(found)


CALLS = re.compile(r'= \S.* all-to-all(?:-start)?\(')


def placed(model):
  """Parameters and tokens where training has them."""
  experts = NamedSharding(model.mesh, PartitionSpec(None, EXPERT_AXIS))
  everywhere = NamedSharding(model.mesh, PartitionSpec())

  def place(path, leaf):
    of_experts = path[-1].key in ('w_in', 'w_out') and path[-2].key == 'moe'
    return jax.device_put(leaf, experts if of_experts else everywhere)

  params = jax.tree_util.tree_map_with_path(place, small_decoder.draw_params(model))
  tokens = jax.device_put(small_decoder.draw_tokens(16, 6), batch_sharding(model.mesh))
  return params, tokens


def exchanges_of_loops(text):
  bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
  inside = sorted(len(CALLS.findall(computations(text)[name])) for name in bodies)
  assert sum(inside) == len(CALLS.findall(text))
  return [number for number in inside if number]


def test_two_exchanges_inside_the_scan():
  model = small_decoder.make_model(mesh=(2, 4), num_layers=3, num_shared_experts=1)
  params, tokens = placed(model)
  run = jax.jit(lambda params, *tokens: forward(model, params, *tokens))
  text = run.lower(params, *tokens).compile().as_text()
  assert exchanges_of_loops(text) == [2]
  assert not re.search(r'= \S.* (all-gather|collective-permute|reduce-scatter)', text)


@pytest.mark.parametrize('remat', [False, True])
def test_recomputing_blocks_exchanges_nothing_again(remat):
  model = small_decoder.make_model(mesh=(2, 4), num_layers=3, remat=remat)
  params, tokens = placed(model)

  def loss(params):
    return jnp.sum(forward(model, params, *tokens).hidden ** 2)

  text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
  # Two in the loop over the layers forward, two in that backward.
  assert exchanges_of_loops(text) == [2, 2]


@pytest.mark.parametrize('remat', [False, True])
def test_recomputing_blocks_makes_no_ragged_exchange_again(remat, monkeypatch):
  # Lowered alone: CPUs have none.
  monkeypatch.setattr(exchange, 'RAGGED_PLATFORMS', ('cpu',))
  model = small_decoder.make_model((2, 4), {'exchange': 'ragged'}, num_layers=3, remat=remat)
  params, tokens = placed(model)

  def loss(params):
    return jnp.sum(forward(model, params, *tokens).hidden ** 2)

  text = jax.jit(jax.grad(loss)).lower(params).as_text()
  # Two in the loop over the layers forward, two in that backward; and how many rows, forward.
  assert text.count('@ragged_all_to_all(') == 4
  assert text.count('stablehlo.all_to_all') == 1


def test_recomputing_blocks_changes_no_gradient():
  grads = []
  for remat in (False, True):
    model = small_decoder.make_model(mesh=(2, 4), num_layers=3, remat=remat)
    params, tokens = placed(model)

    def loss(params, model=model, tokens=tokens):
      out = forward(model, params, *tokens, key=jax.random.key(0))
      return jnp.sum(out.logits**2) + jnp.sum(out.router_sums.prob_sum**2) / 100

    grads.append(jax.jit(jax.grad(loss))(params))
  tiny.assert_close(*grads, 1e-6)
