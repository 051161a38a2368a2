"""Terminal output of a run: lines, and a progress bar with the metrics of the last step."""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import tqdm

from moe_jax.run.timing import TRAINING


def print_line(line: str) -> None:
  """Prints a line on stdout at once, above the bar if there is one on the terminal."""
  if sys.stderr.isatty():
    tqdm.tqdm.write(line)
    sys.stdout.flush()
  else:
    print(line, flush=True)


def bar_file() -> Any:
  """Returns where a bar writes: stderr; away from a terminal each refresh is a line of its own."""
  return sys.stderr if sys.stderr.isatty() else _Lines(sys.stderr)


class _Lines:
  """A text stream that ends lines where a bar would write over the last one."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes each refresh of a bar as a line; blanks that only clear the last one are dropped."""
    for line in text.replace('\r', '\n').split('\n'):
      if line.strip():
        self._stream.write(line.rstrip() + '\n')
    return len(text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class ProgressBar:
  """The progress bar: phase, loss, tokens per second, drop share, time left."""

  def __init__(self, num_steps: int, step: int, shown: bool = True):
    """Shows `step` of `num_steps` as done; only the first process shows anything."""
    self._terminal = sys.stderr.isatty()
    self._paused = time.time()
    self._bar = tqdm.tqdm(
      total=num_steps,
      initial=step,
      unit='step',
      disable=not shown or jax.process_index() != 0,
      file=bar_file(),
      mininterval=0.2 if self._terminal else 10.0,
      dynamic_ncols=True,
    )

  def show_phase(self, phase: str) -> None:
    """Shows what the run is doing; the time left is judged only by training."""
    if self._bar.disable:
      return
    self._bar.set_description_str('' if phase == TRAINING else phase, refresh=self._terminal)
    now = time.time()
    if phase == TRAINING:
      # As if the clock of the bar had stood still; `unpause` would count from the last refresh.
      self._bar.start_t += now - self._paused
      self._bar.last_print_t += now - self._paused
    self._paused = now

  def update(self, step: int, record: dict[str, Any], rate: float) -> None:
    """Shows a step that has ended, and tokens per second."""
    shown = {'loss': f'{record["loss"]:.3f}', 'tok/s': f'{rate:,.0f}'}
    if 'router/drop_share' in record:
      shown['drop'] = f'{record["router/drop_share"]:.1%}'
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(step - self._bar.n)

  def close(self) -> None:
    """Leaves the bar as it is and ends its line."""
    self._bar.close()


class Listener(NamedTuple):
  """Callbacks of a sweep, called instead of printing on the terminal.

  Attributes:
    say: takes what would be printed, a line at a time.
    on_step: takes the number of each step that was done.
    on_phase: takes each phase of `timing.PHASES` when it begins.
  """

  say: Callable[[str], None]
  on_step: Callable[[int], None]
  on_phase: Callable[[str], None] = lambda phase: None
