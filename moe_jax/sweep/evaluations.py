"""Evaluations of a finished trial, by name."""

import copy
from collections.abc import Callable

import ml_collections


def _capacity(config: ml_collections.ConfigDict) -> None:
  config.moe.eval_capacity_factor = config.moe.capacity_factor


def _dropless(config: ml_collections.ConfigDict) -> None:
  config.moe.eval_capacity_factor = config.moe.num_experts / config.moe.num_selected_experts


def _causal(config: ml_collections.ConfigDict) -> None:
  config.moe.eval_capacity_factor = config.moe.capacity_factor
  config.moe.priority = 'token'


# `capacity`: at the capacity of training. `dropless`: every expert can take every token. `causal`:
# at the capacity of training, slots given in order of position, as no later token can take one in
# decoding. All are the same for a dense model.
EVALUATIONS: dict[str, Callable[[ml_collections.ConfigDict], None]] = {
  'capacity': _capacity,
  'dropless': _dropless,
  'causal': _causal,
}


# Names in an evaluation, of a whole split as of each domain: numbers, and lists over MoE layers.
# `tests/sweep/test_sweep.py` compares them with an evaluation.
METRICS = ('bits_per_byte', 'loss', 'tokens', 'bytes', 'router/drop_share')
LAYER_METRICS = (
  'router/drop_share_per_layer',
  'router/token_drop_share',
  'router/max_violation',
  'router/load_cv',
  'router/rank_imbalance',
  'router/padding_waste',
  'router/largest_logsumexp',
  'router/load_entropy',
  'router/dead_experts',
  'router/entropy',
  'router/top_prob',
)
# Only of a whole split; see `moe_jax.train.specialization`. Those of domains need two of them.
POOLED_METRICS: tuple[str, ...] = ()
POOLED_LAYER_METRICS: tuple[str, ...] = (
  'router/expert_domain_mi',
  'router/expert_domain_mi_baseline',
  'router/expert_token_mi',
  'router/expert_token_mi_baseline',
  'router/domain_load_overlap',
  'router/coactivation',
  'router/coactivation_baseline',
  'router/expert_similarity',
  'router/expert_similarity_baseline',
)


def config_for(config: ml_collections.ConfigDict, evaluation: str) -> ml_collections.ConfigDict:
  """Returns the config of a trial as one of `EVALUATIONS` has it."""
  result = copy.deepcopy(config)
  if config.moe.num_experts:
    EVALUATIONS[evaluation](result)
  return result
