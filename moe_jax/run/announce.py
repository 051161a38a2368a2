"""Lines that a run prints before its first step: what will be trained, and warnings."""

import pathlib
from collections.abc import Callable
from typing import Any

import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax.data import Dataset
from moe_jax.routing import ROUTERS
from moe_jax.run import manifest, metrics_file

_MANY_PASSES = 50


def named_mesh(mesh: dict[str, int]) -> str:
  """Returns 'data=2, expert=4'."""
  return ', '.join(f'{axis}={size}' for axis, size in mesh.items())


def announce(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  dataset: Dataset,
  metadata: dict[str, Any],
  say: Callable[[str], None],
) -> None:
  """Prints what will be trained, and warnings for a reader of the results."""
  counts, routing = metadata['parameters'], metadata['routing']
  data = config.data
  rows = len(dataset.windows('train', data.sequence_length))
  passes = config.train.num_steps * data.batch_size / rows
  say(
    f'{counts["total"]:,} parameters, {counts["active"]:,} active; '
    f'mesh {named_mesh(dict(mesh.shape))} on {metadata["devices"]["kind"]}; '
    f'{dataset.num_tokens("train"):,} training tokens, {passes:.3g} passes over them'
  )
  if passes > _MANY_PASSES:
    say(
      f'warning: {passes:.0f} passes over {config.data.name}: a model learns so small a text '
      'by heart; take more text or a smaller train.num_steps'
    )
  if routing:
    # A router that assigns tokens to experts with free slots drops none, or by a rule of its own.
    assigned = ROUTERS[config.moe.router].balance == 'assignment'
    unlimited = routing['expert_capacity'] >= routing['tokens_in_group']
    floor = f'; random routing would drop {routing["drop_share_of_random_routing"]:.2%}'
    capacity = f'capacity {routing["expert_capacity"]}{"" if assigned else floor}'
    say(
      f'{routing["tokens_per_expert"]:.0f} tokens per expert and group, '
      f'{"none dropped for want of slots" if unlimited else capacity}'
    )
    if routing['tokens_per_expert'] < 16 and not assigned and not unlimited:
      say('warning: below 16 tokens per expert and group even balanced routing drops many')
  if not metadata['causal']:
    say(
      f'warning: {config_lib.why_not_causal(config)} is not causal: in training, later tokens '
      'decide where earlier ones go or who is dropped; in decoding they cannot'
    )
  if metadata['git_dirty']:
    say('note: uncommitted changes; the manifest says so')


def warn_of_lost_lines(
  workdir: str, old: dict[str, Any], step: int, say: Callable[[str], None]
) -> None:
  """Prints which lines of metrics.jsonl up to a step are damaged or gone."""
  path = pathlib.Path(workdir) / metrics_file.FILE
  found = metrics_file.read_file(path)
  finished = old['status'] == 'finished'
  if finished and found.damaged:
    say(f'warning: {path}: {metrics_file.damage(found)}')
  lost = metrics_file.missing_lines(found.records, manifest.paces(old), step, finished=finished)
  if lost:
    names = metrics_file.shortened([f'{split} {number}' for split, number in lost])
    state = 'is gone: it held' if not path.exists() else 'lacks'
    say(f'warning: {path} {state} the lines of {names}; they are not written again')
