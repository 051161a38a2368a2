"""One optimizer step, compiled once: micro-batches, objective, gradient, update.

Gradients are taken outside every `shard_map`, of a loss that is already a global number, so no
psum is written here.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from moe_jax import routing
from moe_jax.models.task import Batch, Task
from moe_jax.parallel.sharding import batch_sharding, constrain, replicated, stacked
from moe_jax.train import objective
from moe_jax.train.state import (
  TrainState,
  over_scopes,
  state_shardings,
  update_average_load,
  update_routers,
)

MicroBatches = dict[str, Int[Array, 'A b T']]


class StepMetrics(NamedTuple):
  """Metrics of a step; sums and unweighted losses, over the whole batch.

  Attributes:
    tokens: valid tokens.
    cross_entropy: nats per token.
    objective: what was differentiated: cross-entropy plus weighted auxiliary losses.
    auxiliary: per MoE layer, unweighted; None for a dense model.
    router_sums: per MoE layer, summed over balance scopes; None for a dense model.
    average_load: of the state after the step; None for a dense model.
    grad_norm: global norm before clipping.
    learning_rate: of this step.
    router_state_finite: True if all numbers of the routers' state are finite.
  """

  tokens: Float[Array, '']
  cross_entropy: Float[Array, '']
  objective: Float[Array, '']
  auxiliary: objective.AuxiliaryLosses | None
  router_sums: routing.RouterSums | None
  average_load: Float[Array, 'L E'] | None
  grad_norm: Float[Array, '']
  learning_rate: Float[Array, '']
  router_state_finite: Bool[Array, '']


class _Parts(NamedTuple):
  """Sums over micro-batches."""

  cross_entropy: Float[Array, '']
  objective: Float[Array, '']
  auxiliary: objective.AuxiliaryLosses | None
  router_sums: routing.RouterSums | None


def make_loss(
  task: Task, layer_reduction: str, accumulation_scope: str = 'microbatch'
) -> Callable[..., tuple[Float[Array, ''], _Parts]]:
  """Returns the share of a micro-batch in the objective of its batch, with what it consists of.

  The function takes (params, router_state, micro, key, weights, batch_tokens, other_sums).
  `batch_tokens` is the number of valid tokens of the whole batch, `other_sums` the router's sums
  over more than this micro-batch, or None:
    microbatch: not read; each micro-batch has its own auxiliary losses.
    running: over the micro-batches before. The loads that the losses multiply are those of all
      micro-batches so far, this one included.
    batch: over the whole batch. The losses are formed from (rest of the batch, held fixed) + (this
      micro-batch), so that the gradients of the micro-batches add up to the gradient of the batch
      exactly, however the losses depend on the sums.
  """

  def loss(params, router_state, micro, key, weights, batch_tokens, other_sums):
    out = task.loss(params, router_state, micro, key=key)
    cross_entropy = out.total / batch_tokens
    if out.router_sums is None or task.moe is None:
      return cross_entropy, _Parts(cross_entropy, cross_entropy, None, None)
    sums, share = out.router_sums, task.weight(micro) / batch_tokens
    if other_sums is not None and accumulation_scope == 'running':
      sums = _with_loads_so_far(sums, other_sums)
    elif other_sums is not None and accumulation_scope == 'batch':
      fixed = jax.lax.stop_gradient(jax.tree.map(jnp.subtract, other_sums, sums))
      sums, share = jax.tree.map(jnp.add, fixed, sums), jnp.float32(1)
    with jax.named_scope('statistics'):
      auxiliary = objective.auxiliary_losses(sums, task.moe, router_state)
    added = objective.weighted_sum(auxiliary, weights, layer_reduction)
    auxiliary = jax.tree.map(lambda x: x * share, auxiliary)
    total = cross_entropy + added * share
    return total, _Parts(cross_entropy, total, auxiliary, out.router_sums)

  return loss


def _with_loads_so_far(sums: routing.RouterSums, before: routing.RouterSums) -> routing.RouterSums:
  """Returns a micro-batch's sums with the loads of all so far, as counts of its own tokens."""
  tokens = before.tokens + sums.tokens
  counts = before.tokens_per_expert + sums.tokens_per_expert
  scale = sums.tokens / jnp.maximum(tokens, 1.0)
  return sums._replace(tokens_per_expert=counts * scale[..., None])


def make_gradient(
  task: Task, accumulation_steps: int, accumulation_scope: str, layer_reduction: str
) -> Callable[..., tuple[Any, _Parts]]:
  """Returns (params, router_state, batch, key, weights) -> (gradient of the objective, its parts).

  With accumulation_scope `batch` the auxiliary losses are formed once, from the router's sums over
  all micro-batches (a forward pass of its own). Otherwise in each micro-batch, and averaged by
  tokens; with `running` from the loads of all micro-batches so far (Qiu et al. 2025,
  arXiv:2501.11873, algorithm 1), so that the first ones see only a part of the batch.
  """
  value_and_grad = jax.value_and_grad(
    make_loss(task, layer_reduction, accumulation_scope), has_aux=True
  )

  def gradient(params, router_state, batch, key, weights):
    batch_tokens = jnp.maximum(task.weight(batch), 1)
    if accumulation_steps == 1:
      key = jax.random.fold_in(key, 0)
      (_, parts), grads = value_and_grad(
        params, router_state, batch, key, weights, batch_tokens, None
      )
      return grads, parts
    micros = _split(batch, accumulation_steps, task)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulation_steps))
    batch_sums = None
    if accumulation_scope == 'batch' and task.moe is not None:

      def count(micro, key, total):
        del total
        return task.loss(params, router_state, micro, key=key).router_sums

      batch_sums = jax.lax.stop_gradient(_sum_over(count, micros, keys))

    def one(micro, key, total):
      other_sums = batch_sums
      if accumulation_scope == 'running' and total is not None:
        other_sums = total[1].router_sums
      (_, parts), grads = value_and_grad(
        params, router_state, micro, key, weights, batch_tokens, other_sums
      )
      return grads, parts

    grads, parts = _sum_over(one, micros, keys)
    if batch_sums is not None:
      # Every micro-batch reported the batch's own auxiliary losses: the mean of equals, not a sum.
      auxiliary = jax.tree.map(lambda x: x / accumulation_steps, parts.auxiliary)
      added = objective.weighted_sum(auxiliary, weights, layer_reduction)
      parts = parts._replace(auxiliary=auxiliary, objective=parts.cross_entropy + added)
    return grads, parts

  return gradient


def _split(batch: Batch, accumulation_steps: int, task: Task) -> MicroBatches:
  """Cuts a batch into consecutive parts, whatever the mesh."""
  parts = {
    name: array.reshape(accumulation_steps, -1, array.shape[-1]) for name, array in batch.items()
  }
  return constrain(parts, task.mesh, 'microbatches', 'batch')


def _sum_over(function: Callable, micros: MicroBatches, keys) -> Any:
  """Sums function(micro, key, sum of those before) over micro-batches, one at a time."""
  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], micros), keys[0], None)
  zeros = jax.tree.map(_zeros, shapes, is_leaf=_is_sums)

  def body(total, micro_and_key):
    return jax.tree.map(_add, total, function(*micro_and_key, total), is_leaf=_is_sums), None

  return jax.lax.scan(body, zeros, (micros, keys))[0]


def _is_sums(node: Any) -> bool:
  return isinstance(node, routing.RouterSums)


def _zeros(shapes: Any) -> Any:
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  if not _is_sums(shapes):
    return zeros
  return zeros._replace(logsumexp_max=jnp.full_like(zeros.logsumexp_max, -jnp.inf))


def _add(one: Any, other: Any) -> Any:
  return routing.add_sums(one, other) if _is_sums(one) else jnp.add(one, other)


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  accumulation_steps: int = 1,
  accumulation_scope: str = 'microbatch',
  layer_reduction: str = 'mean',
  load_decay: float = 0.99,
  packed: bool = False,
) -> Any:
  """Returns the compiled (state, batch, hyperparameters) -> (state, StepMetrics).

  The state that goes in is donated: use only the one that comes out.

  Args:
    task: in mode `train`, built for the size of a micro-batch.
    optimizer: clipping included.
    schedule: step -> learning rate as a share of its peak, only for the report.
    accumulation_steps: micro-batches; divides the batch.
    accumulation_scope: over which the auxiliary losses are formed, see `make_gradient`.
    layer_reduction: `mean` or `sum` of the auxiliary losses over layers.
    load_decay: of the moving average of the load, per step.
    packed: True if state, batch, hyperparameters and metrics have a leading dimension of trials,
      each of which is trained as if by itself.
  """
  gradient = make_gradient(task, accumulation_steps, accumulation_scope, layer_reduction)

  def step(state, batch, hyperparameters):
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    grads, parts = gradient(state.params, state.router_state, batch, key, hyperparameters.weights)
    with jax.named_scope('optimizer'):
      updates, opt_state = optax.with_extra_args_support(optimizer).update(
        grads, state.opt_state, state.params, learning_rate=hyperparameters.learning_rate
      )
      params = optax.apply_updates(state.params, updates)
    sums = None if parts.router_sums is None else over_scopes(parts.router_sums)
    router_state = update_routers(task, state.router_state, sums, hyperparameters.bias_rate)
    average_load = update_average_load(state.average_load, sums, load_decay)
    metrics = StepMetrics(
      tokens=task.weight(batch),
      cross_entropy=parts.cross_entropy,
      objective=parts.objective,
      auxiliary=parts.auxiliary,
      router_sums=sums,
      average_load=average_load.get('experts'),
      grad_norm=optax.tree.norm(grads),
      learning_rate=jnp.asarray(hyperparameters.learning_rate * schedule(state.step), jnp.float32),
      router_state_finite=_all_finite(router_state),
    )
    new = TrainState(state.step + 1, params, opt_state, router_state, average_load, state.seed)
    return new, metrics

  shardings = state_shardings(task, optimizer)
  by_sequence = {name: batch_sharding(task.mesh) for name in task.batch_fields}
  everywhere = replicated(task.mesh)
  if packed:
    shardings, by_sequence = packed_shardings((shardings, by_sequence))
  return jax.jit(
    jax.vmap(step) if packed else step,
    in_shardings=(shardings, by_sequence, everywhere),
    out_shardings=(shardings, everywhere),
    donate_argnums=0,
  )


def _all_finite(tree: Any) -> Bool[Array, '']:
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)], bool))


def packed_shardings(shardings: Any) -> Any:
  """Returns the shardings of arrays with a dimension of trials in front, which is not split."""
  return stacked(shardings, 'trials')


def put_batch(batch: Mapping[str, Any], task: Task) -> Batch:
  """Puts this process's rows of a batch onto its devices."""
  sharding = batch_sharding(task.mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, batch[name])
    for name in task.batch_fields
  }
