"""A trained run from Python: its parameters, its metrics, and what its routers do with a text."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import jax
import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from moe_jax.data import Dataset, Tokenizer
from moe_jax.data.windows import Example, padding
from moe_jax.errors import UserError
from moe_jax.experts import hidden_dim
from moe_jax.models.build import build_task
from moe_jax.models.language_model import LanguageModel
from moe_jax.parallel.sharding import batch_sharding, replicated
from moe_jax.run import metrics_file
from moe_jax.run.restore import restore_run
from moe_jax.run.setup import dataset_of
from moe_jax.train.state import params_shardings
from moe_jax.train.step import put_batch

if TYPE_CHECKING:
  import pandas


def load_run(
  directory: str | os.PathLike, step: int | None = None, mesh: str | None = None
) -> 'Run':
  """Opens a trained run.

  Any machine will do: a run of eight devices opens on one, with the same results.

  >>> import moe_jax
  >>> run = moe_jax.load_run('runs/quickstart')
  >>> run.config.moe.num_experts, run.manifest['parameters']['active']
  >>> losses = run.metrics.query('split == "train"').set_index('step')['loss']
  >>> out = run.forward('To be, or not to be')
  >>> out.logits.shape, out.router_probs.shape, out.experts.shape  # [T V], [L T E], [L T K]
  >>> for piece, chosen, bits in zip(out.pieces[1:], out.experts[0, 1:], out.bits):
  ...   line = piece, chosen.tolist(), round(float(bits), 2)  # bits that this piece cost
  >>> weights = run.experts(layer=0)
  >>> weights['w_gate'].shape, weights['w_out'].shape  # [E D F], [E F D]

  Args:
    directory: the --workdir of the run.
    step: of a checkpoint; the newest good one by default.
    mesh: 'data=D,expert=E'; by default that of the run, or one device if there are fewer.

  Raises:
    UserError: if there is no such run or step, or the mesh does not fit.
    DamagedError: if the run has no good checkpoint, or another file that is needed is damaged.
  """
  return Run(directory, step, mesh)


@dataclasses.dataclass(frozen=True)
class TextOutput:
  """Output of a model for one text of T - 1 tokens. All arrays are NumPy's.

  Position 0 is the start of the text; position t predicts token t + 1 of `tokens`, the last one the
  end of the text. L counts only the MoE layers.

  Attributes:
    text: that was read.
    tokens: what stands at each position.
    targets: the token after each.
    pieces: the text of each token: '<bos>', then pieces that join to `text`. Where a character is
      spread over several tokens, the last one has it and the others have ''.
    logits: of the token after each, float32.
    bits: -log2 of the probability of the token after each.
    router_probs: of each expert, before selection; None for a dense model, as are the following.
      For most routers they sum to 1 over the experts.
    experts: those each token selected, before any drop; -1 where it selected fewer than K.
    gates: what multiplies the output of that expert; 0 for none and where the token was dropped.
    kept: False where the expert had no slot for the token (`moe.eval_capacity_factor`), and for -1.
  """

  text: str
  tokens: Int[np.ndarray, 'T']
  targets: Int[np.ndarray, 'T']
  pieces: list[str]
  logits: Float[np.ndarray, 'T V']
  bits: Float[np.ndarray, 'T']
  router_probs: Float[np.ndarray, 'L T E'] | None
  experts: Int[np.ndarray, 'L T K'] | None
  gates: Float[np.ndarray, 'L T K'] | None
  kept: Bool[np.ndarray, 'L T K'] | None

  @property
  def loss(self) -> float:
    """Cross-entropy in nats per token, the end of the text included."""
    return float(np.mean(self.bits)) * math.log(2)

  @property
  def bits_per_byte(self) -> float:
    """Bits of all tokens per UTF-8 byte of the text; NaN for the empty text."""
    return float(np.sum(self.bits)) / (len(self.text.encode()) or math.nan)


class Run:
  """A trained run. Made by `load_run`.

  Attributes:
    directory: of the run.
    config: that it was trained with.
    manifest: the content of manifest.json.
    step: of the checkpoint.
    params: a tree of float32 arrays on `mesh`; those of blocks have the layers in front.
    router_state: what the routers carry from step to step, each array with the MoE layers in front;
      {} where they carry nothing.
    tokenizer: `encode(text)` and `decode(ids)`.
    mesh: axes ('data', 'expert').
    task: the model with its loss, in mode `eval`; its forward pass returns all of its routing.
  """

  def __init__(self, directory: str | os.PathLike, step: int | None, mesh: str | None):
    """Opens the run; see `load_run`."""
    # Orbax warns of every checkpoint that is opened to be read.
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
      restored = restore_run(os.fspath(directory), step, mesh, 'step', mesh_flag='mesh')
    finally:
      logging.set_verbosity(verbosity)
    self.directory = pathlib.Path(directory)
    self.config = restored.config
    self.manifest: dict[str, Any] = restored.manifest
    self.step: int = restored.step
    self.params: Any = restored.params
    self.router_state: dict[str, jax.Array] = restored.router_state
    self.tokenizer: Tokenizer = restored.tokenizer
    self.mesh = restored.mesh
    self.task = build_task(
      self.config, self.mesh, self.tokenizer.vocab_size, 'eval', returns_routing=True
    )

  def __repr__(self) -> str:
    return f'Run({str(self.directory)!r}, step={self.step})'

  @functools.cached_property
  def metrics(self) -> 'pandas.DataFrame':
    """One row for each line of metrics.jsonl, with its names as columns; NaN where a line has none.

    Values per layer stay lists: `np.stack(frame['router/load'])` is [steps L E],
    once rows without it are left out.
    """
    import pandas

    lines = metrics_file.read_metrics(self.directory / 'metrics.jsonl')
    # A run that was stopped before its first line has the same columns.
    return pandas.DataFrame(lines or {'step': [], 'split': [], 'loss': []})

  @functools.cached_property
  def dataset(self) -> Dataset:
    """The dataset it was trained on; prepared again if it is gone.

    Raises:
      UserError: if the text is not there, or has changed.
    """
    dataset = dataset_of(self.config, self.tokenizer)
    if dataset.fingerprint != self.manifest['data']['fingerprint']:
      raise UserError(
        'data.name',
        self.config.data.name,
        f'is not the text and tokenizer that {self.directory} was trained on',
      )
    return dataset

  def experts(self, layer: int) -> dict[str, Any]:
    """Returns the weights of a MoE layer as NumPy arrays.

    Args:
      layer: 0 to L - 1, counting only the MoE layers, as in the metrics.

    Returns:
      w_gate, w_value: [E D F], an expert computes (f(x w_gate) * (x w_value)) w_out, with f SiLU
        or GELU; activations without a gate have one `w_in` instead.
      w_out: [E F D].
      router: {name: array} of its parameters, for most routers `router` [D E].
      router_state: {name: array} of what it carries from step to step; {} for most.
      shared: the same weights of the shared experts, [D F] and [F D] with F the hidden units of all
        of them; only where there are some.

    Raises:
      UserError: if there is no such layer.
    """
    task = self._language_model()
    moe, every, num_layers = task.moe, task.network.options.every, task.num_moe_layers
    if moe is None or not 0 <= layer < num_layers:
      which = f'be in 0..{num_layers - 1}, the MoE layers' if moe else 'not be given: it is dense'
      raise UserError('layer', layer, f'of {self.directory} must {which}')
    block = self.params['layers'][f'block_{every - 1}']
    layer_weights = {name: np.asarray(value[layer]) for name, value in block['moe'].items()}
    result: dict[str, Any] = _apart(
      layer_weights.pop('w_in'), layer_weights.pop('w_out'), moe.activation
    )
    result['router'] = layer_weights
    result['router_state'] = {k: np.asarray(v[layer]) for k, v in self.router_state.items()}
    if 'shared' in block:
      shared = {name: np.asarray(value[layer]) for name, value in block['shared'].items()}
      result['shared'] = _apart(shared['w_in'], shared['w_out'], moe.activation)
    return result

  @overload
  def forward(self, text: str) -> TextOutput: ...  # type: ignore[overload-overlap]

  @overload
  def forward(self, text: Sequence[str]) -> list[TextOutput]: ...

  def forward(self, text: str | Sequence[str]) -> TextOutput | list[TextOutput]:
    """Reads a text, or several, as `evaluate` does: deterministic, with its capacity.

    Each text is read by itself, whatever is read with it. One of more than T = data.sequence_length
    tokens is cut into windows of T tokens that don't see each other, as in training and
    evaluation. So the loss is that of `evaluate`, but for drops: there, short documents share a
    window and its slots.

    Returns:
      A `TextOutput`, or a list of them for a list of texts.

    Raises:
      UserError: if it is not text.
    """
    texts = [text] if isinstance(text, str) else list(text)
    documents = [self._encode(one) for one in texts]
    length = self.config.data.sequence_length
    windows = [
      document[start : start + length + 1]
      for document in documents
      for start in range(0, len(document) - 1, length)
    ]
    parts = iter(self._read(windows))
    results = []
    for one, document in zip(texts, documents, strict=True):
      num_windows = -(-(len(document) - 1) // length)
      results.append(_output(one, document, [next(parts) for _ in range(num_windows)], self))
    return results[0] if isinstance(text, str) else results

  def _language_model(self) -> LanguageModel:
    """Returns the task, if it is of a family that reads text and has layers to read."""
    if not isinstance(self.task, LanguageModel):
      family = self.config.model.family
      raise UserError('model.family', family, 'has no forward pass or experts to look at yet')
    return self.task

  def _encode(self, text: str) -> Int[np.ndarray, 'N']:
    """Returns the tokens of a text between those of its start and its end."""
    try:
      text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
      raise UserError('text', text, 'must be text, or a list of texts') from error
    ends = self.tokenizer.bos_id, self.tokenizer.eos_id
    return np.array([ends[0], *self.tokenizer.encode(text), ends[1]], np.int32)

  def _read(self, windows: list[Int[np.ndarray, '_']]) -> list[tuple[Any, ...]]:
    """Returns (logits [N-1 V], routing [L N-1 ...] or None) of each window."""
    at_once, results = self.mesh.size, []
    group = self.config.moe.group_size if self.config.moe.num_experts else 1
    for first in range(0, len(windows), at_once):
      here = windows[first : first + at_once]
      # A window has a routing group of its own; what else would be in it is padding.
      rows = padding((at_once * group, self.config.data.sequence_length))
      for row, window in zip(range(0, at_once * group, group), here, strict=False):
        _fill(rows, row, window)
      with jax.set_mesh(self.mesh):
        logits, routed = jax.device_get(
          self._step(self.params, self.router_state, put_batch(dict(rows), self.task))
        )
      for i, window in enumerate(here):
        own = routed and type(routed)(*(leaf[:, i, : len(window) - 1] for leaf in routed))
        results.append((logits[i, : len(window) - 1], own))
    return results

  @functools.cached_property
  def _step(self) -> Any:
    """Returns the compiled (params, router_state, batch) -> (logits, routing) of first rows."""
    group = self.config.moe.group_size if self.config.moe.num_experts else 1
    task = self._language_model()

    def step(params, router_state, batch):
      out = task.forward(params, router_state, batch)
      return out.logits[::group], jax.tree.map(lambda leaf: leaf[:, ::group], out.routed)

    everywhere = replicated(self.mesh)
    by_sequence = {name: batch_sharding(self.mesh) for name in task.batch_fields}
    return jax.jit(
      step,
      in_shardings=(params_shardings(task), everywhere, by_sequence),
      out_shardings=everywhere,
    )


def _apart(
  w_in: Float[np.ndarray, '... D F1'], w_out: Float[np.ndarray, '... F D'], activation: str
) -> dict[str, Any]:
  """Returns the weights of experts by name, those of gate and value apart."""
  if hidden_dim(1, activation) == 1:
    return {'w_in': w_in, 'w_out': w_out}
  gate, value = np.split(w_in, 2, axis=-1)
  return {'w_gate': gate, 'w_value': value, 'w_out': w_out}


def _fill(rows: Example, row: int, window: Int[np.ndarray, 'N']) -> None:
  pairs = len(window) - 1
  rows['inputs'][row, :pairs] = window[:-1]
  rows['targets'][row, :pairs] = window[1:]
  rows['segment_ids'][row, :pairs] = 1
  rows['positions'][row, :pairs] = np.arange(pairs)


def _output(
  text: str, document: Int[np.ndarray, 'N'], parts: list[tuple[Any, ...]], run: Run
) -> TextOutput:
  """Puts the windows of a text together."""
  logits = np.concatenate([part[0] for part in parts])
  wide = logits.astype(np.float64)
  largest = np.max(wide, axis=-1, keepdims=True)
  log_total = np.log(np.sum(np.exp(wide - largest), axis=-1)) + largest[:, 0]
  picked = np.take_along_axis(wide, document[1:, None], axis=-1)[:, 0]
  routed: list[Any] = [None] * 4
  if parts[0][1] is not None:
    routed = [np.concatenate(leaves, axis=1) for leaves in zip(*(p[1] for p in parts), strict=True)]
  return TextOutput(
    text,
    document[:-1],
    document[1:],
    ['<bos>', *_pieces(run.tokenizer, document[1:-1])],
    logits,
    (log_total - picked) / math.log(2),
    *routed,
  )


def _pieces(tokenizer: Tokenizer, ids: Int[np.ndarray, 'N']) -> list[str]:
  """Returns the text of each token; the last one of a character has it."""
  pieces: list[str] = []
  waiting: list[int] = []
  for i in ids.tolist():
    waiting.append(i)
    piece = tokenizer.decode(waiting)
    # What is not UTF-8 yet reads as U+FFFD.
    complete = not piece.endswith('\ufffd')
    pieces.append(piece if complete else '')
    waiting = [] if complete else waiting
  if waiting:
    pieces[-1] = tokenizer.decode(waiting)
  return pieces
