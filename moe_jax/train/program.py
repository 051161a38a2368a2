"""The compiled step of a config, shared by runs in one process that differ only in arguments."""

import copy
import functools
import json
from typing import Any

import ml_collections
import optax
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax import optim
from moe_jax.field_names import split_field
from moe_jax.models.build import build_task
from moe_jax.models.task import Task
from moe_jax.train.hyperparameters import hyperparameter_fields
from moe_jax.train.step import make_train_step


def program_of(config: ml_collections.ConfigDict) -> str:
  """Returns the fields of a config that decide the program of its step, as JSON."""
  program = copy.deepcopy(config)
  defaults = config_lib.get_config()
  starts = ('train.init_from', 'train.init_optimizer', 'train.init_router_state')
  for field in (*hyperparameter_fields(config), *starts):
    section, name = split_field(field)
    program[section][name] = defaults[section][name]
  return program.to_json(sort_keys=True)


@functools.lru_cache(maxsize=2)
def step_of(program: str, mesh: Mesh, vocab_size: int, packed: bool = False) -> Any:
  """Returns the step of a program; runs in one process that share it compile it once."""
  config = config_lib.get_config()
  config.update(json.loads(program))
  microbatch = config.data.batch_size // config.train.accumulation_steps
  task = build_task(config, mesh, vocab_size, 'train', microbatch)
  return make_train_step(
    task,
    optimizer_of(config, task),
    optim.make_schedule(config.optim, config.train.num_steps),
    config.train.accumulation_steps,
    accumulation_scope(config),
    config.moe.layer_reduction,
    config.train.load_decay,
    packed,
  )


def accumulation_scope(config: ml_collections.ConfigDict) -> str:
  """Returns the scope over which auxiliary losses are formed, see `make_gradient`.

  Balance scopes smaller than a micro-batch need no others: each lies in one micro-batch.
  """
  if config.moe.balance_scope != 'global':
    return 'microbatch'
  return config.train.accumulation_scope


def optimizer_of(config: ml_collections.ConfigDict, task: Task) -> optax.GradientTransformation:
  """Returns the optimizer of a run: one and the same object for all runs of a program.

  Its peak learning rate is an argument of `update`, see `make_optimizer`.
  """
  optimizer = config.optim.to_dict()
  if 'optim.learning_rate' in hyperparameter_fields(config):
    optimizer['learning_rate'] = config_lib.get_config().optim.learning_rate
  return _optimizer(json.dumps(optimizer, sort_keys=True), config.train.num_steps, task)


@functools.lru_cache(maxsize=8)
def _optimizer(optimizer: str, num_steps: int, task: Task) -> optax.GradientTransformation:
  config = config_lib.get_config()
  config.optim.update(json.loads(optimizer))
  return optim.make_optimizer(config.optim, num_steps, task.param_label)
