"""Bits per byte of a run by domain: python -m moe_jax.evaluate --workdir=runs/quickstart."""

import copy
import hashlib
import os
import pathlib
from typing import Any

import jax
import tqdm
from absl import flags

from moe_jax import cli
from moe_jax.data import (
  EVALUATION_SPLIT,
  SPLITS,
  Dataset,
  compression_baselines,
  evaluation_dataset,
)
from moe_jax.errors import UserError
from moe_jax.models.build import build_model
from moe_jax.results import load_figure
from moe_jax.train import churn
from moe_jax.train import evaluate as evaluate_room
from moe_jax.train.loop import write_json
from moe_jax.train.opening import dataset_of
from moe_jax.train.restore import RestoredRun, restore_run

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.')
_SPLIT = flags.DEFINE_string('split', 'test', 'train, valid or test.')
_DATA = flags.DEFINE_string(
  'data',
  None,
  'Other text, all of it: tier1, tier2, tfds:NAME or text:PATH (a folder of .txt or .jsonl).',
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, "Where the data is kept; the run's by default.")
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; the newest by default.')
_COMPARE = flags.DEFINE_integer(
  'compare_step', None, 'An earlier checkpoint: how much routing changed since then.'
)
_COMPARE_DTYPE = flags.DEFINE_enum(
  'compare_router_dtype',
  None,
  ['float32', 'bfloat16'],
  'How much routing would change with moe.router_dtype of this value.',
)
_MESH = flags.DEFINE_string('mesh', None, "data=D,expert=E; the run's own by default.")
_FIGURE = flags.DEFINE_bool('figure', True, 'Also draw expert load into WORKDIR/expert_load.png.')


def main() -> None:
  """Evaluates, prints the tables and writes WORKDIR/evaluation_SPLIT.json or _DATA.json."""
  workdir = cli.required(_WORKDIR)
  if os.path.isdir(workdir) and not os.access(workdir, os.W_OK):
    raise UserError('--workdir', workdir, 'cannot be written: results are kept there')
  if _SPLIT.value not in SPLITS:
    raise UserError('--split', _SPLIT.value, f'must be one of {", ".join(SPLITS)}')
  run = restore_run(workdir, _STEP.value, _MESH.value)
  if _DATA_DIR.value:
    if not os.path.isdir(_DATA_DIR.value):
      raise UserError('--data_dir', _DATA_DIR.value, 'must be a directory that exists')
    run.config.data.data_dir = _DATA_DIR.value
  dataset, split, name = _text(run, workdir)
  length, microbatch = (
    run.config.data.sequence_length,
    evaluate_room.batch_size_of(run.config, run.mesh),
  )
  model = build_model(run.config, run.mesh, run.tokenizer.vocab_size, 'eval')
  batches = evaluate_room.num_batches(dataset, split, length, microbatch)
  earlier = _earlier(workdir, run)
  _check_compared_dtype(run)
  batches *= 1 + (earlier is not None) + (_COMPARE_DTYPE.value is not None)
  progress = tqdm.tqdm(total=batches, unit='batch', leave=False, mininterval=0.2, disable=None)
  with jax.set_mesh(run.mesh), progress as bar:
    result = evaluate_room.evaluate(
      evaluate_room.make_eval_step(model),
      model,
      run.params,
      run.router_state,
      dataset,
      split=split,
      sequence_length=length,
      batch_size=microbatch,
      on_batch=bar.update,
    )
    if earlier is not None:
      changed = _churn(run, earlier, run.config, dataset, split, length, microbatch, bar.update)
      _add_churn(result, changed, 'router/churn')
      result['compare_step'] = earlier.step
    if _COMPARE_DTYPE.value is not None:
      config = copy.deepcopy(run.config)
      config.moe.router_dtype = _COMPARE_DTYPE.value
      changed = _churn(run, run, config, dataset, split, length, microbatch, bar.update)
      _add_churn(result, changed, 'router/dtype_disagreement')
      result['compare_router_dtype'] = _COMPARE_DTYPE.value
  result |= {'step': run.step, 'eval_capacity_factor': run.config.moe.eval_capacity_factor}
  _add_baselines(result, dataset, split)
  if _DATA.value is not None:
    result |= {'data': _DATA.value, 'data_fingerprint': dataset.fingerprint, 'split': 'all'}
  path = pathlib.Path(workdir) / f'evaluation_{name}.json'
  write_json(path, result)
  _print_quality(result)
  if run.config.moe.num_experts:
    _print_load(result)
    if earlier is not None:
      title = f'assignments that changed since step {earlier.step} (churn)'
      _print_churn(result, title, 'router/churn')
    if _COMPARE_DTYPE.value is not None:
      title = f'assignments that differ with routers in {_COMPARE_DTYPE.value}'
      _print_churn(result, title, 'router/dtype_disagreement')
    if _FIGURE.value:
      figure = load_figure.draw(
        workdir, result, run.config, '' if _DATA.value is None else f'_{name}'
      )
      print(f'expert load over training and by domain: {figure}')
  print(f'all numbers: {path}')


def _text(run: RestoredRun, workdir: str) -> tuple[Dataset, str, str]:
  """Returns a data set, the split to evaluate on, and what names the result."""
  source = _DATA.value
  if source is None:
    dataset = dataset_of(run.config)
    if dataset.fingerprint != run.facts['data']['fingerprint']:
      raise UserError(
        'data.name',
        run.config.data.name,
        f'is not the text and tokenizer that {workdir} was trained on',
      )
    return dataset, _SPLIT.value, _SPLIT.value
  if _SPLIT.present:
    raise UserError('--split', _SPLIT.value, "can't be given with --data, which is read whole")
  if source == run.config.data.name:
    raise UserError('--data', source, 'is what the run was trained on: use --split')
  if {source, run.config.data.name} == {'tier1', 'tier2'}:
    print(f'warning: tier2 holds the works of tier1: the run was trained on parts of {source}')
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


def _earlier(workdir: str, run: RestoredRun) -> RestoredRun | None:
  """Returns the checkpoint to compare with, if one was asked for."""
  if _COMPARE.value is None:
    return None
  if not run.config.moe.num_experts:
    raise UserError('--compare_step', _COMPARE.value, 'a dense model has no routing to compare')
  if _COMPARE.value >= run.step:
    raise UserError('--compare_step', _COMPARE.value, f'must be before step {run.step}')
  mesh = ','.join(f'{name}={size}' for name, size in run.mesh.shape.items())
  return restore_run(workdir, _COMPARE.value, mesh, '--compare_step')


def _check_compared_dtype(run: RestoredRun) -> None:
  value = _COMPARE_DTYPE.value
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
  model, before = (
    build_model(c, mesh, vocab_size, 'eval', returns_choices=True) for c in (run.config, config)
  )
  return churn.churn(
    churn.make_overlap_step(model, before),
    model,
    churn.Weights(earlier.params, earlier.router_state),
    churn.Weights(run.params, run.router_state),
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


def _print_churn(result: dict[str, Any], title: str, name: str) -> None:
  print(f'{title}, % by layer:')
  for domain, summary in [*result['domains'].items(), ('all', result)]:
    print(f'  {domain:<14}' + ''.join(f'{share * 100:>7.1f}' for share in summary[name]))


if __name__ == '__main__':
  cli.run(main)
