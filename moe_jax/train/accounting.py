"""Parameters and floating-point operations of a config, from its numbers alone."""

import math

import ml_collections

from moe_jax import config as config_lib
from moe_jax import routing
from moe_jax.experts import hidden_dim


def parameter_counts(config: ml_collections.ConfigDict, vocab_size: int) -> dict[str, int]:
  """Returns the parameters of the model: in `total`, and those one token passes, in `active`."""
  model, moe = config.model, config.moe
  width, head = model.embed_dim, config_lib.head_dim(config)
  attention = width * head * (2 * model.num_heads + 2 * model.num_kv_heads)
  norms = 2 * width
  embedding = vocab_size * width * (1 if model.tied_embeddings else 2)
  sparse_layers = model.num_layers // moe.every if moe.num_experts else 0
  dense_layers = model.num_layers - sparse_layers
  fixed = embedding + width + model.num_layers * (attention + norms)
  fixed += dense_layers * _mlp(width, model.mlp_dim, model.activation)
  expert = _mlp(width, moe.mlp_dim, model.activation)
  router, active_experts = _router(config)
  total = fixed + sparse_layers * (router + (moe.num_experts + moe.num_shared_experts) * expert)
  active = fixed + sparse_layers * (router + (active_experts + moe.num_shared_experts) * expert)
  return {'total': total, 'active': active}


def _router(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns the parameters of one router, and the experts a token passes."""
  router, options = routing.ROUTERS[config.moe.router], config_lib.router_options(config)
  weights = router.params(options, config.model.embed_dim).values()
  experts = options.num_experts if router.keeps_all else options.num_selected_experts
  return sum(math.prod(weight.shape) for weight in weights), experts


def training_flops_per_token(config: ml_collections.ConfigDict, vocab_size: int) -> int:
  """Returns multiply-adds x 2 of a token's forward and backward pass in matrix products.

  Forward: 2 for each active matrix parameter (router and output included, embedding look-up not),
  and 4 * T * num_heads * head_dim for scores and mixing in each layer, over all T positions as the
  dense kernel computes them. Backward counts twice the forward. Empty slots of the capacity, norms
  and softmax are not counted.
  """
  model = config.model
  width = model.embed_dim
  active = parameter_counts(config, vocab_size)['active']
  norms = width * (2 * model.num_layers + 1)
  embedding = vocab_size * width * (1 if model.tied_embeddings else 2)
  matrices = active - norms - embedding + vocab_size * width
  scores = 4 * config.data.sequence_length * model.num_heads * config_lib.head_dim(config)
  return 3 * (2 * matrices + model.num_layers * scores)


def computed_flops_per_token(config: ml_collections.ConfigDict, vocab_size: int) -> float:
  """Returns multiply-adds x 2 of a token's forward pass as experts compute it, empty slots too.

  A third of `training_flops_per_token`, and the slots of all experts, E * C for a routing group of
  S tokens, where they are more than the S * K that tokens ask for. That is what time goes by:
  without drops (C = S) 64 experts compute 64 slots for each token. The dropless dispatcher computes
  what tokens ask for alone.
  """
  moe, model = config.moe, config.model
  flops = training_flops_per_token(config, vocab_size) / 3
  if not moe.num_experts or not config_lib.limits_slots(moe):
    return flops
  tokens = config.data.sequence_length * moe.group_size
  slots = moe.num_experts * config_lib.training_capacity(config) / tokens
  empty = max(0.0, slots - _router(config)[1])
  layers = model.num_layers // moe.every
  return flops + 2 * layers * empty * _mlp(model.embed_dim, moe.mlp_dim, model.activation)


def tokens_per_expert(config: ml_collections.ConfigDict) -> float:
  """Returns the tokens an expert gets from one routing group under perfect balance."""
  moe = config.moe
  tokens = config.data.sequence_length * moe.group_size
  return tokens * moe.num_selected_experts / moe.num_experts


def random_drop_share(config: ml_collections.ConfigDict, capacity: int) -> float:
  """Returns the drop share of uniformly random routing: the floor to compare drops with.

  With S tokens that each pick K of E experts, an expert's count is binomial(S, K/E); the drop share
  is E[max(0, count - C)] / (S K / E).
  """
  moe = config.moe
  tokens = config.data.sequence_length * moe.group_size
  return _mean_excess(tokens, moe.num_selected_experts / moe.num_experts, capacity) / (
    tokens * moe.num_selected_experts / moe.num_experts
  )


def _mean_excess(trials: int, probability: float, capacity: int) -> float:
  """E[max(0, X - capacity)] for X binomial, by the ratio of neighbouring terms in logs."""
  if probability >= 1:
    return float(max(0, trials - capacity))
  log_p, log_q = math.log(probability), math.log1p(-probability)
  excess = 0.0
  for count in range(capacity + 1, trials + 1):
    log_choose = math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
    excess += (count - capacity) * math.exp(log_choose + count * log_p + (trials - count) * log_q)
  return excess


def _mlp(width: int, mlp_dim: int, activation: str) -> int:
  return width * hidden_dim(mlp_dim, activation) + mlp_dim * width
