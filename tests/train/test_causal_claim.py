"""A router's claim to be causal is checked before a run; one that lies stops it in one line."""

import dataclasses
import importlib

import jax.numpy as jnp
import pytest

from moe_jax import config as config_lib
from moe_jax import routing
from moe_jax.errors import UserError
from moe_jax.train import causal_claim
from moe_jax.train.causal_claim import check_causal_claim
from tests import tiny

ONE_DEVICE = {'mesh.data': 1, 'mesh.expert': 1}


def _from_mean(params, state, inputs, options):
  """Each token is seen less the mean of its sequence, to which later ones belong."""
  tokens = inputs.tokens - jnp.mean(inputs.tokens, axis=1, keepdims=True)
  return routing.ROUTERS['top_k'].choose(params, state, inputs._replace(tokens=tokens), options)


def _from_last(params, state, inputs, options):
  """The gate alone, and by the last token alone."""
  choice = routing.ROUTERS['top_k'].choose(params, state, inputs, options)
  return choice._replace(gates=choice.gates * (1 + 0.01 * jnp.tanh(inputs.tokens[:, -1:, :1])))


def _from_ids(params, state, inputs, options):
  """No choice at all where the last token is an odd one."""
  choice = routing.ROUTERS['top_k'].choose(params, state, inputs, options)
  return choice._replace(chosen=choice.chosen & (inputs.token_ids[:, -1:, None] % 2 == 0))


def _liar(patch, choose, name='top_k'):
  lying = dataclasses.replace(routing.ROUTERS['top_k'], name=name, choose=choose)
  patch.setitem(routing.ROUTERS, name, lying)


@pytest.mark.parametrize(
  ('choose', 'words'),
  [
    (_from_mean, 'with other tokens from position 1 on, the '),
    (_from_last, 'with other tokens from position 1 on, the gate of position 0 changed by 0.0'),
    (_from_ids, 'the expert of '),
  ],
)
@pytest.mark.parametrize('group_size', [1, 4])
def test_a_router_that_lies_is_found(choose, words, group_size, monkeypatch):
  config = tiny.config({**ONE_DEVICE, 'moe.group_size': group_size})
  _liar(monkeypatch, choose, 'liar')
  config.moe.router = 'liar'
  with pytest.raises(UserError) as error:
    check_causal_claim(config, tiny.VOCAB_SIZE)
  assert str(error.value).startswith("moe.router='liar': says that it is causal, but ")
  assert words in str(error.value)
  config.train.check_causal = False
  said = check_causal_claim(config, tiny.VOCAB_SIZE)
  assert said == 'causality: not checked: train.check_causal=False'
  config.train.check_causal = True
  admitted = dataclasses.replace(routing.ROUTERS['liar'], causal=False)
  monkeypatch.setitem(routing.ROUTERS, 'liar', admitted)
  said = check_causal_claim(config, tiny.VOCAB_SIZE)
  assert said.startswith('causality: not checked: moe.router=liar is not causal')


@pytest.mark.parametrize('name', [n for n, r in routing.ROUTERS.items() if r.causal])
def test_every_causal_router_passes_with_its_preset(name):
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  config.moe.update(capacity_factor=0.5, priority='token', group_size=2)
  assert check_causal_claim(config, tiny.VOCAB_SIZE) == (
    f'causality: checked: a redrawn future moves no past with moe.router={name}'
  )


@pytest.mark.parametrize('priority', routing.PRIORITIES)
@pytest.mark.parametrize('dispatch', ['gather', 'dropless'])
def test_what_the_manifest_calls_causal_is_checked_and_nothing_else(
  priority, dispatch, monkeypatch
):
  """Whatever the order of slots: a router that sees the future is found, also without drops."""
  overrides = {**ONE_DEVICE, 'moe.capacity_factor': 0.5}
  config = tiny.config({**overrides, 'moe.priority': priority, 'moe.dispatch': dispatch})
  claims = config_lib.is_causal(config)
  assert claims == (priority == 'token' or dispatch == 'dropless')
  said = check_causal_claim(config, tiny.VOCAB_SIZE)
  if claims:
    assert said.startswith('causality: checked: ')
  else:
    assert said.startswith(f'causality: not checked: moe.priority={priority} is not causal')
  _liar(monkeypatch, _with_mean)
  if claims:
    with pytest.raises(UserError, match='says that it is causal'):
      check_causal_claim(config, tiny.VOCAB_SIZE)
  else:
    assert check_causal_claim(config, tiny.VOCAB_SIZE) == said


def test_a_dense_model_has_nothing_to_check():
  said = check_causal_claim(tiny.config({**ONE_DEVICE, 'moe.num_experts': 0}), tiny.VOCAB_SIZE)
  assert said == 'causality: not checked: a model without experts has no router'


@pytest.mark.parametrize(
  'name', [n for n, r in routing.ROUTERS.items() if not r.causal and not r.rejected]
)
def test_every_other_router_would_be_found_if_it_lied(name, monkeypatch):
  router = routing.ROUTERS[name]
  config = importlib.import_module(f'configs.presets.{name}').get_config()
  config.moe.update(priority='token')
  monkeypatch.setitem(routing.ROUTERS, name, dataclasses.replace(router, causal=True))
  with pytest.raises(UserError, match='says that it is causal'):
    check_causal_claim(config, tiny.VOCAB_SIZE)


@pytest.mark.parametrize('priority', [p for p in routing.PRIORITIES if p != 'token'])
def test_an_order_of_slots_that_lies_is_found(priority, monkeypatch):
  """Dropping is looked at, too."""
  config = tiny.config({**ONE_DEVICE, 'moe.priority': priority, 'moe.capacity_factor': 0.5})
  check_causal_claim(config, tiny.VOCAB_SIZE)
  monkeypatch.setattr(causal_claim.config_lib, 'why_not_causal', lambda config: None)
  with pytest.raises(UserError, match='the slot of '):
    check_causal_claim(config, tiny.VOCAB_SIZE)


def test_training_stops_in_one_line_before_it_begins(text, tmp_path, monkeypatch):
  path, workdir = tiny.config_file(tmp_path, {**text, **ONE_DEVICE}), tmp_path / 'run'
  _liar(monkeypatch, _with_mean)
  result = tiny.command('train', f'--config={path}', f'--workdir={workdir}')
  result.assert_error("moe.router='top_k': says that it is causal", 'train.check_causal=False')
  assert not workdir.exists()


def _with_mean(params, state, inputs, options):
  tokens = inputs.tokens - jnp.mean(inputs.tokens, axis=1, keepdims=True)
  logits = jnp.einsum('gsd,de->gse', tokens, params['router'])
  return routing.choose_top_k(logits, num_selected_experts=options.num_selected_experts)
