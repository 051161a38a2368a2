"""The progress bar of a training run."""

import sys
import time
from typing import Any

import jax
import tqdm


class ProgressBar:
  """The progress bar: loss, tokens per second, drop share, time left."""

  def __init__(self, num_steps: int, step: int, shown: bool = True):
    """Shows `step` of `num_steps` as done; only the first process shows anything."""
    terminal = sys.stderr.isatty()
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=step,
      unit='step',
      disable=not shown or jax.process_index() != 0,
      mininterval=0.2 if terminal else 10.0,
      dynamic_ncols=True,
    )
    self._last: tuple[int, float] = (step, time.perf_counter())
    self._rate = 0.0

  def update(self, step: int, record: dict[str, Any]) -> float:
    """Shows a step and returns tokens per second, smoothed."""
    before, then = self._last
    now = time.perf_counter()
    rate = record['tokens'] * (step - before) / max(now - then, 1e-9)
    self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
    self._last = (step, now)
    shown = {'loss': f'{record["loss"]:.3f}', 'tok/s': f'{self._rate:,.0f}'}
    if 'router/drop_share' in record:
      shown['drop'] = f'{record["router/drop_share"]:.1%}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(step - self._bar.n)
    return self._rate

  def close(self) -> None:
    """Leaves the bar as it is and ends its line."""
    self._bar.close()
