"""Bits per byte of a run by domain, written to its folder and printed as tables."""

import copy
import hashlib
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import ml_collections
import tqdm

from moe_jax.data import (
  EVALUATION_SPLIT,
  Dataset,
  compression_baselines,
  evaluation_dataset,
)
from moe_jax.errors import UserError
from moe_jax.files import write_json
from moe_jax.models.build import build_task
from moe_jax.run.restore import RestoredRun, restore_run
from moe_jax.run.setup import dataset_of
from moe_jax.train import evaluate as evaluate_lib
from moe_jax.train import evaluation_batches, routing_change


class Request(NamedTuple):
  """An evaluation of a run as requested.

  Attributes:
    workdir: of the run.
    split: of `moe_jax.data.SPLITS`; None for `test`, and with `data`.
    data: a source of other text, all of which is read.
    step: of a checkpoint; the newest by default.
    mesh: 'data=D,expert=E'; the run's own by default.
    data_dir: where the data is kept; the run's by default.
    compare_step: of an earlier checkpoint: how much routing changed since then.
    compare_router_dtype: how much routing would change with this `moe.router_dtype`.
  """

  workdir: str
  split: str | None = None
  data: str | None = None
  step: int | None = None
  mesh: str | None = None
  data_dir: str | None = None
  compare_step: int | None = None
  compare_router_dtype: str | None = None


class Evaluation(NamedTuple):
  """A run on some text.

  Attributes:
    result: as it was written.
    name: of the split, or of the other text; part of the names of files.
    path: of the file.
    config: of the run.
  """

  result: dict[str, Any]
  name: str
  path: pathlib.Path
  config: ml_collections.ConfigDict


def evaluate(request: Request) -> Evaluation:
  """Evaluates a run and writes WORKDIR/evaluation_SPLIT.json, or _DATA.json.

  Raises:
    UserError: if there is no such run or step, or its text is another now.
    DamagedError: if no checkpoint is good.
  """
  workdir = request.workdir
  run = restore_run(workdir, request.step, request.mesh)
  if request.data_dir:
    run.config.data.data_dir = request.data_dir
  dataset, split, name = _text(request, run)
  length, microbatch = (
    run.config.data.sequence_length,
    evaluation_batches.batch_size_of(run.config, run.mesh),
  )
  task = build_task(run.config, run.mesh, run.tokenizer.vocab_size, 'eval')
  batches = evaluation_batches.num_batches(dataset, split, length, microbatch)
  earlier = _earlier(request, run)
  compared_dtype = request.compare_router_dtype
  _check_compared_dtype(compared_dtype, run)
  batches *= 1 + (earlier is not None) + (compared_dtype is not None)
  progress = tqdm.tqdm(total=batches, unit='batch', leave=False, mininterval=0.2, disable=None)
  with jax.set_mesh(run.mesh), progress as bar:
    result = evaluate_lib.evaluate(
      evaluate_lib.make_eval_step(task),
      task,
      run.params,
      run.router_state,
      dataset,
      split=split,
      sequence_length=length,
      batch_size=microbatch,
      with_matrices=True,
      on_batch=bar.update,
    )
    if earlier is not None:
      changed = _churn(run, earlier, run.config, dataset, split, length, microbatch, bar.update)
      _add_churn(result, changed, 'router/churn')
      result['compare_step'] = earlier.step
    if compared_dtype is not None:
      config = copy.deepcopy(run.config)
      config.moe.router_dtype = compared_dtype
      changed = _churn(run, run, config, dataset, split, length, microbatch, bar.update)
      _add_churn(result, changed, 'router/dtype_disagreement')
      result['compare_router_dtype'] = compared_dtype
  result |= {'step': run.step, 'eval_capacity_factor': run.config.moe.eval_capacity_factor}
  _add_baselines(result, dataset, split)
  if request.data is not None:
    result |= {'data': request.data, 'data_fingerprint': dataset.fingerprint, 'split': 'all'}
  path = pathlib.Path(workdir) / f'evaluation_{name}.json'
  write_json(path, result)
  return Evaluation(result, name, path, run.config)


def _text(request: Request, run: RestoredRun) -> tuple[Dataset, str, str]:
  """Returns a data set, the split to evaluate on, and the name of the result."""
  source = request.data
  if source is None:
    dataset = dataset_of(run.config, run.tokenizer)
    if dataset.fingerprint != run.manifest['data']['fingerprint']:
      raise UserError(
        'data.name',
        run.config.data.name,
        f'is not the text and tokenizer that {request.workdir} was trained on',
      )
    split = request.split or 'test'
    return dataset, split, split
  if source == run.config.data.name:
    raise UserError('--data', source, 'is what the run was trained on: use --split')
  if {source, run.config.data.name} == {'tier1', 'tier2'}:
    print(
      f'warning: tier2 holds the works of tier1: the run was trained on parts of {source}',
      file=sys.stderr,
    )
  dataset = evaluation_dataset(source, run.tokenizer, run.config.data.data_dir)
  return dataset, EVALUATION_SPLIT, _file_name(source)


def _file_name(source: str) -> str:
  """Returns a name for a source that no split has; different for folders of the same name."""
  kind, _, place = source.partition(':')
  if not place:
    return kind
  path = os.path.abspath(place) if kind == 'text' else place
  readable = ''.join(c if c.isalnum() else '-' for c in os.path.basename(path))
  return f'{kind}_{readable}_{hashlib.sha256(path.encode()).hexdigest()[:8]}'


def print_tables(result: dict[str, Any]) -> None:
  """Prints the results of `evaluate`."""
  _print_quality(result)
  if 'router/load' not in result:
    return
  _print_load(result)
  _print_specialization(result)
  if 'compare_step' in result:
    title = f'assignments that changed since step {result["compare_step"]} (churn)'
    _print_churn(result, title, 'router/churn')
  if 'compare_router_dtype' in result:
    title = f'assignments that differ with routers in {result["compare_router_dtype"]}'
    _print_churn(result, title, 'router/dtype_disagreement')


def _earlier(request: Request, run: RestoredRun) -> RestoredRun | None:
  """Returns the checkpoint to compare with, if the request names one."""
  step = request.compare_step
  if step is None:
    return None
  if not run.config.moe.num_experts:
    raise UserError('--compare_step', step, 'a dense model has no routing to compare')
  if step >= run.step:
    raise UserError('--compare_step', step, f'must be before step {run.step}')
  mesh = ','.join(f'{name}={size}' for name, size in run.mesh.shape.items())
  return restore_run(request.workdir, step, mesh, '--compare_step')


def _check_compared_dtype(value: str | None, run: RestoredRun) -> None:
  if value is None:
    return
  if not run.config.moe.num_experts:
    raise UserError('--compare_router_dtype', value, 'a dense model has no routing to compare')
  if value == run.config.moe.router_dtype:
    raise UserError('--compare_router_dtype', value, 'is what the run has: must be the other one')


def _churn(
  run, earlier, config, dataset: Dataset, split: str, length: int, microbatch: int, on_batch
):
  """Compares a run with an earlier checkpoint, or with itself under another config."""
  mesh, vocab_size = run.mesh, run.tokenizer.vocab_size
  task, before = (build_task(c, mesh, vocab_size, 'eval') for c in (run.config, config))
  return routing_change.churn(
    routing_change.make_overlap_step(task, before),
    task,
    routing_change.Weights(earlier.params, earlier.router_state),
    routing_change.Weights(run.params, run.router_state),
    dataset,
    split=split,
    sequence_length=length,
    batch_size=microbatch,
    on_batch=on_batch,
  )


def _add_churn(result: dict[str, Any], changed: dict[str, Any], name: str) -> None:
  result[name] = changed['router/churn']
  for domain, summary in changed['domains'].items():
    result['domains'][domain][name] = summary['router/churn']


def _add_baselines(result: dict[str, Any], dataset: Dataset, split: str) -> None:
  for domain, summary in result['domains'].items():
    summary |= compression_baselines(dataset.document_text(split, domain))
  total = result['bytes']
  for name in ('gzip', 'xz'):
    bits = sum(s[name] * s['bytes'] for s in result['domains'].values())
    result[name] = bits / total


def _print_quality(result: dict[str, Any]) -> None:
  text = result.get('data') or f'{result["split"]} split, whole held-out documents'
  print(f'{text}, step {result["step"]}; bits per byte:')
  print(f'{"domain":<14}{"model":>8}{"gzip -9":>9}{"xz -9":>8}{"kB":>8}{"loss":>8}{"drop":>7}')
  rows = [*result['domains'].items(), ('all', result)]
  for domain, summary in rows:
    drop = f'{summary["router/drop_share"]:.1%}' if 'router/drop_share' in summary else '-'
    print(
      f'{domain:<14}{summary["bits_per_byte"]:>8.3f}{summary["gzip"]:>9.3f}{summary["xz"]:>8.3f}'
      f'{summary["bytes"] / 1000:>8.0f}{summary["loss"]:>8.3f}{drop:>7}'
    )


def _print_load(result: dict[str, Any]) -> None:
  num_layers = len(result['router/load'])
  print('load of each expert, % of assignments before any drop:')
  for layer in range(num_layers):
    for domain, summary in [*result['domains'].items(), ('all', result)]:
      load = ''.join(f'{share * 100:>6.1f}' for share in summary['router/load'][layer])
      print(f'  layer {layer}  {domain:<14}{load}')


def _print_specialization(result: dict[str, Any]) -> None:
  """Prints the measures of `moe_jax.train.specialization` that are known."""
  columns = {
    'expert_domain_mi': 'bits: domain',
    'expert_token_mi': 'bits: token id',
    'domain_load_overlap': 'domain overlap',
    'coactivation': 'top partner',
    'expert_similarity': 'similarity',
  }
  print('specialisation, per layer; by chance in brackets, already subtracted from bits:')
  print('  layer  ' + ''.join(f'{title:>16}' for title in columns.values()))
  for layer in range(len(result['router/load'])):
    cells = []
    for name in columns:
      values = [result.get(f'router/{name}{ending}') for ending in ('', '_baseline')]
      shown = [f'{value[layer]:.3f}' for value in values if value is not None]
      cells.append(f'{shown[0]} ({shown[1]})' if len(shown) == 2 else ''.join(shown) or '-')
    print(f'  {layer:<7}' + ''.join(f'{cell:>16}' for cell in cells))
  if 'router/coactivation' not in result:
    print('  every token goes to every expert: there is no choice to measure')


def _print_churn(result: dict[str, Any], title: str, name: str) -> None:
  print(f'{title}, % by layer:')
  for domain, summary in [*result['domains'].items(), ('all', result)]:
    print(f'  {domain:<14}' + ''.join(f'{share * 100:>7.1f}' for share in summary[name]))
