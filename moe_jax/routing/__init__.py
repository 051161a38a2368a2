"""Routing: from tokens to a plan. Plain JAX, one device, no collectives.

A router of `routers/` selects experts, `plan.make_plan` applies the capacity, `stats.router_sums`
counts the outcome and `losses` turns the counts into the auxiliary losses. A new router is one new
file in `routers/`; `router.Router` documents its content.
"""

from moe_jax.router_options import (
  COMMON_FIELDS,
  SCORES,
  SOFTMAX_ORDERS,
  BiasRateOptions,
  RouterOptions,
)
from moe_jax.routing.losses import (
  NORMALIZATIONS,
  device_balance_loss,
  entropy_loss,
  importance_loss,
  load_balancing_loss,
  load_balancing_value,
  router_z_loss,
)
from moe_jax.routing.noise import jitter
from moe_jax.routing.plan import PRIORITIES, Plan, make_plan
from moe_jax.routing.registry import ROUTERS
from moe_jax.routing.router import Choice, Router, RouterInputs
from moe_jax.routing.routers.top_k import RENORMALIZATIONS, choose_top_k
from moe_jax.routing.sizes import expert_capacity
from moe_jax.routing.stats import RouterSums, add_sums, router_sums

__all__ = [
  'NORMALIZATIONS',
  'PRIORITIES',
  'RENORMALIZATIONS',
  'COMMON_FIELDS',
  'ROUTERS',
  'SCORES',
  'SOFTMAX_ORDERS',
  'BiasRateOptions',
  'Choice',
  'Plan',
  'Router',
  'RouterInputs',
  'RouterOptions',
  'RouterSums',
  'add_sums',
  'choose_top_k',
  'device_balance_loss',
  'entropy_loss',
  'expert_capacity',
  'importance_loss',
  'jitter',
  'load_balancing_loss',
  'load_balancing_value',
  'make_plan',
  'router_sums',
  'router_z_loss',
]
