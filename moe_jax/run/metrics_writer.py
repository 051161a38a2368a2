"""Metrics to files: metrics.jsonl and TensorBoard."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from moe_jax.run.metrics_file import FILE, is_number, keep_until, print_line


class MetricsWriter:
  """Appends records to metrics.jsonl, one line each, and scalars to TensorBoard files.

  Only the first process writes. A line is written whole and flushed, so a killed run leaves at most
  one cut line, which the next start removes along with lines past the step it resumes from. A file
  of which anything else would be lost is kept under another name.
  """

  def __init__(
    self,
    workdir: str,
    resume_step: int,
    enabled: bool = True,
    drop_last_valid: bool = False,
    say: Callable[[str], None] = print_line,
  ):
    """Opens both files.

    Args:
      workdir: of the run.
      resume_step: the last step of which lines stay.
      enabled: whether this process writes.
      drop_last_valid: whether the evaluation at that step is done again, too.
      say: takes a line for each loss of lines.
    """
    self._enabled = enabled
    if not enabled:
      return
    # Imported here: TensorBoard's protobufs cost half a second that no other command needs.
    import tensorboardX

    path = pathlib.Path(workdir) / FILE
    keep_until(path, resume_step, drop_last_valid, say)
    self._file = open(path, 'a', encoding='utf-8')  # noqa: SIM115
    # With only the time in seconds, the file of a quick restart would replace the last one.
    self._events = tensorboardX.SummaryWriter(
      str(pathlib.Path(workdir) / 'tensorboard'),
      purge_step=resume_step + 1,
      filename_suffix=f'.{time.time_ns()}',
    )

  def write(self, step: int, split: str, record: dict[str, Any]) -> None:
    """Writes one record; its `scalars_of` go to TensorBoard, too."""
    if not self._enabled:
      return
    from tensorboardX.proto.summary_pb2 import Summary

    self._file.write(json.dumps({'step': step, 'split': split} | record) + '\n')
    self._file.flush()
    # One event for all: an event each would cost more than a small step.
    values = [
      Summary.Value(tag=f'{split}/{name}', simple_value=value)
      for name, value in scalars_of(record).items()
    ]
    self._events.file_writer.add_summary(Summary(value=values), step)

  def close(self) -> None:
    """Closes both files."""
    if self._enabled:
      self._file.close()
      self._events.close()


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
  """Returns the numbers of a record that TensorBoard draws, by name.

  A number keeps its name. A list of numbers is one over MoE layers: `NAME/layer_0` and so on. Of a
  dictionary of records (by domain) only the numbers: `domains/DOMAIN/NAME`. Tables (the load of
  each expert) and text are only in metrics.jsonl.
  """
  found: dict[str, float] = {}
  for name, value in record.items():
    if is_number(value):
      found[name] = float(value)
    elif isinstance(value, list) and all(map(is_number, value)):
      found |= {f'{name}/layer_{layer}': float(x) for layer, x in enumerate(value)}
    elif isinstance(value, dict):
      inner = ((f'{name}/{key}', within) for key, within in value.items())
      found |= {
        f'{prefix}/{key}': float(x)
        for prefix, within in inner
        if isinstance(within, dict)
        for key, x in within.items()
        if is_number(x)
      }
  return found
