"""Learning-rate schedules and the Optax chain of a run."""

import jax
import ml_collections
import optax
import optax.contrib

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


def make_optimizer(
  optim: ml_collections.ConfigDict, num_steps: int
) -> optax.GradientTransformation:
  """Returns clipping by global norm followed by the optimizer, decay and schedule of the config.

  The gradient that comes in is that of the whole batch: clipping sees the same norm on any mesh.
  The peak of the learning rate is an argument of `update`, `learning_rate=`; by default it is that
  of the config. Every rule is linear in it.
  """
  schedule = make_schedule(optim, num_steps)
  if optim.name == 'adamw':
    rule = optax.adamw(
      schedule, optim.b1, optim.b2, optim.epsilon, weight_decay=optim.weight_decay, mask=is_matrix
    )
  elif optim.name == 'adafactor':
    # In parts: optax.adafactor would apply its weight decay without the learning rate.
    rule = optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(optim.weight_decay, mask=is_matrix),
      optax.scale_by_learning_rate(schedule),
    )
  elif optim.name == 'muon':
    scale = (optim.adam_learning_rate or optim.learning_rate) / optim.learning_rate
    rule = optax.partition(
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
      _muon_labels,
    )
  elif optim.name == 'sgd':
    rule = optax.chain(
      optax.add_decayed_weights(optim.weight_decay, mask=is_matrix),
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


def is_matrix(params):
  """True for the weights of products inside blocks; False for norms, embedding and output."""
  return jax.tree_util.tree_map_with_path(
    lambda path, p: p.ndim >= 3 and path[0].key == 'layers', params
  )


def _muon_labels(params):
  """Muon takes the matrices but a router's, whose E columns are directions to tell apart."""

  def label(path, matrix):
    # Whatever a router calls its weights, they lie beside those of the experts.
    names = [part.key for part in path]
    of_router = 'moe' in names and names[-1] not in ('w_in', 'w_out')
    return 'muon' if matrix and not of_router else 'adamw'

  return jax.tree_util.tree_map_with_path(label, is_matrix(params))


def _orthogonalize() -> optax.GradientTransformation:
  """Replaces each matrix (the last two dimensions) by its nearest semi-orthogonal one.

  Optax's Newton-Schulz iteration, mapped over layers and experts. `optax.contrib.muon` as a whole
  would reshape them into one dimension, and a reshape of a sharded dimension makes every device
  gather and work on the experts of all others: 6 times slower on 8 simulated devices.

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

  def stacked(x):
    function = matrix
    for _ in range(x.ndim - 2):
      function = jax.vmap(function)
    return function(x)

  return optax.stateless(lambda updates, params: jax.tree.map(stacked, updates))
