"""S-BASE: experts are selected from a balanced transport plan, found by Sinkhorn's iteration.

One-letter dimensions: S tokens of a group, E experts, K assignments of a token.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax import fields
from moe_jax.router_options import GateScaleOptions, MatrixOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers.greedy import taken_gates

# Lower bound of divisors. Far below any sum but that of a column that exp rounds to 0.
SMALLEST_SUM = 1e-30
# A guard: normal logits need 5 to 10 for a tolerance of 1e-4, those ten times as large up to 200.
MAX_ROUNDS = 500


@dataclasses.dataclass(frozen=True)
class Options(MatrixOptions, GateScaleOptions):
  """Hyperparameters of this router."""

  assignment_tolerance: float = hyperparameter(
    fields.positive(1e-4, 'Change at which the iteration ends.')
  )


class Scales(NamedTuple):
  """The plan of a group is rows[s] * cost[s, e] * columns[e]."""

  rows: Float[Array, 'S']
  columns: Float[Array, 'E']


class _Iteration(NamedTuple):
  scales: Scales
  change: Float[Array, '']
  rounds: Int[Array, '']


def normalized_cost(
  router_logits: Float[Array, 'S E'], valid: Bool[Array, 'S']
) -> Float[Array, 'S E']:
  """Returns exp(logits) with each row divided by its largest element; 0 for padding.

  That keeps exp finite and leaves the plan as it is: with row s of the cost times c, rows[s] =
  1 / (T sum_e cost columns) comes out divided by c, so rows * cost and all columns are the same.
  """
  top = jnp.max(router_logits, axis=-1, keepdims=True)
  return jnp.where(valid[:, None], jnp.exp(router_logits - top), 0)


def sinkhorn(
  cost: Float[Array, 'S E'],
  valid: Bool[Array, 'S'],
  *,
  tolerance: float,
  max_rounds: int = MAX_ROUNDS,
) -> Scales:
  """Scales rows and columns alternately until each valid row sums to 1 / T, each column to 1 / E.

  T is the number of valid tokens. From columns = 1:

    rows = 1 / (T (cost @ columns)),  columns = 1 / (E (rows @ cost)),

  until the mean over experts of |change of columns| is at most the tolerance, where the change of a
  column above 1 is taken relative to it. Columns are balanced by the last half-step, rows up to the
  tolerance.

  Args:
    cost: of `normalized_cost`.
    valid: False for padding, whose rows are 0.
    tolerance: columns are about 1 with balanced tokens, but large when some experts are far less
      preferred; an absolute tolerance could then lie below float32's rounding and never be met.
    max_rounds: after these the scales stand as they are.
  """
  num_experts = cost.shape[1]
  num_tokens = jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1)

  def step(state: _Iteration) -> _Iteration:
    columns = state.scales.columns
    # Rows first, then columns by the new rows: the columns are exact, the rows up to the tolerance.
    row_sums = jnp.sum(cost * columns[None, :], axis=1)
    rows = jnp.where(valid, 1 / (num_tokens * jnp.maximum(row_sums, SMALLEST_SUM)), 0)
    column_sums = jnp.sum(cost * rows[:, None], axis=0)
    scaled = 1 / (num_experts * jnp.maximum(column_sums, SMALLEST_SUM))
    change = jnp.mean(jnp.abs(scaled - columns) / jnp.maximum(scaled, 1))
    return _Iteration(Scales(rows, scaled), change, state.rounds + 1)

  # Columns are all that a step reads; the rows here are never used.
  start = Scales(jnp.zeros(cost.shape[:1]), jnp.ones(cost.shape[1:]))
  return jax.lax.while_loop(
    lambda state: (state.change > tolerance) & (state.rounds < max_rounds),
    step,
    router_lib.varying_like(_Iteration(start, jnp.float32(jnp.inf), jnp.int32(0)), cost),
  ).scales


def choose(params: Params, state: State, inputs: RouterInputs, options: Options) -> Choice:
  """Training: the K largest elements of each token's row of the plan. Evaluation: K largest logits.

  The gate is sigmoid of the expert's logit for K = 1, the softmax probability over all experts for
  more (renormalised as the options say): it is read from the logits, never from the plan, and no
  gradient passes through the plan. Equal elements go to the lower expert index.

  The plan is balanced, the selection from it only roughly: experts still need a capacity.

  Source: Clark et al. 2022, arXiv:2202.01169 (S-BASE), whose own gate was not checked; iteration,
  gates and evaluation are those of Megatron-LM (moe/router.py, 005742f). Differs: one plan for each
  routing group of the config; padding has no row; each row of the cost is divided by its largest
  element, see `normalized_cost`; nothing is added to divisors, where Megatron-LM adds 1e-8 and so
  never balances experts that are far less preferred; the tolerance is relative to large columns,
  see `sinkhorn`, and there are at most 500 rounds; the selection is by logits + log(columns), which
  is the order of the plan within a row without its underflow; an auxiliary loss may be added, which
  Megatron-LM refuses. `gate_scale` is not of the source.
  """
  del state
  router_logits = router_lib.logits(params, inputs.tokens, options)
  num_selected = options.num_selected_experts
  router_probs = jax.nn.softmax(router_logits, axis=-1)
  selection = jax.lax.stop_gradient(router_logits)
  if options.training:

    def log_columns(logits, valid):
      # Within a row the plan is in order of logits + log(columns): the rows' scales cancel.
      cost = normalized_cost(logits, valid)
      return jnp.log(sinkhorn(cost, valid, tolerance=options.assignment_tolerance).columns)

    selection += router_lib.per_group(log_columns, selection, inputs.valid)[:, None, :]
  expert_index = jax.lax.top_k(selection, num_selected)[1].astype(jnp.int32)
  chosen = jnp.ones(expert_index.shape, bool)
  # Gates come from logits. The plan depends on the other tokens of the group, and in evaluation
  # there is none.
  if num_selected == 1:
    gates = jax.nn.sigmoid(jnp.take_along_axis(router_logits, expert_index, axis=-1))
  else:
    gates = taken_gates(router_logits, router_probs, expert_index, chosen, options.renormalize)
  return Choice(
    expert_index, gates * options.gate_scale, chosen, router_probs, router_logits, sums={}
  )


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects a sigmoid gate divided by itself."""
  if options.num_selected_experts == 1 and options.renormalize != 'none':
    return 'renormalize', 'must be none with num_selected_experts=1, or the gate is always 1'
  return None


ROUTER = router_lib.Router(
  name='sinkhorn',
  paper='Clark et al. 2022, arXiv:2202.01169',
  summary='top-k of a balanced transport plan; sigmoid or softmax gate; top-k in evaluation',
  choose=choose,
  options=Options,
  causal=False,
  learns=True,
  by_group=True,
  balance='assignment',
  cost='D E multiply-adds, top-k of E, tens to hundreds of passes over E',
  always={'score': 'sigmoid'},
  allowed=allowed,
)
