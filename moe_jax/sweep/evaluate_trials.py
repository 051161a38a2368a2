"""Evaluation of trained trials, one by one or several of one program together."""

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax.data import Dataset
from moe_jax.models.build import build_task
from moe_jax.models.task import Task
from moe_jax.run import device_errors
from moe_jax.run.restore import restore_run
from moe_jax.run.setup import dataset_of
from moe_jax.study import Study
from moe_jax.sweep.evaluations import config_for
from moe_jax.sweep.outcome import one_line, stop_if_full
from moe_jax.sweep.stopwatch import Stopwatch
from moe_jax.sweep.trials import Trial
from moe_jax.train import evaluate, evaluation_batches
from moe_jax.train.program import program_of


class Evaluated(NamedTuple):
  """A trial's evaluations by name, the seconds of each, and how many trials made them together."""

  results: dict[str, Any]
  seconds: dict[str, Any]
  together: int = 1


# Takes how far an evaluation is, in words.
Show = Callable[[str], None]


def evaluate_trial(study: Study, trial: Trial, folder: str, *, show: Show) -> Evaluated:
  """Returns every evaluation of the study at the trial's last checkpoint."""
  with device_errors.explained(trial.config):
    return _evaluate_alone(study, trial, folder, show=show)


def _evaluate_alone(study: Study, trial: Trial, folder: str, *, show: Show) -> Evaluated:
  watch = Stopwatch()
  evaluated = Evaluated({}, {})
  restored = restore_run(folder, trial.config.train.num_steps)
  dataset = dataset_of(trial.config, restored.tokenizer)
  for name in study.evaluations:
    config = config_for(trial.config, name)
    program = evaluation_program(config)
    task, step = eval_step(program, restored.mesh, restored.tokenizer.vocab_size)
    size = evaluation_batches.batch_size_of(config, restored.mesh)
    with jax.set_mesh(restored.mesh):
      evaluated.results[name] = evaluate.evaluate(
        step,
        task,
        restored.params,
        restored.router_state,
        dataset,
        split=study.split,
        sequence_length=config.data.sequence_length,
        batch_size=size,
        on_batch=watch.counting(
          _showing(show, name, _num_batches(study, config, dataset, batch_size=size))
        ),
      )
    evaluated.seconds[name] = watch.seconds()
    watch = Stopwatch()
  return evaluated


def evaluate_pack(
  study: Study, unit: list[Trial], workdir: str, say: Callable[[str], None], *, show: Show
) -> dict[str, Evaluated]:
  """Returns evaluations of trials of one program by id; {} if they must be evaluated one by one."""
  try:
    return _evaluate_together(study, unit, workdir, show=show)
  except Exception as error:
    stop_if_full(error, workdir)
    # An error of one trial shows when it is evaluated by itself, which comes next.
    say(
      f'warning: evaluating {len(unit)} trials together failed, they are evaluated alone: '
      f'{one_line(error)}'
    )
    return {}


def _evaluate_together(
  study: Study, unit: list[Trial], workdir: str, *, show: Show
) -> dict[str, Evaluated]:
  watch = Stopwatch()
  evaluated = {trial.id: Evaluated({}, {}, len(unit)) for trial in unit}
  runs = [restore_run(str(t.folder(workdir)), t.config.train.num_steps) for t in unit]
  mesh, vocab_size = runs[0].mesh, runs[0].tokenizer.vocab_size
  dataset = dataset_of(unit[0].config, runs[0].tokenizer)
  for name in study.evaluations:
    config = config_for(unit[0].config, name)
    task, step = eval_step(evaluation_program(config), mesh, vocab_size, packed=True)
    size = evaluation_batches.batch_size_of(config, mesh)
    with jax.set_mesh(mesh):
      results = evaluate.evaluate_packed(
        step,
        task,
        [(run.params, run.router_state) for run in runs],
        dataset,
        split=study.split,
        sequence_length=config.data.sequence_length,
        batch_size=size,
        on_batch=watch.counting(
          _showing(show, name, _num_batches(study, config, dataset, batch_size=size))
        ),
      )
    for trial, result in zip(unit, results, strict=True):
      evaluated[trial.id].results[name] = result
      evaluated[trial.id].seconds[name] = watch.seconds(len(unit))
    watch = Stopwatch()
  return evaluated


def _num_batches(
  study: Study, config: ml_collections.ConfigDict, dataset: Dataset, *, batch_size: int
) -> int:
  length = config.data.sequence_length
  return evaluation_batches.num_batches(dataset, study.split, length, batch_size)


def _showing(show: Show, name: str, num_batches: int) -> Callable[[], None]:
  """Returns what is to be called after each batch of an evaluation."""
  show(f'{name}, {num_batches} batches')
  done = itertools.count(1)
  return lambda: show(f'{name}, batch {next(done)} of {num_batches}')


def evaluation_program(config: ml_collections.ConfigDict) -> str:
  """Returns the fields of a config that decide the program of an evaluation, as JSON."""
  fields = json.loads(program_of(config))
  defaults = config_lib.get_config().to_dict()
  fields |= {'train': defaults['train'], 'optim': defaults['optim']}
  return json.dumps(fields, sort_keys=True)


def eval_step(
  program: str, mesh: Mesh, vocab_size: int, packed: bool = False
) -> tuple[Task, evaluate.EvalStep]:
  """Returns the task and the step of an `evaluation_program`, compiled once in a process."""
  config = config_lib.get_config()
  config.update(json.loads(program))
  task = build_task(config, mesh, vocab_size, 'eval')
  return task, evaluate.make_eval_step(task, packed)
