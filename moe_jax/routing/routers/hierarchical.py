"""Two levels of noisy top-k: tokens select groups of experts, then experts in them (Shazeer).

One-letter dimensions: G routing groups, S tokens of a group, E experts, K assignments of a token,
or its selected groups, N candidates, Q = S times the selected groups.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.router_options import (
  ExpertGroupOptions,
  GateScaleOptions,
  LearnedNoiseOptions,
  SoftmaxOrderOptions,
)
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State, Weight
from moe_jax.routing.routers import noisy_top_k, top_k
from moe_jax.routing.stats import RouterSums


@dataclasses.dataclass(frozen=True)
class Options(LearnedNoiseOptions, SoftmaxOrderOptions, GateScaleOptions, ExpertGroupOptions):
  """Hyperparameters of this router."""

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns four groups, and one expert in each selected one."""
    del num_experts
    return {'num_expert_groups': 4, 'num_selected_groups': num_selected_experts}


def params(options: Options, embed_dim: int) -> dict[str, Weight]:
  """Returns the matrices of the primary gate (groups) and of the secondary ones (experts).

  Those of the noise start at zero, a deviation of ln 2 (and noise_floor).
  """
  groups, experts = (embed_dim, options.num_expert_groups), (embed_dim, options.num_experts)
  return {
    'router_primary': Weight(groups),
    'router': Weight(experts),
    'noise_primary': Weight(groups, 'zeros'),
    'noise': Weight(experts, 'zeros'),
  }


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Selects the groups of largest h, then in each of them the K / groups experts of largest h.

  At both levels h = x W_r + N(0, 1) * (softplus(x W_n) + noise_floor), with matrices of their own.
  In evaluation there is no noise and nothing is drawn. Group i holds the experts i E / n ..
  (i + 1) E / n - 1, n = `num_expert_groups`. In each of the `num_selected_groups` groups a token
  selects equally many experts; its other groups are not considered, however good their experts.
  Equal h go to the lower group and the lower expert. Assignments stand by group, best group first,
  and within it best expert first: not by descending gate.

  In evaluation, one group is `top_k`. `gates`: see `_gates`; `router_probs` and `router_logits`:
  `_probs_and_logits`; `sums`: `_sums`.

  Source: Shazeer et al. 2017, arXiv:1701.06538, app. B; eq. 3-5 (noise), app. A (probability).
  Differs: the matrices of the logits do not start at zero, only those of the noise. `noise_floor`
  is 0 as in the paper; Tensor2Tensor adds 1e-2. The paper has no `before`; without it, though, one
  single group, or one expert of each, could not be selected.
  """
  del state
  kept = options.num_selected_groups
  per_group = options.num_selected_experts // kept
  size = options.num_experts // options.num_expert_groups
  num_tokens = inputs.valid.shape
  # First level: the groups of experts, by the same noisy top-k as the flat router.
  level = {'router': params['router_primary'], 'noise': params['noise_primary']}
  primary = router_lib.logits(level, inputs.tokens, options)
  secondary = router_lib.logits(params, inputs.tokens, options)
  # A key for each level, or both would draw their noise from the same bits.
  keys = router_lib.per_group(jax.random.split, inputs.keys)
  deviation = noisy_top_k.noise_deviation(level, inputs.tokens, options)
  groups, group_probability = _select(primary, deviation, keys[:, 0], kept, options.training)
  # Second level: the experts of each selected group, as if each such group were a token of its own.
  in_groups = functools.partial(_in_groups, selected_groups=groups.expert_index, size=size)
  deviation = in_groups(noisy_top_k.noise_deviation(params, inputs.tokens, options))
  experts, expert_probability = _select(
    in_groups(secondary), deviation, keys[:, 1], per_group, options.training
  )
  index_in_group = experts.expert_index.reshape(*num_tokens, kept, per_group)
  # Expert j of group i has number i * size + j.
  expert_index = (groups.expert_index[..., None] * size + index_in_group).reshape(*num_tokens, -1)
  gates = _gates(groups, experts, options)

  router_probs, router_logits = _probs_and_logits(primary, secondary)
  # [G S K] -> [G S E].
  importance = noisy_top_k.spread(expert_index, gates, options.num_experts)
  return Choice(
    expert_index=expert_index,
    gates=gates * options.gate_scale,
    chosen=jnp.ones(expert_index.shape, bool),
    router_probs=router_probs,
    router_logits=router_logits,
    sums=_sums(
      importance,
      group_probability,
      expert_probability,
      selected_groups=groups.expert_index,
      valid=inputs.valid,
    ),
  )


def _in_groups(
  values: Float[Array, 'G S E'], selected_groups: Int[Array, 'G S K'], size: int
) -> Float[Array, 'G Q {size}']:
  """Returns one row for each selected group of each token, Q = S * groups."""
  # [G S E] -> [G S groups size] -> [G S selected size] -> [G Q size].
  rows = values.reshape(*values.shape[:2], -1, size)
  rows = jnp.take_along_axis(rows, selected_groups[..., None], axis=2)
  return rows.reshape(len(values), -1, size)


def _gates(groups: Choice, experts: Choice, options: Options) -> Float[Array, 'G S K']:
  """Returns the products G_i G_ij of both levels' gates, before `gate_scale`.

  With softmax_order `after`, the paper's, G_i is the softmax of h over the selected groups, G_ij
  over the selected experts of group i. With `before` they are over all groups and over all experts
  of group i; renormalize `before_drop` then divides the K products by their sum.

  Args:
    groups: the choice of groups, [G S groups].
    experts: that of experts in each selected group, [G Q K/groups], Q = S * groups.
    options: of the router.
  """
  kept = options.num_selected_groups
  num_tokens = groups.expert_index.shape[:2]
  # `after`: each softmax over only the selected, as in app. B. [G S kept 1] * [G S kept K/kept].
  if options.softmax_order == 'after':
    gates = groups.gates[..., None] * experts.gates.reshape(*num_tokens, kept, -1)
    return gates.reshape(*num_tokens, -1)
  # `before`: the product of both levels' softmax over all candidates, read at the selected ones.
  size = experts.router_probs.shape[-1]
  group_probs = jnp.take_along_axis(groups.router_probs, groups.expert_index, axis=-1)
  # [G S kept 1] * [G S kept size]: every candidate of the selected groups.
  products = group_probs[..., None] * experts.router_probs.reshape(*num_tokens, kept, size)
  index_in_group = experts.expert_index.reshape(*num_tokens, kept, -1)
  # The selected ones in such a row of kept * size candidates.
  flat_index = jnp.arange(kept)[None, None, :, None] * size + index_in_group
  return top_k.gates_of(
    products.reshape(*num_tokens, -1), flat_index.reshape(*num_tokens, -1), options.renormalize
  )


def _probs_and_logits(
  primary: Float[Array, 'G S groups'], secondary: Float[Array, 'G S E']
) -> tuple[Float[Array, 'G S E'], Float[Array, 'G S E']]:
  """Returns probabilities and logits for losses, of every expert, in a selected group or not.

  The probabilities are products of both levels' softmax over all, the logits sums of primary and
  secondary logit; both are without noise. The softmax of these sums is not the products, but z-loss
  holds both levels small.
  """
  # P(group) P(expert | group), which sums to 1 over all E.
  within = jax.nn.softmax(secondary.reshape(*primary.shape, -1), axis=-1)
  probs = jax.nn.softmax(primary, axis=-1)[..., None] * within
  logits = primary[..., None] + secondary.reshape(probs.shape)
  return probs.reshape(secondary.shape), logits.reshape(secondary.shape)


def _sums(
  importance: Float[Array, 'G S E'],
  group_probability: Float[Array, 'G S groups'],
  expert_probability: Float[Array, 'G Q size'],
  *,
  selected_groups: Int[Array, 'G S K'],
  valid: Bool[Array, 'G S'],
) -> dict[str, Float[Array, 'G ...']]:
  """Returns the sums that `loss` reads, over the valid tokens of each routing group.

  `importance` sums the gates of each expert, before `gate_scale`. `load_primary` sums, for each
  group, the probability that it would be selected if its own noise were drawn again and that of the
  others stayed (see `noisy_top_k`); `load_secondary`, for each expert, the same within its group,
  over the tokens that selected the group; `group_tokens` counts those. Where all groups, or all
  experts of a group, are selected, the probability is 1. Without noise (evaluation) both loads
  count what was selected, without gradient. `importance` has one, `group_tokens` never.
  """
  mask = valid[..., None, None]
  num_groups = group_probability.shape[-1]
  in_group = jnp.where(mask, jax.nn.one_hot(selected_groups, num_groups), 0)
  in_load = jnp.where(mask, expert_probability.reshape(*selected_groups.shape, -1), 0)
  return {
    'importance': router_lib.masked_sum(importance, valid),
    'load_primary': router_lib.masked_sum(group_probability, valid),
    # Each selected group adds its experts' loads to its own row: [G groups size].
    'load_secondary': jnp.einsum('gskn,gskz->gnz', in_group, in_load, precision='highest'),
    'group_tokens': jnp.sum(in_group, axis=(1, 2)),
  }


def _select(
  router_logits: Float[Array, 'G Q N'],
  deviation: Float[Array, 'G Q N'],
  keys: Key[Array, 'G'],
  num_selected: int,
  training: bool,
) -> tuple[Choice, Float[Array, 'G Q N']]:
  """Returns the noisy top-k, gates over only the selected, and the probabilities of selection."""
  selection = router_logits
  if training:
    selection = router_logits + deviation * noisy_top_k.normal(keys, router_logits.shape[1:])
  choice = top_k.choose_top_k(selection, num_selected_experts=num_selected, softmax_order='after')
  num_candidates = router_logits.shape[-1]
  selected = noisy_top_k.spread(choice.expert_index, jnp.ones_like(choice.gates), num_candidates)
  # Where all are selected no threshold exists, and without noise nothing is random.
  if not training or num_selected == num_candidates:
    return choice, selected
  return choice, noisy_top_k.selection_probability(
    router_logits, selection, selected, choice, deviation
  )


def loss(sums: RouterSums, state: State, options: Options) -> Float[Array, '']:
  """Returns CV^2(importance) + CV^2(load) of all experts, over the whole (micro-)batch.

  The load of expert j of group i is load_primary_i load_secondary_ij / tokens of the group; 0 where
  no token selected the group. CV^2 is the population variance over the squared mean, the latter at
  least 1e-10; 0 at balance. The paper has a weight for each of the two, here they share one.

  Source: Shazeer et al. 2017, arXiv:1701.06538, app. B; eq. 7 and app. A (the two CV^2).
  """
  del state, options
  own = sums.own
  # App. B: Load_primary_i * Load_i(X_i)_j / |X_i|, X_i the tokens that selected group i.
  share = own['load_primary'] / jnp.maximum(own['group_tokens'], 1)
  load = jnp.ravel(share[:, None] * own['load_secondary'])
  importance = router_lib.squared_variation(own['importance'])
  return importance + router_lib.squared_variation(load)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects numbers that do not divide, and gates through which one of the levels learns nothing.

  With one selected group its probability is a common factor of all gates of a token: dividing by
  their sum removes it. With one expert per group the secondary softmax over the selected is 1.
  """
  num_groups, kept = options.num_expert_groups, options.num_selected_groups
  num_experts, num_selected = options.num_experts, options.num_selected_experts
  if num_groups < 2 or num_experts % num_groups:
    return 'num_expert_groups', f'must be at least 2 and divide num_experts={num_experts}'
  if not 1 <= kept <= num_groups:
    return 'num_selected_groups', f'must be in 1..num_expert_groups={num_groups}'
  if num_selected % kept:
    return 'num_selected_groups', f'must divide num_selected_experts={num_selected}'
  if num_selected // kept > num_experts // num_groups:
    most = kept * (num_experts // num_groups)
    return 'num_selected_experts', f'must be at most {most}, the experts of the selected groups'
  if kept == 1 and options.renormalize != 'none':
    return 'renormalize', 'must be none with num_selected_groups=1, or groups are not learned'
  if options.softmax_order == 'after' and (kept == 1 or num_selected == kept):
    why = 'unless 2 or more groups and 2 or more experts in each are selected'
    return 'softmax_order', f'must be before {why}, or a softmax of one is always 1'
  return None


ROUTER = router_lib.Router(
  name='hierarchical',
  paper='Shazeer et al. 2017, arXiv:1701.06538, app. B',
  summary='best groups of experts by a first router, best experts in them by a second; both noisy',
  choose=choose,
  options=Options,
  causal=True,
  learns=True,
  by_group=True,
  balance='loss',
  cost='2 D (E + groups) multiply-adds, random numbers, top-k of groups and in each selected group',
  params=params,
  loss=loss,
  allowed=allowed,
)
