"""The parts of a training step as shares of its time, and its wait for data."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from moe_jax import optim, profiling
from moe_jax.data import train_iterator
from moe_jax.models.build import build_task
from moe_jax.run.setup import dataset_of, mesh_of
from moe_jax.run.single import next_batch
from moe_jax.train.hyperparameters import hyperparameters_of
from moe_jax.train.program import accumulation_scope, optimizer_of
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient, make_loss, make_train_step, put_batch


def shares(
  config: ml_collections.ConfigDict, rounds: int, steps: int, profile: str = ''
) -> dict[str, Any]:
  """Measures the parts of a step, as shares of it.

  Forward, forward + backward, and the whole step are compiled apart and run one after the other on
  the same batch, `rounds` times. Then `steps` real steps run with the data pipeline behind them.

  Returns:
    Medians over rounds: `forward`, `backward`, `optimizer` (the rest: clipping and update), as
    shares of the step; `data_wait`, the share of the time of the real steps in which the devices
    waited for the next batch, at most; `compilations` of the step; with `profile`, a directory for
    a trace, the table of the step's time by part.
  """
  mesh = mesh_of(config)
  dataset = dataset_of(config)
  microbatch = config.data.batch_size // config.train.accumulation_steps
  task = build_task(config, mesh, dataset.tokenizer.vocab_size, 'train', microbatch)
  optimizer = optimizer_of(config, task)
  schedule = optim.make_schedule(config.optim, config.train.num_steps)
  accumulate = (
    config.train.accumulation_steps,
    accumulation_scope(config),
    config.moe.layer_reduction,
  )
  batches = train_iterator(
    dataset.windows('train', config.data.sequence_length),
    batch_size=config.data.batch_size,
    seed=config.train.seed,
  )
  hyperparameters = hyperparameters_of(config)
  with jax.set_mesh(mesh):
    state = init_state(task, optimizer, config.train.seed)
    batch = put_batch(next(batches), task)
    key = jax.random.key(0)
    # A copy: the step donates its state.
    router_state = jax.tree.map(jnp.copy, state.router_state)
    loss = make_loss(task, config.moe.layer_reduction)
    parts = {
      'forward': jax.jit(
        lambda params: loss(params, router_state, batch, key, hyperparameters.weights, 1.0, None)[0]
      )
    }
    gradient = make_gradient(task, *accumulate)
    parts['gradient'] = jax.jit(
      lambda params: gradient(params, router_state, batch, key, hyperparameters.weights)[0]
    )
    step = make_train_step(
      task, optimizer, schedule, *accumulate[:2], layer_reduction=accumulate[2]
    )
    for part in parts.values():
      jax.block_until_ready(part(state.params))
    state, _ = step(state, batch, hyperparameters)
    seconds, state = _in_turn(parts, step, state, batch, hyperparameters, rounds=rounds)
    share_waited, state = _share_waited(
      step, state, batches, hyperparameters, task=task, steps=steps
    )
    table = _traced(step, state, batch, hyperparameters, profile)
  whole = np.array(seconds['step'])
  forward = float(np.median(np.array(seconds['forward']) / whole))
  gradient_share = float(np.median(np.array(seconds['gradient']) / whole))
  return {
    'forward': forward,
    'backward': gradient_share - forward,
    'optimizer': 1 - gradient_share,
    'data_wait': share_waited,
    'compilations': step._cache_size(),
  } | table


def _in_turn(parts, step, state, batch, hyperparameters, *, rounds: int) -> tuple[Any, Any]:
  """Returns the seconds of each part and of the step, one after the other in each round."""
  seconds: dict[str, list[float]] = {'forward': [], 'gradient': [], 'step': []}
  for _ in range(rounds):
    for name, part in parts.items():
      start = time.perf_counter()
      jax.block_until_ready(part(state.params))
      seconds[name].append(time.perf_counter() - start)
    start = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch, hyperparameters))
    seconds['step'].append(time.perf_counter() - start)
  return seconds, state


def _share_waited(step, state, batches, hyperparameters, *, task, steps: int) -> tuple[float, Any]:
  """Returns the share of the time of real steps in which devices waited for data, at most.

  As in training: one step is always in flight.
  """
  waited, pending = 0.0, None
  start = time.perf_counter()
  for _ in range(steps):
    batch, seconds_waited = next_batch(batches, task, pending and pending.grad_norm)
    waited += seconds_waited
    state, metrics = step(state, batch, hyperparameters)
    jax.block_until_ready(pending)
    pending = metrics
  jax.block_until_ready(pending)
  return waited / (time.perf_counter() - start), state


def _traced(step, state, batch, hyperparameters, profile: str) -> dict[str, Any]:
  """Returns the table of the time of a step by part, as `profile`; {} without a directory."""
  if not profile:
    return {}
  compiled = step.lower(state, batch, hyperparameters).compile()
  held = [state]

  def call() -> None:
    held[0], _ = jax.block_until_ready(compiled(held[0], batch, hyperparameters))

  call()
  return {
    'profile': profiling.trace_calls(call, compiled.as_text(), '--profile', profile).to_json()
  }
