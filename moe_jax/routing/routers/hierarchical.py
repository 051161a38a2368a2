"""Two levels: each token selects groups of experts, then experts within each group (Shazeer)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, RouterOptions, State, Weight
from moe_jax.routing.routers import top_k


def params(options: RouterOptions, embed_dim: int) -> dict[str, Weight]:
  """Returns the matrices of the primary gate (groups) and of the secondary ones (experts)."""
  return {
    'router_primary': Weight((embed_dim, options.num_expert_groups)),
    'router': Weight((embed_dim, options.num_experts)),
  }


def choose(params: Params, state: State, inputs: RouterInputs, options: RouterOptions) -> Choice:
  """Selects the best groups by the primary logits, then K / groups experts in each of them.

  Group i holds the experts i E / n .. (i + 1) E / n - 1, n = `num_expert_groups`. In each of the
  `num_selected_groups` groups a token selects equally many experts, by the secondary logits within
  the group; its other groups are not looked at, however good their experts. Equal logits go to the
  lower group and the lower expert. Assignments stand by group, best group first, and within it best
  expert first: not by descending gate.

  With p_i the softmax over all groups and p_ij that over the experts of group i, `router_probs` are
  the products p_i p_ij, 1 in sum. Gates with softmax_order `before` are these products, with
  renormalize `before_drop` over their sum over the K selected; with `after` both softmaxes are
  taken over the selected alone, p_i over the selected groups, p_ij over the selected experts of
  group i. `router_logits` are the sums of primary and secondary logit: their softmax is not
  `router_probs`, but z-loss holds both levels small. With one group this is `top_k`.

  Source: Shazeer et al. 2017, arXiv:1701.06538, app. B. Differs: no noise at either level, and the
  common balance losses in place of that appendix's importance and load; its gates are `after`.
  """
  del state
  num_groups, kept = options.num_expert_groups, options.num_selected_groups
  size = options.num_experts // num_groups
  primary = jnp.einsum('gsd,dn->gsn', inputs.tokens, params['router_primary'], precision='highest')
  secondary = router_lib.logits(params, inputs.tokens)
  secondary = secondary.reshape(*primary.shape, size)
  top_primary, group_index = jax.lax.top_k(primary, kept)
  in_groups = jnp.take_along_axis(secondary, group_index[..., None], axis=2)
  top_secondary, index_in_group = jax.lax.top_k(in_groups, options.num_selected_experts // kept)
  flat = (*inputs.valid.shape, -1)
  expert_index = (group_index[..., None] * size + index_in_group).reshape(flat)
  probs = jax.nn.softmax(primary, axis=-1)[..., None] * jax.nn.softmax(secondary, axis=-1)
  router_probs = probs.reshape(flat)
  if options.softmax_order == 'after':
    gates = jax.nn.softmax(top_primary, axis=-1)[..., None] * jax.nn.softmax(top_secondary, axis=-1)
    gates = gates.reshape(flat)
  else:
    gates = top_k.gates_of(router_probs, expert_index, options.renormalize)
  chosen: Bool[Array, 'G S K'] = jnp.ones(expert_index.shape, bool)
  router_logits = (primary[..., None] + secondary).reshape(flat)
  return Choice(expert_index, gates * options.gate_scale, chosen, router_probs, router_logits, {})


def allowed(options: RouterOptions) -> tuple[str, str] | None:
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
  if options.score != 'softmax':
    return 'score', 'must be softmax'
  if kept == 1 and options.renormalize != 'none':
    return 'renormalize', 'must be none with num_selected_groups=1, or groups are not learned'
  if options.softmax_order == 'after' and (kept == 1 or num_selected == kept):
    why = 'unless 2 or more groups and 2 or more experts in each are selected'
    return 'softmax_order', f'must be before {why}, or a softmax of one is always 1'
  return None


ROUTER = router_lib.Router(
  name='hierarchical',
  paper='Shazeer et al. 2017, arXiv:1701.06538, app. B',
  summary='best groups of experts by a first router, best experts in them by a second',
  choose=choose,
  causal=True,
  learns=True,
  balance='loss',
  cost='D (E + groups) products, top-k of the groups, top-k of each selected group',
  params=params,
  allowed=allowed,
)
