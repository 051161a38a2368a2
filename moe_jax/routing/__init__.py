"""Who goes where: from router logits to a plan. Plain JAX, one device, no collectives.

`top_k.choose_top_k` picks experts, `plan.make_plan` applies the capacity, `stats.router_sums`
counts what happened and `losses` turns the counts into the auxiliary losses. A new way of choosing
is one new file that returns a `Choice`.
"""

from moe_jax.routing.capacity import expert_capacity
from moe_jax.routing.losses import importance_loss, load_balancing_loss, router_z_loss
from moe_jax.routing.plan import PRIORITIES, Plan, make_plan
from moe_jax.routing.stats import RouterSums, router_sums
from moe_jax.routing.top_k import RENORMALIZATIONS, SOFTMAX_ORDERS, Choice, choose_top_k, jitter

__all__ = [
  'PRIORITIES',
  'RENORMALIZATIONS',
  'SOFTMAX_ORDERS',
  'Choice',
  'Plan',
  'RouterSums',
  'choose_top_k',
  'expert_capacity',
  'importance_loss',
  'jitter',
  'load_balancing_loss',
  'make_plan',
  'router_sums',
  'router_z_loss',
]
