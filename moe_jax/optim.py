"""Learning-rate schedules and the Optax chain of a run.

Layers, experts, and the gate and value of a gated unit are stacked in one array of parameters. No
statistic of an optimizer spans such a stack (`moe_jax.stacks`): each matrix and each vector is
updated as if it were an array of its own, so that a sweep over experts or layers never changes the
optimizer. Clipping is by the global norm, over all parameters by its definition.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib
from jaxtyping import Array, Int

from moe_jax import stacks
from moe_jax.errors import UserError


def make_schedule(optim: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
  """Returns step -> learning rate as a share of its peak: linear warm-up from 0, then the schedule.

  Args:
    optim: the `optim` part of a config.
    num_steps: optimizer steps of the whole run.
  """
  peak, end = 1.0, optim.final_fraction
  after = max(1, num_steps - optim.warmup_steps)
  if optim.schedule == 'cosine':
    decay = optax.cosine_decay_schedule(peak, after, alpha=optim.final_fraction)
  elif optim.schedule == 'linear':
    decay = optax.linear_schedule(peak, end, after)
  elif optim.schedule == 'wsd':
    decay_steps = max(1, round(optim.decay_fraction * num_steps))
    decay = optax.linear_schedule(peak, end, decay_steps, max(0, after - decay_steps))
  elif optim.schedule == 'constant':
    decay = optax.constant_schedule(peak)
  else:
    raise UserError('optim.schedule', optim.schedule, 'must be cosine, linear, wsd or constant')
  if not optim.warmup_steps:
    return decay
  warmup = optax.linear_schedule(0.0, peak, optim.warmup_steps)
  return optax.join_schedules([warmup, decay], [optim.warmup_steps])


def decay_start(optim: ml_collections.ConfigDict, num_steps: int) -> int:
  """Returns the last step of wsd with the peak rate: the updates so far depend on no length."""
  decay_steps = max(1, round(optim.decay_fraction * num_steps))
  return max(optim.warmup_steps, num_steps - decay_steps)


def make_optimizer(
  optim: ml_collections.ConfigDict, num_steps: int, labeller: stacks.Labeller = stacks.label
) -> optax.GradientTransformation:
  """Returns clipping by global norm followed by the optimizer, decay and schedule of the config.

  The gradient that comes in is that of the whole batch: clipping sees the same norm on any mesh.
  The peak of the learning rate is an argument of `update`, `learning_rate=`; by default it is that
  of the config. Every rule is linear in it.

  Args:
    optim: the `optim` part of a config.
    num_steps: optimizer steps of the whole run.
    labeller: returns the kind of a parameter (`Task.param_label`): only matrices inside blocks
      decay, and Muon takes those except a router's.
  """
  schedule = make_schedule(optim, num_steps)
  decayed = functools.partial(stacks.is_matrix, labeller=labeller)
  if optim.name == 'adamw':
    rule = optax.adamw(
      schedule,
      optim.b1,
      optim.b2,
      optim.epsilon,
      weight_decay=optim.weight_decay,
      mask=decayed,
    )
  elif optim.name == 'adafactor':
    # In parts: optax.adafactor would apply its weight decay without the learning rate.
    rule = optax.chain(
      _scale_by_factored_rms(),
      _clip_by_block_rms(1.0),
      optax.add_decayed_weights(optim.weight_decay, mask=decayed),
      optax.scale_by_learning_rate(schedule),
    )
  elif optim.name == 'muon':
    rule = _muon(optim, schedule, labeller)
  elif optim.name == 'sgd':
    rule = optax.chain(
      optax.add_decayed_weights(optim.weight_decay, mask=decayed),
      optax.sgd(schedule, momentum=optim.momentum or None),
    )
  else:
    raise UserError('optim.name', optim.name, 'must be adamw, adafactor, muon or sgd')
  clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
  return optax.chain(clip, rule, _scale_by_learning_rate(optim.learning_rate))


def _scale_by_learning_rate(default: float) -> optax.GradientTransformationExtraArgs:
  """Multiplies updates, whose sign is that of the step, by an argument of `update`."""

  def update(updates, state, params=None, *, learning_rate=default, **extra):
    del params, extra
    return jax.tree.map(lambda u: u * learning_rate, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _muon(
  optim: ml_collections.ConfigDict, schedule: optax.Schedule, labeller: stacks.Labeller
) -> optax.GradientTransformation:
  """Returns Muon for matrices, and AdamW with a learning rate of its own for the rest."""
  scale = (optim.adam_learning_rate or optim.learning_rate) / optim.learning_rate
  return optax.partition(
    {
      'muon': optax.chain(
        optax.trace(optim.momentum, nesterov=True),
        _orthogonalize(),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(schedule),
      ),
      'adamw': optax.adamw(
        lambda step: scale * schedule(step),
        optim.b1,
        optim.b2,
        optim.epsilon,
        weight_decay=0.0,
      ),
    },
    functools.partial(_muon_labels, labeller=labeller),
  )


def _muon_labels(params, labeller: stacks.Labeller):
  """Labels matrices for Muon, except a router's, whose E columns are directions to tell apart."""
  return jax.tree.map(
    lambda label, matrix: 'muon' if matrix and label != 'router' else 'adamw',
    stacks.labels_of(params, labeller),
    stacks.is_matrix(params, labeller),
  )


class Orthogonalized(NamedTuple):
  """Marks a checkpoint with the rule that made it: one of an earlier rule lacks this number.

  Attributes:
    gates_apart: 1.
  """

  gates_apart: Int[Array, '']


def _orthogonalize() -> optax.GradientTransformation:
  """Replaces each matrix by its nearest semi-orthogonal one; gate and value are two matrices.

  Optax's Newton-Schulz iteration, mapped over layers and experts. `optax.contrib.muon` as a whole
  would reshape them into one dimension, see `stacks.for_each`: 6 times slower on 8 simulated
  devices.

  Source: Jordan 2024, "Muon"; scaled to the size of an AdamW update as in Liu et al. 2025,
  arXiv:2502.16982, eq. 4.
  """
  newton_schulz = optax.contrib.scale_by_muon(
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers={'x': optax.contrib.MuonDimensionNumbers(0, 1)},
  )

  def matrix(x):
    y, _ = newton_schulz.update({'x': x}, newton_schulz.init({'x': x}))
    return 0.2 * max(x.shape) ** 0.5 * y['x']

  def init(params):
    del params
    return Orthogonalized(jnp.ones((), jnp.int32))

  def update(updates, state, params=None):
    del params
    return stacks.for_each(matrix, updates), state

  return optax.GradientTransformation(init, update)


def _clip_by_block_rms(threshold: float) -> optax.GradientTransformation:
  """Clips each matrix and each vector by its root mean square, never a stack of them by its own."""
  rule = optax.clip_by_block_rms(threshold)
  return optax.stateless(
    lambda updates, params: stacks.for_each(
      lambda x: rule.update(x, optax.EmptyState())[0], updates
    )
  )


def _scale_by_factored_rms() -> optax.GradientTransformation:
  """Computes Optax's factored second moments of each matrix by itself.

  On a whole stack Optax would factor its two largest dimensions, experts among them. `v_row` and
  `v_col` of a stack have the dimensions of the stack in front; where a matrix is too small to be
  factored, `v` has the shape of the parameter, and so its sharding.

  Source: Shazeer and Stern 2018, arXiv:1804.04235.
  """
  rule = optax.scale_by_factored_rms()

  def init(params):
    v_row, v_col, v = (
      stacks.for_each(lambda x, field=field: getattr(rule.init(x), field), params)
      for field in ('v_row', 'v_col', 'v')
    )
    return optax.FactoredState(jnp.zeros((), jnp.int32), v_row, v_col, v)

  def update(updates, state, params):
    def one(grad, v_row, v_col, v, param):
      update, new = rule.update(grad, optax.FactoredState(state.count, v_row, v_col, v), param)
      return update, new.v_row, new.v_col, new.v

    updates, v_row, v_col, v = stacks.for_each(
      one, updates, state.v_row, state.v_col, state.v, params, num_results=4
    )
    return updates, optax.FactoredState(optax.safe_increment(state.count), v_row, v_col, v)

  return optax.GradientTransformation(init, update)
