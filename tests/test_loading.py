"""A run from Python: what it says is what `evaluate` and the routers' own rules say."""

import doctest
import runpy
import shutil
import subprocess
import sys

import jax
import matplotlib
import numpy as np
import pytest

import moe_jax
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.errors import UserError
from moe_jax.loading import _pieces
from moe_jax.models.build import build_task
from moe_jax.run import manifest, metrics_file, single
from moe_jax.train import evaluate, evaluation_batches
from tests import tiny

# A routing state that moves, and slots for a quarter of the assignments in evaluation.
LOSS_FREE = {
  'moe.router': 'loss_free',
  'moe.bias_rate': 0.1,
  'moe.eval_capacity_factor': 0.25,
  'train.eval_every': 3,
}
# The rest of what a model may have; no drops.
NULL = {
  'moe.router': 'null_experts',
  'moe.num_null_experts': 4,
  'moe.every': 2,
  'moe.num_shared_experts': 2,
  'moe.group_size': 2,
  'moe.eval_capacity_factor': 4.0,
  'model.activation': 'gelu',
  'train.num_steps': 2,
}
DENSE = {'moe.num_experts': 0, 'mesh.data': 1, 'mesh.expert': 1, 'train.num_steps': 2}
ONE_DEVICE = 'data=1,expert=1'


def trained(folder, overrides):
  """Trains a run and returns its directory."""
  workdir = folder / 'run'
  assert single.train(tiny.config(overrides), str(workdir)).finished
  return workdir


@pytest.fixture(scope='module')
def full_windows(tmp_path_factory):
  """Overrides of a text whose documents fill their windows: 31 or 47 bytes and the end, T = 16."""
  folder = tmp_path_factory.mktemp('full')
  source = tiny.write_text(folder / 'all')
  for path in sorted(source.rglob('*.txt')):
    size = 31 + 16 * (int(path.stem) % 2)
    path.write_text(path.read_text(encoding='utf-8')[:size], encoding='utf-8')
  return {'data.name': f'text:{source}', 'data.data_dir': str(folder / 'data')}


@pytest.fixture(scope='module')
def run(full_windows, tmp_path_factory):
  """A run of 2 x 4 devices, opened on as many."""
  directory = trained(tmp_path_factory.mktemp('loss_free'), {**full_windows, **LOSS_FREE})
  return moe_jax.load_run(directory)


@pytest.fixture(scope='module')
def null_run(text, tmp_path_factory):
  return moe_jax.load_run(trained(tmp_path_factory.mktemp('null'), {**text, **NULL}))


@pytest.fixture(scope='module')
def dense_run(text, tmp_path_factory):
  return moe_jax.load_run(trained(tmp_path_factory.mktemp('dense'), {**text, **DENSE}))


def documents(run, split='test'):
  return [text.decode() for text in run.dataset.document_text(split)]


def evaluated(run, split='test'):
  """Returns the result of `evaluate` on a split."""
  model = build_task(run.config, run.mesh, run.tokenizer.vocab_size, 'eval')
  with jax.set_mesh(run.mesh):
    return evaluate.evaluate(
      evaluate.make_eval_step(model),
      model,
      run.params,
      run.router_state,
      run.dataset,
      split=split,
      sequence_length=run.config.data.sequence_length,
      batch_size=evaluation_batches.batch_size_of(run.config, run.mesh),
    )


def assert_same_loss(run):
  expected, outputs = evaluated(run), run.forward(documents(run))
  bits = np.concatenate([out.bits for out in outputs])
  assert len(bits) == expected['tokens']
  np.testing.assert_allclose(np.mean(bits) * np.log(2), expected['loss'], rtol=1e-6)
  num_bytes = sum(len(out.text.encode()) for out in outputs)
  np.testing.assert_allclose(np.sum(bits) / num_bytes, expected['bits_per_byte'], rtol=1e-6)
  return expected, outputs


def test_loss_and_drops_are_those_of_evaluate(run):
  expected, outputs = assert_same_loss(run)
  kept = np.concatenate([out.kept for out in outputs], axis=1)
  asked = np.concatenate([out.experts for out in outputs], axis=1)
  assert (asked >= 0).all()
  drop = 1 - kept.mean(axis=(1, 2))
  assert (drop > 0.5).all()
  np.testing.assert_allclose(drop, expected['router/drop_share_per_layer'], rtol=1e-6)
  load = [np.bincount(layer.ravel(), minlength=8) / layer.size for layer in asked]
  np.testing.assert_allclose(load, expected['router/load'], rtol=1e-6)


def test_each_token_selects_by_probability_and_bias(run):
  out = run.forward('the grey sea, and rain')
  assert out.router_probs.shape == (2, 23, 8)
  np.testing.assert_allclose(out.router_probs.sum(-1), 1, rtol=1e-5)
  moved = 0
  for layer in range(2):
    probs, bias = out.router_probs[layer], run.experts(layer)['router_state']['bias']
    best = np.argsort(-(probs + bias), axis=-1)[:, :2]
    np.testing.assert_array_equal(np.sort(out.experts[layer]), np.sort(best))
    # Negative control: without the state others are selected.
    moved += (np.sort(out.experts[layer]) != np.sort(np.argsort(-probs, -1)[:, :2])).sum()
    selected = np.take_along_axis(probs, out.experts[layer], -1)
    gates = np.where(out.kept[layer], selected / selected.sum(-1, keepdims=True), 0)
    np.testing.assert_allclose(out.gates[layer], gates, rtol=1e-5)
  assert moved > 0


def test_a_text_stands_alone_and_in_windows(run):
  texts = ['', 'sea', 'the grey sea, and a wall of rain that night', 'sky']
  outputs = run.forward(texts)
  assert [out.text for out in outputs] == texts
  assert [len(out.tokens) for out in outputs] == [1, 4, 44, 4]
  alone = run.forward(texts[2])
  np.testing.assert_array_equal(alone.logits, outputs[2].logits)
  np.testing.assert_array_equal(alone.experts, outputs[2].experts)
  # Windows of 16 tokens don't see each other: their first one is the text up to there.
  first = run.forward(texts[2][:16])
  np.testing.assert_allclose(alone.logits[:16], first.logits[:16], atol=1e-5)
  assert alone.tokens.tolist() == [256, *texts[2].encode()]
  assert alone.targets.tolist() == [*texts[2].encode(), 257]
  assert alone.pieces == ['<bos>', *texts[2]]
  log_probs = alone.logits - np.log(np.exp(alone.logits).sum(-1, keepdims=True))
  picked = log_probs[np.arange(44), alone.targets]
  np.testing.assert_allclose(alone.bits, -picked / np.log(2), rtol=1e-5)
  np.testing.assert_allclose(alone.loss, -picked.mean(), rtol=1e-5)
  np.testing.assert_allclose(alone.bits_per_byte, alone.bits.sum() / 43)
  assert np.isnan(outputs[0].bits_per_byte)
  assert run.forward([]) == []


def test_one_device_says_what_eight_do(run):
  one = moe_jax.load_run(run.directory, mesh=ONE_DEVICE)
  assert one.mesh.size == 1 and run.mesh.size == 8
  text = 'the grey sea, and a wall of rain that night'
  here, there = one.forward(text), run.forward(text)
  np.testing.assert_array_equal(here.experts, there.experts)
  np.testing.assert_array_equal(here.kept, there.kept)
  for name in ('logits', 'router_probs', 'gates', 'bits'):
    np.testing.assert_allclose(getattr(here, name), getattr(there, name), atol=2e-6, err_msg=name)
  tiny.assert_equal(one.experts(1), run.experts(1))


def test_a_run_without_metrics_has_an_empty_data_frame(run, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(run.directory, folder)
  (folder / 'metrics.jsonl').unlink()
  assert moe_jax.load_run(folder).metrics.query('split == "train"')[['step', 'loss']].empty


def test_metrics_are_a_data_frame_of_the_file(run):
  lines = metrics_file.read_metrics(run.directory / 'metrics.jsonl')
  frame = run.metrics
  assert len(frame) == len(lines) == 8
  assert set(frame.columns) == {name for line in lines for name in line}
  train = frame.query('split == "train"')
  assert train['step'].tolist() == [1, 2, 3, 4, 5, 6]
  assert train['loss'].tolist() == [line['loss'] for line in lines if line['split'] == 'train']
  assert np.stack(train['router/load']).shape == (6, 2, 8)
  assert run.manifest == manifest.read(run.directory)
  assert (run.step, run.config.moe.router) == (6, 'loss_free')


def test_weights_of_experts_are_those_that_are_computed_with(run, null_run):
  """SwiGLU in every block; GELU in every other one, with shared experts."""
  block = jax.device_get(run.params['layers']['block_0']['moe'])
  weights = run.experts(1)
  np.testing.assert_array_equal(weights['w_gate'], block['w_in'][1][..., :16])
  np.testing.assert_array_equal(weights['w_value'], block['w_in'][1][..., 16:])
  np.testing.assert_array_equal(weights['w_out'], block['w_out'][1])
  np.testing.assert_array_equal(weights['router']['router'], block['router'][1])
  assert weights['router_state'].keys() == {'bias'} and 'shared' not in weights
  weights = null_run.experts(0)
  shapes = {name: np.shape(weights[name]) for name in ('w_in', 'w_out')}
  assert shapes == {'w_in': (8, 16, 16), 'w_out': (8, 16, 16)}
  assert weights['router']['router'].shape == (16, 12)
  assert {name: w.shape for name, w in weights['shared'].items()} == {
    'w_in': (16, 32),
    'w_out': (32, 16),
  }


def test_null_experts_groups_and_every_other_block(null_run):
  _, outputs = assert_same_loss(null_run)
  experts, kept = (np.concatenate([getattr(o, n) for o in outputs], 1) for n in ('experts', 'kept'))
  assert experts.shape[0] == 1 and (experts == -1).any()
  np.testing.assert_array_equal(kept, experts >= 0)
  gates = np.concatenate([out.gates for out in outputs], axis=1)
  np.testing.assert_array_equal(gates > 0, kept)


def test_a_dense_model_has_no_routing(dense_run):
  _, outputs = assert_same_loss(dense_run)
  for name in ('router_probs', 'experts', 'gates', 'kept'):
    assert getattr(outputs[0], name) is None
  with pytest.raises(UserError, match='layer=0: .* dense'):
    dense_run.experts(0)


@pytest.mark.parametrize(
  'text', ['caf\u00e9 \U0001f30a\ufffd \ufffd\ufffd', 'sea \u00e9', '\ufffd']
)
def test_pieces_join_to_the_text(text):
  bpe = tokenizer_lib.train_bpe(['the sea and the sky, the sea and the rain'] * 3, 512)
  for tokenizer in (tokenizer_lib.ByteTokenizer(), bpe):
    ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and ''.join(pieces) == text
  assert _pieces(tokenizer_lib.ByteTokenizer(), np.array([195, 169, 33])) == ['', '\u00e9', '!']


def test_what_is_refused_names_the_argument(run, tmp_path):
  for arguments, words in (
    ({'step': 5}, 'step=5: must be one of'),
    ({'mesh': '2x4'}, "mesh='2x4': must read"),
    ({'mesh': 'data=1,expert=3'}, 'expert must divide 8'),
  ):
    with pytest.raises(UserError, match=words):
      moe_jax.load_run(run.directory, **arguments)
  with pytest.raises(UserError, match='holds no run'):
    moe_jax.load_run(tmp_path)
  with pytest.raises(UserError, match='layer=2: .* 0..1'):
    run.experts(2)
  for text in ('\ud83c', ['sea', '\ud83c']):
    with pytest.raises(UserError, match='must be text'):
      run.forward(text)


def test_the_example_of_the_docstring_runs(run):
  examples = doctest.DocTestParser().get_examples(moe_jax.load_run.__doc__)
  names = {}
  for example in examples:
    source = example.source.replace('runs/quickstart', str(run.directory))
    exec(compile(source, 'docstring', 'single'), names)  # noqa: S102
  assert len(examples) > 6
  assert names['weights']['w_gate'].shape == (8, 16, 16)


def look_at(run, out, monkeypatch):
  """Runs the script of figures and returns its names."""
  script = tiny.REPOSITORY / 'experiments' / 'look_at_experts.py'
  monkeypatch.setattr(sys, 'argv', [str(script), str(run.directory), str(out)])
  with matplotlib.rc_context():
    return runpy.run_path(str(script))


def test_three_figures_of_a_run(null_run, tmp_path, monkeypatch, capsys):
  names = look_at(null_run, tmp_path / 'out', monkeypatch)
  said = capsys.readouterr().out
  for name in ('experts_of_a_text.png', 'load_by_domain.png', 'preferred_tokens.png'):
    assert (tmp_path / 'out' / name).read_bytes().startswith(b'\x89PNG')
    assert str(tmp_path / 'out' / name) in said
  # The whole split was read: its loads are those of `evaluate`.
  domains = evaluated(null_run)['domains']
  expected = np.array([domains[name]['router/load'] for name in names['domains']])
  np.testing.assert_allclose(names['load_LNE'], expected.swapaxes(0, 1), rtol=1e-6)


def test_figures_of_no_run_are_refused_and_lie_in_the_run_by_default(
  null_run, tmp_path, monkeypatch, capsys
):
  script = str(tiny.REPOSITORY / 'experiments' / 'look_at_experts.py')
  monkeypatch.chdir(tmp_path)
  for words in (['nope'], [str(null_run.directory), 'out', 'more']):
    monkeypatch.setattr(sys, 'argv', [script, *words])
    with pytest.raises(SystemExit) as end, matplotlib.rc_context():
      runpy.run_path(script)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
  monkeypatch.setattr(sys, 'argv', [script, str(null_run.directory)])
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *args, **kwargs: None)
  with matplotlib.rc_context():
    assert runpy.run_path(script)['OUT'] == null_run.directory / 'figures'
  assert not list(tmp_path.iterdir())


def test_a_dense_run_has_no_figure_of_experts(dense_run, tmp_path, monkeypatch, capsys):
  with pytest.raises(SystemExit) as end:
    look_at(dense_run, tmp_path / 'out', monkeypatch)
  assert end.value.code == 2 and 'error: RUN=' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_the_package_alone_is_light():
  script = (
    'import sys, moe_jax; moe_jax.__version__\n'
    'assert not {"jax", "numpy", "pandas", "ml_collections"} & sys.modules.keys()\n'
    'try: moe_jax.nothing\nexcept AttributeError: print("ok")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=tiny.REPOSITORY, capture_output=True, text=True
  )
  assert done.stdout == 'ok\n', done.stderr
