"""The experts that the tokens of a benchmark go to: drawn from a law, or of a trained model."""

import os
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from moe_jax.benchmark.harness.names import TRACE
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.data import train_iterator
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.run.restore import RestoredRun, restore_run
from moe_jax.run.setup import dataset_of
from moe_jax.train.evaluation_batches import batch_size_of
from moe_jax.train.step import put_batch


class Trace(NamedTuple):
  """The choices of one layer of a trained model.

  Attributes:
    expert_index: of consecutive tokens, before any drop.
    num_experts: E of the model.
    layer: which of its MoE layers, from 0.
    step: of the checkpoint.
  """

  expert_index: Int[np.ndarray, 'N K']
  num_experts: int
  layer: int
  step: int


def choose(
  name: str, shape: Shape, num_experts: int, seed: int, trace: Trace | None = None
) -> Int[np.ndarray, 'S K']:
  """Returns the experts of each token, all different.

  Args:
    name: `round_robin`: one after the other. `uniform`: at random. `zipf_A`: at random without
      replacement, expert e in proportion to (e + 1)^-A. `trace`: the first S tokens of the trace.
    shape: S and K.
    num_experts: E.
    seed: of the draw.
    trace: for `trace`.

  Raises:
    UserError: if the trace has another E or K, or fewer tokens.
  """
  tokens, selected = shape.num_tokens, shape.num_selected_experts
  if name == TRACE:
    if trace is None:
      raise UserError('--workdir', None, f'must be given for the routing {TRACE}')
    return _of_trace(trace, tokens, selected, num_experts)
  if name == 'round_robin':
    return (np.arange(tokens * selected).reshape(tokens, selected) % num_experts).astype(np.int32)
  exponent = 0.0 if name == 'uniform' else float(name.removeprefix('zipf_'))
  # The largest of log weight + Gumbel noise are a draw without replacement.
  noise = np.random.default_rng(seed).gumbel(size=(tokens, num_experts))
  scores = noise - exponent * np.log(np.arange(1, num_experts + 1))
  return np.argsort(-scores, axis=1)[:, :selected].astype(np.int32)


def _of_trace(
  trace: Trace, num_tokens: int, num_selected: int, num_experts: int
) -> Int[np.ndarray, 'S K']:
  found, selected = trace.expert_index.shape
  if trace.num_experts != num_experts:
    raise UserError('--num_experts', num_experts, f'the trace is of {trace.num_experts} experts')
  if selected != num_selected:
    raise UserError(
      '--num_selected_experts', num_selected, f'in the trace a token has {selected} experts'
    )
  if found < num_tokens:
    raise UserError('--num_tokens', num_tokens, f'the trace has {found} tokens')
  return trace.expert_index[:num_tokens]


def record(workdir: str, num_tokens: int, data_dir: str | None = None) -> Trace:
  """Runs the model of a run over its training text and records the choices of its routers.

  The batches are those that training starts with: documents of all domains, shuffled. Of the MoE
  layers, the one with the fullest expert is taken: the hardest to dispatch.

  Args:
    workdir: of the run; its newest checkpoint is read.
    num_tokens: to record; a few more may be recorded.
    data_dir: where its data is kept; by default where the manifest of the run names it.

  Raises:
    UserError: if there is no such run, it has no experts, its text is another now, or a token may
      have fewer experts than others.
    DamagedError: if no checkpoint is good.
  """
  run = restore_run(workdir, mesh='data=1,expert=1', flag='--workdir')
  if not run.config.moe.num_experts:
    raise UserError('--workdir', workdir, 'holds a dense model, which routes nothing')
  if data_dir:
    if not os.path.isdir(data_dir):
      raise UserError('--data_dir', data_dir, 'must be a directory that exists')
    run.config.data.data_dir = data_dir
  choices = _choices(run, workdir, num_tokens)
  if choices.min() < 0:
    raise UserError(
      '--workdir',
      workdir,
      f'the router {run.config.moe.router} does not give every token as many experts',
    )
  num_experts = run.config.moe.num_experts
  fullest = [np.bincount(layer.ravel(), minlength=num_experts).max() for layer in choices]
  layer = int(np.argmax(fullest))
  return Trace(choices[layer], num_experts, layer, run.step)


def _choices(run: RestoredRun, workdir: str, num_tokens: int) -> Int[np.ndarray, 'L N K']:
  """Returns the choices of every MoE layer for tokens that are no padding."""
  dataset = dataset_of(run.config, run.tokenizer)
  if dataset.fingerprint != run.manifest['data']['fingerprint']:
    raise UserError(
      'data.name', run.config.data.name, f'is not the text that {workdir} was trained on'
    )
  task = build_task(run.config, run.mesh, run.tokenizer.vocab_size, 'eval').with_selected()

  @jax.jit
  def choices_of(params, router_state, batch):
    selected = task.loss(params, router_state, batch).selected
    assert selected is not None
    return selected.experts

  batches = train_iterator(
    dataset.windows('train', run.config.data.sequence_length),
    batch_size=batch_size_of(run.config, run.mesh),
    seed=run.config.train.seed,
  )
  found: list[np.ndarray] = []
  with jax.set_mesh(run.mesh):
    while sum(part.shape[1] for part in found) < num_tokens:
      batch = next(batches)
      choices = choices_of(run.params, run.router_state, put_batch(batch, task))
      found.append(np.asarray(choices)[:, batch['segment_ids'] > 0])
  return np.concatenate(found, axis=1)
