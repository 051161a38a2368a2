"""Evaluates a run on held-out text, by domain: python -m moe_jax.evaluate --workdir=DIR.

Examples:
  python -m moe_jax.evaluate --workdir=runs/quickstart
  python -m moe_jax.evaluate --workdir=runs/quickstart --split=valid --json
  python -m moe_jax.evaluate --workdir=runs/quickstart --data=text:FOLDER
  python -m moe_jax.evaluate --workdir=runs/quickstart --step=400 --compare_step=100
"""

import functools
import os
import sys
from collections.abc import Callable

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError

_WORKDIR = cli.define_path('workdir', 'Directory of the run.')
_SPLIT = flags.DEFINE_enum(
  'split', None, ['train', 'valid', 'test'], "Of the run's data; test by default."
)
_DATA = cli.define_source(
  'data',
  'Other text, all of it: tier1, tier2, tfds:NAME or text:PATH (a folder of .txt or .jsonl).',
)
_DATA_DIR = cli.define_path('data_dir', "Where the data is kept; the run's by default.")
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; the newest by default.')
_COMPARE = flags.DEFINE_integer(
  'compare_step', None, 'An earlier checkpoint: how much routing changed since then.'
)
_COMPARE_DTYPE = flags.DEFINE_enum(
  'compare_router_dtype',
  None,
  ['float32', 'bfloat16'],
  'How much routing would change with moe.router_dtype of this value.',
)
_MESH = flags.DEFINE_string('mesh', None, "data=D,expert=E; the run's own by default.")
_FIGURE = flags.DEFINE_bool('figure', True, 'Also draw expert load into WORKDIR/expert_load.png.')
_JSON = cli.define_json_flag()


def main() -> None:
  """Evaluates, prints the tables and writes WORKDIR/evaluation_SPLIT.json or _DATA.json."""
  workdir = cli.required(_WORKDIR)
  if os.path.isdir(workdir) and not os.access(workdir, os.W_OK):
    raise UserError('--workdir', workdir, 'cannot be written: results are kept there')
  if _DATA_DIR.value and not os.path.isdir(_DATA_DIR.value):
    raise UserError('--data_dir', _DATA_DIR.value, 'must be a directory that exists')
  if _DATA.value is not None and _SPLIT.value is not None:
    raise UserError('--split', _SPLIT.value, "can't be given with --data, which is read whole")
  from moe_jax.results import evaluation, load_figure
  from moe_jax.run import device_errors

  more = 'give a mesh of more devices, as data=2,expert=4; results do not depend on it'
  with device_errors.instead('--mesh', _MESH.value, more):
    done = evaluation.evaluate(
      evaluation.Request(
        workdir,
        split=_SPLIT.value,
        data=_DATA.value,
        step=_STEP.value,
        mesh=_MESH.value,
        data_dir=_DATA_DIR.value,
        compare_step=_COMPARE.value,
        compare_router_dtype=_COMPARE_DTYPE.value,
      )
    )
  say: Callable[[str], None] = print
  if _JSON.value:
    say = functools.partial(print, file=sys.stderr)
  else:
    evaluation.print_tables(done.result)
  if done.config.moe.num_experts and _FIGURE.value:
    suffix = '' if _DATA.value is None else f'_{done.name}'
    figure = load_figure.draw(workdir, done.result, done.config, suffix)
    say(f'expert load over training and by domain: {figure}')
  say(f'all numbers: {done.path}')
  if _JSON.value:
    cli.print_json(done.result)


if __name__ == '__main__':
  cli.run(main)
