"""The gain of training several trials as one program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from moe_jax.benchmark.harness.timing import is_invalid, measure, ratio
from moe_jax.data import ByteTokenizer
from moe_jax.models.build import build_task
from moe_jax.parallel.sharding import sharding
from moe_jax.run.setup import mesh_of
from moe_jax.train.hyperparameters import hyperparameters_of
from moe_jax.train.program import optimizer_of, program_of, step_of
from moe_jax.train.state import init_state, state_shardings
from moe_jax.train.step import packed_shardings


def rows(
  config: ml_collections.ConfigDict, num_trials: list[int], rounds: int, seed: int
) -> Iterator[dict[str, Any]]:
  """Measures N training steps of N trials one after the other against one packed step of them.

  On random tokens without padding, data pipeline and files left out. The reference runs a second
  time as an arm of its own, the A/A control.

  Args:
    config: of every trial; their seeds differ.
    num_trials: values of N.
    rounds: of interleaved calls.
    seed: of tokens and orders.

  Yields:
    num_trials; `gain`, the time of the trials one by one over that of the pack; `null`; `void`.
  """
  mesh = mesh_of(config)
  with jax.set_mesh(mesh):
    for number in num_trials:
      alone = _calls(config, mesh, 1, seed)
      packed = _calls(config, mesh, number, seed)

      def one_by_one(alone=alone, number=number):
        for _ in range(number):
          alone()

      arms = {'alone': one_by_one, 'again': one_by_one, 'packed': packed}
      for arm in arms.values():
        arm()
      seconds = measure(arms, rounds, seed)
      null = ratio(seconds['alone'], seconds['again'])
      gain = ratio(seconds['alone'], seconds['packed'])
      yield {
        'num_trials': number,
        'gain': gain._asdict(),
        'null': null._asdict(),
        'void': is_invalid(null),
      }


def _calls(
  config: ml_collections.ConfigDict, mesh: Mesh, number: int, seed: int
) -> Callable[[], None]:
  """Returns a call that does one step of N trials together and waits for it."""
  vocab_size = config.data.vocab_size or ByteTokenizer().vocab_size
  microbatch = config.data.batch_size // config.train.accumulation_steps
  task = build_task(config, mesh, vocab_size, 'train', microbatch)
  optimizer = optimizer_of(config, task)
  step = step_of(program_of(config), mesh, vocab_size, packed=number > 1)
  hyperparameters = hyperparameters_of(config)
  states = [init_state(task, optimizer, trial) for trial in range(number)]
  shape = (config.data.batch_size, config.data.sequence_length)
  tokens = np.random.default_rng(seed).integers(0, vocab_size, (number, *shape), np.int32)
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), tokens.shape)
  rows = {
    'inputs': tokens,
    'targets': np.roll(tokens, -1, axis=-1),
    'segment_ids': np.ones_like(tokens),
    'positions': positions,
  }
  dims = ['batch']
  state: Any = states[0]
  if number > 1:
    dims = ['trials', 'batch']
    hyperparameters = jax.tree.map(lambda x: jnp.stack([x] * number), hyperparameters)
    state = jax.jit(
      lambda *s: jax.tree.map(lambda *x: jnp.stack(x), *s),
      out_shardings=packed_shardings(state_shardings(task, optimizer)),
    )(*states)
  else:
    rows = {name: value[0] for name, value in rows.items()}
  batch = {name: jax.device_put(value, sharding(mesh, *dims)) for name, value in rows.items()}
  held = [state]

  def call() -> None:
    held[0], metrics = step(held[0], batch, hyperparameters)
    jax.block_until_ready((held[0], metrics))

  return call
