"""Measures the programs of a study by running each for a moment, in a temporary directory."""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.run import setup
from moe_jax.run.progress import Listener
from moe_jax.run.single import train
from moe_jax.study import Study
from moe_jax.sweep import evaluate_trials, time_estimate
from moe_jax.sweep.evaluations import config_for
from moe_jax.sweep.time_estimate import TRAINING, Measured, Work
from moe_jax.sweep.trials import Trial
from moe_jax.train import evaluate, evaluation_batches
from moe_jax.train.state import init_params, params_shardings

# Steps and batches of a probe; the first is set-up.
STEPS = 5


class _EnoughError(Exception):
  """Ends a probe."""


def probe(study: Study, trials: Sequence[Trial]) -> dict[tuple[str, str], list[Measured]]:
  """Returns the seconds of each program of the trials.

  Prepares the data. Each program runs twice, so that the second run shows how long a trial takes to
  start once its program is compiled. Trials run one by one, not packed.
  """
  measured: dict[tuple[str, str], list[Measured]] = {}
  for trial in trials:
    setup.dataset_of(trial.config)
    work = time_estimate.work_of(study, trial, None)
    for name, one in zip((TRAINING, *study.evaluations), work, strict=True):
      if (one.part, one.program) in measured:
        continue
      run = _train if one.part == TRAINING else _evaluate
      measured[one.part, one.program] = [_measured(run, study, trial, name, one) for _ in range(2)]
  return measured


def _measured(run: Any, study: Study, trial: Trial, name: str, work: Work) -> Measured:
  start = time.perf_counter()
  ticks: list[float] = []

  def tick(*_) -> None:
    ticks.append(time.perf_counter())
    if len(ticks) == STEPS:
      raise _EnoughError

  with contextlib.suppress(_EnoughError):
    run(study, trial, name, tick)
    # It had fewer steps than a probe wants.
    ticks.append(time.perf_counter())
  # Nothing waits for the first step before the second was begun.
  timed = ticks[1:] if len(ticks) > 2 else ticks
  step = (timed[-1] - timed[0]) / max(1, len(timed) - 1)
  return Measured(ticks[0] - start, step, work.flops)


def _train(study: Study, trial: Trial, name: str, on_step: Any) -> None:
  del study, name
  with tempfile.TemporaryDirectory(prefix='moe_jax_probe_') as folder:
    train(trial.config, folder, Listener(lambda line: None, on_step))


def _evaluate(study: Study, trial: Trial, name: str, on_batch: Any) -> None:
  """Evaluates the initial values, which take as long as trained ones."""
  config = config_for(trial.config, name)
  mesh, dataset = setup.mesh_of(config), setup.dataset_of(config)
  program = evaluate_trials.evaluation_program(config)
  task, step = evaluate_trials.eval_step(program, mesh, dataset.tokenizer.vocab_size)
  with jax.set_mesh(mesh):
    new = jax.jit(lambda: init_params(task, jnp.int32(0)), out_shardings=params_shardings(task))
    evaluate.evaluate(
      step,
      task,
      new(),
      task.init_router_state(),
      dataset,
      split=study.split,
      sequence_length=config.data.sequence_length,
      batch_size=evaluation_batches.batch_size_of(config, mesh),
      on_batch=lambda: on_batch(),
    )
