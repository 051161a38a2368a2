"""The compiled forward pass exchanges tokens twice in the body of its scan and gathers nothing."""

import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.models.decoder import forward
from moe_jax.parallel.mesh import EXPERT_AXIS, batch_sharding
from tests.models import small_decoder


def computations(text):
  """Returns the text of each computation of an HLO module by name."""
  found = re.findall(r'^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}', text, re.MULTILINE | re.DOTALL)
  return dict(found)


def test_two_exchanges_inside_the_scan():
  model = small_decoder.make_model(mesh=(2, 4), num_layers=3, num_shared_experts=1)
  experts = NamedSharding(model.mesh, PartitionSpec(None, EXPERT_AXIS))
  everywhere = NamedSharding(model.mesh, PartitionSpec())

  def place(path, leaf):
    of_experts = path[-1].key in ('w_in', 'w_out') and path[-2].key == 'moe'
    return jax.device_put(leaf, experts if of_experts else everywhere)

  params = jax.tree_util.tree_map_with_path(place, small_decoder.draw_params(model))
  tokens = jax.device_put(small_decoder.draw_tokens(16, 6), batch_sharding(model.mesh))
  run = jax.jit(lambda params, *tokens: forward(model, params, *tokens))
  text = run.lower(params, *tokens).compile().as_text()
  calls = re.compile(r'= \S.* all-to-all(?:-start)?\(')
  bodies = set(re.findall(r'body=%?([\w.\-]+)', text))
  inside = [len(calls.findall(computations(text)[name])) for name in bodies]
  assert sorted(inside)[-1] == sum(inside) == len(calls.findall(text)) == 2
  assert not re.search(r'= \S.* (all-gather|collective-permute|reduce-scatter)', text)
