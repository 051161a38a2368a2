"""k-means routing: a token goes to its nearest centroids, which follow the tokens they attract.

One-letter dimensions: G routing groups, S tokens of a group, D embed, E experts, K assignments of a
token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax import fields
from moe_jax.router_options import MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State

UPDATES = ('ema', 'minibatch')
LAYER_NORM_EPSILON = 1e-6
# How far from the fullest centroid an empty one is put, both of length 1.
RESEED_DISTANCE = 0.1
# Constants: every device, and every run, draws the same directions.
START_SEED, RESEED_SEED = 0, 1


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions):
  """Hyperparameters of this router."""

  kmeans_update: str = hyperparameter(
    fields.one_of('ema', UPDATES, 'Moving average, or mini-batch k-means.')
  )
  kmeans_decay: float = hyperparameter(fields.share(0.999, 'Decay of the moving average.'))
  kmeans_temperature: float = hyperparameter(
    fields.positive(1.0, 'Divides the similarities in the gates.')
  )
  kmeans_reseed_after: int = hyperparameter(
    fields.at_least(100, 1, 'Empty steps after which a centroid moves.')
  )


def new_state(options: Options, embed_dim: int, vocab_size: int) -> State:
  """Returns random unit centroids, the same in every layer and run, and empty counters."""
  del vocab_size
  experts = options.num_experts
  return {
    'centroids': _unit_directions(START_SEED, experts, embed_dim),
    'counts': jnp.zeros((experts,), jnp.float32),
    'empty_steps': jnp.zeros((experts,), jnp.float32),
  }


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the K centroids of largest x_hat . mu_e; equal ones go to the lower expert index.

  x_hat is the token after layer normalisation without scale and bias (epsilon 1e-6), of length
  sqrt(D); mu_e has length 1, so the largest product is the nearest centroid. The gates are the
  softmax over the K selected products divided by `kmeans_temperature`, 1 with K = 1;
  `router_logits` are the products divided by it, `router_probs` their softmax over all E. Gradients
  reach the token, never the centroids: those are state, which `update` moves.

  Source: Roy et al. 2021, arXiv:2003.05997 (k-means with moving averages, for sparse attention),
  checked in google-research's routing_transformer (0c1bbe5). Differs: it routes tokens to experts,
  each token choosing its centroids rather than each centroid its tokens; centroids have unit
  length; no commitment loss (there weighted by 1e-4). Of `renormalize` only `after_drop` does
  anything, in the plan.
  """
  del params
  centroids = jax.lax.stop_gradient(state['centroids'])
  x_hat = _layer_norm(inputs.tokens)
  similarity = router_lib.matmul(x_hat, centroids.T, options)
  # The selection reads the products before the division, which might round two to one.
  top_similarity, expert_index = jax.lax.top_k(similarity, options.num_selected_experts)
  router_logits = similarity / options.kmeans_temperature
  return Choice(
    expert_index=expert_index,
    gates=jax.nn.softmax(top_similarity / options.kmeans_temperature, axis=-1),
    chosen=jnp.ones(expert_index.shape, bool),
    router_probs=jax.nn.softmax(router_logits, axis=-1),
    router_logits=router_logits,
    sums=_centroid_sums(x_hat, expert_index, inputs, options.num_experts),
  )


def _centroid_sums(
  x_hat: Float[Array, 'G S D'],
  expert_index: Int[Array, 'G S K'],
  inputs: RouterInputs,
  num_experts: int,
) -> dict[str, Float[Array, 'G ...']]:
  """Returns the sum and number of the valid tokens of each expert, without gradient."""
  valid = inputs.valid[..., None]
  experts = jnp.arange(num_experts, dtype=expert_index.dtype)[None, None, None, :]
  # The K experts of a token are distinct, so this is 0 or 1.
  is_chosen = jnp.sum((expert_index[..., None] == experts).astype(jnp.float32), axis=2)
  is_chosen = jnp.where(valid, is_chosen, 0)
  # Padding may hold anything, and 0 times infinity is no number.
  x_hat = jnp.where(valid, jax.lax.stop_gradient(x_hat), 0)
  return {
    'centroid_sum': jnp.einsum('gse,gsd->ged', is_chosen, x_hat, precision='highest'),
    'centroid_count': jnp.sum(is_chosen, axis=1),
  }


def update(state: State, sums: Any, options: Options) -> State:
  """Moves each centroid that got tokens toward their mean, and re-seeds those empty for long.

  With S_e, c_e the sum of x_hat and the number of tokens of expert e in the batch, for c_e > 0:
  `ema`: mu_e <- decay mu_e + (1 - decay) S_e / c_e. `minibatch`: mu_e <- mu_e + rate (S_e / c_e -
  mu_e), rate = c_e / (all tokens of e up to now, this batch included). Then back to length 1. The
  mean is of vectors of length sqrt(D), so a step turns a centroid up to sqrt(D) times as far as one
  with tokens of unit length would.

  A centroid without a token in `kmeans_reseed_after` steps on end is put next to the one with the
  most tokens in the batch (equal ones: the lower index), off it by 0.1 in a direction of its own,
  and counts its tokens from 0. A batch of only padding is not a step.

  Source: `ema`: Roy et al. 2021, arXiv:2003.05997; google-research's routing_transformer (0c1bbe5)
  keeps moving averages of the sum and of the count apart and takes their ratio, here the means of
  the batches are averaged. `minibatch`: Sculley 2010 (Web-scale k-means), who moves token by token;
  as assignments are cached there, the batch mean is the same. Differs: unit length; the re-seeding,
  which is ours: the token farthest from its centroid would have to be found over all devices, which
  no sum can do.
  """
  batch_sum, count = sums.own['centroid_sum'], sums.own['centroid_count']
  counts = state['counts'] + count
  # `count` is over the whole batch and all devices, so every device moves the centroids alike.
  mean = batch_sum / jnp.maximum(count, 1)[:, None]
  if options.kmeans_update == 'ema':
    rate = jnp.full(count.shape, 1 - options.kmeans_decay, jnp.float32)
  else:
    # Sculley: a step of 1 / (tokens so far) for each token makes the mean of all of them.
    rate = count / jnp.maximum(counts, 1)
  old = state['centroids']
  moved = _to_unit_length(old + rate[:, None] * (mean - old), old)
  centroids = jnp.where((count > 0)[:, None], moved, old)

  # Steps without a token in a row; after enough of them the centroid starts next to the fullest.
  is_step = jnp.sum(count) > 0
  empty_steps = jnp.where(count > 0, 0, state['empty_steps'] + is_step)
  reseed = (empty_steps >= options.kmeans_reseed_after) & is_step
  fullest = centroids[jnp.argmax(count)][None, :]
  # A direction for each expert, so that two put down in one step do not coincide.
  offset = RESEED_DISTANCE * _unit_directions(RESEED_SEED, *old.shape)
  seeds = _to_unit_length(fullest + offset, old)
  return {
    'centroids': jnp.where(reseed[:, None], seeds, centroids),
    'counts': jnp.where(reseed, 0, counts),
    'empty_steps': jnp.where(reseed, 0, empty_steps),
  }


def _layer_norm(tokens: Float[Array, 'G S D']) -> Float[Array, 'G S D']:
  centered = tokens - jnp.mean(tokens, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
  return centered * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)


def _unit_directions(seed: int, num_experts: int, embed_dim: int) -> Float[Array, 'E D']:
  directions = jax.random.normal(jax.random.key(seed), (num_experts, embed_dim))
  return directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)


def _to_unit_length(
  vectors: Float[Array, 'E D'], otherwise: Float[Array, 'E D']
) -> Float[Array, 'E D']:
  """Scales to length 1; a vector of next to no length has no direction and is replaced."""
  length = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
  return jnp.where(length > 1e-6, vectors / jnp.maximum(length, 1e-6), otherwise)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects values with which nothing moves, or moves away."""
  if options.kmeans_update not in UPDATES:
    return 'kmeans_update', f'must be one of {UPDATES}'
  if not 0 <= options.kmeans_decay < 1:
    return 'kmeans_decay', 'must be at least 0 and below 1'
  if options.kmeans_temperature <= 0:
    return 'kmeans_temperature', 'must be above 0'
  if options.kmeans_reseed_after < 1:
    return 'kmeans_reseed_after', 'must be at least 1 step'
  return None


ROUTER = router_lib.Router(
  name='kmeans',
  paper='Roy et al. 2021, arXiv:2003.05997; Sculley 2010',
  summary='K nearest centroids; centroids follow their tokens, not a gradient',
  choose=choose,
  options=Options,
  causal=True,
  learns=False,
  balance='none',
  cost='D E multiply-adds, top-k of E; sums of E D',
  params=router_lib.no_params,
  state=new_state,
  update=update,
  allowed=allowed,
)
