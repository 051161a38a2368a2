"""Divergence: a run whose loss or gradient is no longer finite."""

import math
from typing import Any

from moe_jax.errors import UserError
from moe_jax.train.step import StepMetrics


class DivergedError(UserError):
  """The loss or the gradient is no longer finite.

  Attributes:
    step: whose metrics said so.
    cause: what was not finite, as 'loss=nan'.
    metadata: entry in the manifest of the run.
  """

  def __init__(self, step: int, what: str, value: float):
    self.step = step
    self.cause = f'{what}={value}'
    self.metadata = {'step': step, 'status': 'diverged', 'cause': self.cause}
    super().__init__(
      what,
      value,
      f'diverged at step {step}: lower optim.learning_rate, raise optim.warmup_steps, or look for '
      'a number of the config that is out of proportion; in another --workdir; earlier checkpoints '
      'are kept',
    )


def not_finite(step_metrics: StepMetrics, record: dict[str, Any]) -> tuple[str, float] | None:
  """Returns the metric of a step that is not finite, and its value; None if all are."""
  for name, what in (('objective', 'loss'), ('grad_norm', 'gradient norm')):
    if not math.isfinite(record[name]):
      return what, record[name]
  if not bool(step_metrics.router_state_finite):
    return 'router_state', math.nan
  return None
