"""Runs trained as one program against each of them trained alone."""

import contextlib
import json

import jax
import numpy as np
import pytest

from moe_jax import optim
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.parallel.mesh import make_mesh
from moe_jax.run import manifest, packed, progress, single
from moe_jax.run.checkpoint import Checkpoints
from moe_jax.run.metrics_file import read_metrics
from moe_jax.train.state import abstract_state
from tests import tiny

# Whatever a pack may differ in; loss_free alone has bias_rate, too.
HYPERPARAMETERS = (
  {'train.seed': 0, 'optim.learning_rate': 0.01},
  {'train.seed': 1, 'optim.learning_rate': 0.01, 'moe.load_balancing_weight': 0.5},
  {'train.seed': 0, 'optim.learning_rate': 0.03, 'moe.router_z_weight': 0.1},
  {'train.seed': 2, 'optim.learning_rate': 0.003},
)
# Adam divides an element's gradient by its own size. Where its terms cancel, rounding (1e-10 here)
# is a large part of what is left, and with an epsilon of 1e-8 it moves the parameter as a gradient
# would; 1e-5 is far above it and below most gradients (1e-4 in experts, 1e-3 elsewhere).
COMMON = {
  'optim.name': 'adamw',
  'optim.epsilon': 1e-5,
  'train.num_steps': 8,
  'train.checkpoint_every': 3,
}
NOBODY = progress.Listener(lambda line: None, lambda step: None)


def configs_of(text, router):
  common = {**text, **COMMON, 'moe.router': router}
  if router == 'noisy_top_k':
    common['moe.softmax_order'] = 'after'
    common['moe.renormalize'] = 'none'
  configs = [tiny.config({**common, **hyperparameters}) for hyperparameters in HYPERPARAMETERS]
  if router == 'loss_free':
    configs[3].moe.bias_rate = 0.1
  return configs


def final_state(workdir, config):
  mesh = make_mesh(config.mesh.data, config.mesh.expert)
  model = build_task(config, mesh, tiny.VOCAB_SIZE, 'eval')
  optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
  with contextlib.closing(Checkpoints(str(workdir), read_only=True)) as checkpoints:
    step, state, position = checkpoints.restore(abstract_state(model, optimizer))
  return step, jax.device_get(state), position


def assert_same_runs(one, other, config):
  """Same metrics and state within rounding; same position in the data, to the bit."""
  lines = [read_metrics(folder / 'metrics.jsonl') for folder in (one, other)]
  assert [line['step'] for line in lines[0]] == [line['step'] for line in lines[1]]
  for line, wanted in zip(*lines, strict=True):
    assert line['tokens'] == wanted['tokens']
    for name in ('loss', 'objective', 'grad_norm', 'learning_rate', 'router/load_cv'):
      np.testing.assert_allclose(line[name], wanted[name], rtol=1e-4, err_msg=name)
  step, state, position = final_state(one, config)
  wanted_step, wanted_state, wanted_position = final_state(other, config)
  assert (step, position) == (wanted_step, wanted_position)
  tiny.assert_close(state.params, wanted_state.params, 3e-5)
  # Counts and signs of counts: no token went to another expert.
  tiny.assert_equal(state.router_state, wanted_state.router_state)
  tiny.assert_close(state.average_load, wanted_state.average_load, 1e-6)
  assert state.seed == wanted_state.seed
  for folder in (one, other):
    assert manifest.read(folder)['status'] == 'finished'


@pytest.mark.parametrize('router', ['loss_free', 'noisy_top_k'])
def test_each_member_gets_what_it_gets_alone(text, tmp_path, router):
  configs = configs_of(text, router)
  members = [packed.Member(c, str(tmp_path / f'packed{i}')) for i, c in enumerate(configs)]
  done = packed.train_packed(members, tmp_path / 'pack', NOBODY)
  assert done == packed.PackOutcome([''] * 4, None)
  assert not (tmp_path / 'pack').exists()
  losses = set()
  for i, config in enumerate(configs):
    single.train(config, str(tmp_path / f'alone{i}'), NOBODY)
    assert manifest.read(tmp_path / f'packed{i}')['pack'] == 4
    assert_same_runs(tmp_path / f'packed{i}', tmp_path / f'alone{i}', config)
    losses.add(read_metrics(tmp_path / f'packed{i}' / 'metrics.jsonl')[-1]['loss'])
  assert len(losses) == 4


class Clock:
  """One that stands still, but for 1 s in each read of metrics and 100 s in each save."""

  def __init__(self, patch):
    self.now = 0.0
    self._slow(patch, packed.metrics, 'step_metrics', 1)
    self._slow(patch, packed.Checkpoints, 'save', 100)

  def _slow(self, patch, owner, name, seconds):
    function = getattr(owner, name)

    def slow(*args, **kwargs):
      self.now += seconds
      return function(*args, **kwargs)

    patch.setattr(owner, name, slow)

  def __call__(self):
    return self.now


def untimed(workdir):
  return [
    {name: value for name, value in line.items() if name != 'tokens_per_second'}
    for line in read_metrics(workdir / 'metrics.jsonl')
  ]


def test_a_pack_that_was_stopped_goes_on_to_the_same_bits(text, tmp_path, monkeypatch):
  """And a member's tokens per second are its own tokens over the seconds of the pack's training."""
  configs = configs_of(text, 'loss_free')[:2]

  def members(name):
    return [packed.Member(c, str(tmp_path / f'{name}{i}')) for i, c in enumerate(configs)]

  with monkeypatch.context() as patch:
    packed.train_packed(members('whole'), tmp_path / 'pack', NOBODY, clock=Clock(patch))
  # Per step, metrics of two members are read, a second each.
  for member, first_step in ((0, 1), (1, 2)):
    lines = read_metrics(tmp_path / f'whole{member}' / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [*range(1, 9)]
    for line in lines:
      seconds = first_step if line['step'] == 1 else 2
      assert line['tokens_per_second'] == pytest.approx(line['tokens'] / seconds)

  class Killed(Exception):
    pass

  def kill(step):
    if step == 5:
      raise Killed

  with pytest.raises(Killed):
    packed.train_packed(members('cut'), tmp_path / 'pack', NOBODY._replace(on_step=kill))
  assert manifest.read(tmp_path / 'cut0')['status'] == 'running'
  first = []
  packed.train_packed(members('cut'), tmp_path / 'pack', NOBODY._replace(on_step=first.append))
  assert first[0] == 4  # from the checkpoint after step 3
  for i, config in enumerate(configs):
    one, other = tmp_path / f'cut{i}', tmp_path / f'whole{i}'
    tiny.assert_equal(final_state(one, config)[1], final_state(other, config)[1])
    assert untimed(one) == untimed(other)


def test_a_member_that_diverges_costs_the_others_nothing(text, tmp_path):
  configs = configs_of(text, 'top_k')[:2]
  configs[1].optim.learning_rate = 1e30
  members = [packed.Member(c, str(tmp_path / f'packed{i}')) for i, c in enumerate(configs)]
  done = packed.train_packed(members, tmp_path / 'pack', NOBODY)
  assert not done.diverged[0] and 'diverged at step' in done.diverged[1]
  assert manifest.read(tmp_path / 'packed1')['status'] == 'diverged'
  single.train(configs[0], str(tmp_path / 'alone'), NOBODY)
  assert_same_runs(tmp_path / 'packed0', tmp_path / 'alone', configs[0])


def test_refuses_what_cannot_be_one_program(text, tmp_path):
  configs = configs_of(text, 'top_k')[:2]
  configs[1].moe.capacity_factor = 3.0
  members = [packed.Member(c, str(tmp_path / f'{i}')) for i, c in enumerate(configs)]
  with pytest.raises(UserError, match='hyperparameters'):
    packed.train_packed(members, tmp_path / 'pack', NOBODY)
  configs[1] = configs[0]
  for config in configs:
    config.train.eval_every = 2
  with pytest.raises(UserError, match=r'train\.eval_every=2'):
    packed.train_packed(members[:1], tmp_path / 'pack', NOBODY)
  assert not list(tmp_path.iterdir()), json.dumps([str(p) for p in tmp_path.iterdir()])
