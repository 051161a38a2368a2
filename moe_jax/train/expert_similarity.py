"""Similarity of the weights of experts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_jax.models.task import Task
from moe_jax.parallel.sharding import replicated
from moe_jax.train.specialization import random_similarity


def expert_similarity(task: Task, params: Any) -> dict[str, list[float]]:
  """Returns lists over MoE layers; {} of a dense model or with a single expert.

  router/expert_similarity: the absolute cosine between the weights of two experts, each matrix as
  one vector, averaged over all pairs and over the matrices of an expert. 1 of equal experts, as
  after upcycling. Experts that differ only by the order of their hidden units do not count as
  similar. router/expert_similarity_baseline: the same of random directions, so of new experts.
  """
  moe = task.moe
  if moe is None or moe.num_experts < 2:
    return {}
  weights = task.expert_weights(params)
  pairs = np.triu_indices(moe.num_experts, 1)
  similarity = np.zeros(task.num_moe_layers)
  baseline = 0.0
  for matrix in weights:
    dots_LEE = np.asarray(_dots(task.mesh)(matrix), np.float64)
    length_LE = np.sqrt(np.maximum(np.diagonal(dots_LEE, axis1=1, axis2=2), 1e-300))
    cosine_LEE = dots_LEE / (length_LE[:, :, None] * length_LE[:, None, :])
    similarity += np.mean(np.abs(cosine_LEE[:, *pairs]), -1) / len(weights)
    baseline += random_similarity(matrix[0, 0].size) / len(weights)
  return {
    'router/expert_similarity': similarity.tolist(),
    'router/expert_similarity_baseline': [baseline] * len(similarity),
  }


@functools.cache
def _dots(mesh: Mesh) -> Any:
  def layer_similarity(weights: Float[Array, 'E M N']) -> Float[Array, 'E E']:
    return jnp.einsum('emn,fmn->ef', weights, weights, precision='highest')

  # One layer at a time: each device then holds all experts of that one only.
  return jax.jit(
    lambda weights: jax.lax.map(layer_similarity, weights), out_shardings=replicated(mesh)
  )
