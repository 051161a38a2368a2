"""A family that knows nothing of Transformers or experts trains, resumes, sweeps and reports."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from moe_jax import fields
from moe_jax.layers.cross_entropy import cross_entropy_sum
from moe_jax.models import build
from moe_jax.models.task import LossTerms, Task
from moe_jax.run import manifest, single
from moe_jax.schema import SCHEMA
from tests import tiny
from tests.run.test_single import assert_same_run, signal_at

WIDTH = 8


@dataclasses.dataclass(frozen=True)
class BagOfWords(Task):
  """The next token by the mean embedding of those of its document so far."""

  def init(self, key):
    shapes = {'embedding': (self.vocab_size, WIDTH), 'output': (WIDTH, self.vocab_size)}
    return {
      name: 0.1 * jax.random.normal(jax.random.fold_in(key, number), shape)
      for number, (name, shape) in enumerate(shapes.items())
    }

  def loss(self, params, router_state, batch, *, key=None):
    segments = batch['segment_ids']
    past = jnp.tril(jnp.ones((segments.shape[1], segments.shape[1]), bool))
    seen = past[None] & (segments[:, :, None] == segments[:, None, :])
    share = seen / jnp.sum(seen, axis=-1, keepdims=True)
    mean = jnp.einsum('bts,bsd->btd', share, params['embedding'][batch['inputs']])
    return LossTerms(
      cross_entropy_sum(mean, params['output'], batch['targets'], segments, self.mesh)
    )


def make_bag_of_words(config, mesh, vocab_size, mode, batch_size, *, returns_routing):
  del config, mode, batch_size, returns_routing
  return BagOfWords(mesh, vocab_size)


@pytest.fixture(scope='module')
def overrides(text):
  """The family, registered for the tests of this module; returns what a config of it changes."""
  with pytest.MonkeyPatch.context() as patch:
    choices = (*build.FAMILIES, 'bag_of_words')
    family = build.Family(make_bag_of_words, 'bags of words')
    patch.setitem(build.FAMILIES, 'bag_of_words', family)
    patch.setitem(SCHEMA['model'], 'family', fields.one_of('decoder', choices, 'Architecture.'))
    yield {
      **text,
      'model.family': 'bag_of_words',
      'moe.num_experts': 0,
      'optim.name': 'adamw',
      'optim.learning_rate': 0.05,
      'train.eval_every': 3,
    }


@pytest.fixture(scope='module')
def whole(overrides, tmp_path_factory):
  config, workdir = tiny.config(overrides), tmp_path_factory.mktemp('words') / 'run'
  assert single.train(config, str(workdir)) == (6, True, None)
  return config, workdir


def test_trains_and_is_counted_by_its_shapes(whole):
  _, workdir = whole
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert losses[-1] < losses[0] - 0.1
  facts = manifest.read(workdir)
  # Embedding and output; a token passes the output alone: 2 * 3 FLOPs per parameter.
  size = tiny.VOCAB_SIZE * WIDTH
  assert facts['parameters'] == {'total': 2 * size, 'active': 2 * size}
  assert facts['training_flops_per_token'] == 6 * size
  assert facts['config']['model']['family'] == 'bag_of_words'


def test_resumes_bit_for_bit_and_on_another_mesh(whole, tmp_path, monkeypatch):
  config, undisturbed = whole
  with monkeypatch.context() as patch:
    signal_at(patch, 4, signal.SIGTERM)
    assert single.train(config, str(tmp_path / 'run')) == (4, False, signal.SIGTERM)
  shutil.copytree(tmp_path / 'run', tmp_path / 'other')
  assert single.train(config, str(tmp_path / 'run')).finished
  assert_same_run(tmp_path / 'run', undisturbed, config)
  config.mesh.update(data=8, expert=1)
  assert single.train(config, str(tmp_path / 'other')).finished


def test_evaluates_and_says_that_it_cannot_be_sampled_from(whole):
  _, workdir = whole
  result = tiny.command('evaluate', f'--workdir={workdir}', '--json')
  assert result.code == 0, result.err
  assert json.loads(result.out)['bits_per_byte'] > 0
  tiny.command('generate', f'--workdir={workdir}', '--prompt=a').assert_error(
    "model.family='bag_of_words'", 'sampled'
  )


def test_sweeps_in_packs_and_reports(overrides, tmp_path):
  config = tiny.config_file(tmp_path, {**overrides, 'train.eval_every': 0})
  study = tmp_path / 'study.py'
  study.write_text(
    f'import runpy\nfrom moe_jax.study import Metric, Study, product\n\n\ndef get_study():\n'
    f'  base = runpy.run_path({str(config)!r})["get_config"]()\n'
    "  return Study(name='words', question='Does the rate matter?', base=base,\n"
    "    arms=product({'optim.learning_rate': (0.01, 0.05)}), seeds=(0, 1),\n"
    "    metric=Metric('dropless/bits_per_byte'), baseline='learning_rate=0.01')\n"
  )
  flags = f'--study={study}', f'--workdir={tmp_path / "sweep"}'
  result = tiny.command('sweep', *flags, '--pack=2')
  assert result.code == 0, result.err
  result = tiny.command('report', *flags, f'--out={tmp_path / "report"}')
  assert result.code == 0, result.err
  assert '0.05 &' in (tmp_path / 'report' / 'table.tex').read_text()
  assert 'All models are bags of words' in (tmp_path / 'report' / 'methods.tex').read_text()
