"""Trains a config, or continues training it: python -m moe_jax.train --config=FILE --workdir=DIR.

Examples:
  python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m moe_jax.train --config=configs/debug.py --workdir=runs/mine --config.train.num_steps=100
  python -m moe_jax.train --config=configs/presets/switch.py:quickstart --workdir=runs/switch
"""

import os
import sys

from moe_jax import cli
from moe_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_WORKDIR = cli.define_path('workdir', 'Where the run is kept; new, or the same run.')
_PROFILE = cli.define_path(
  'profile', 'Directory for a trace of a few steps and a table of their time by part.'
)


def main() -> int:
  """Trains, or continues training; 128 + signal if interrupted."""
  workdir = cli.required(_WORKDIR)
  try:
    config = _CONFIG()
  except UserError as error:
    raise _with_way_on(error) from error
  from moe_jax import unread
  from moe_jax.parallel.distributed import join_processes
  from moe_jax.run import manifest
  from moe_jax.run.single import train

  if not manifest.holds_run(workdir):
    unread.check_unread(config, unread.defaults(config) | cli.overridden_fields())
  join_processes()
  outcome = train(config, workdir, profile=_PROFILE.value)
  return 0 if outcome.finished else 128 + (outcome.interrupted_by or 0)


def _with_way_on(error: UserError) -> UserError:
  """Returns the error of a field with what to do, if the run in --workdir has that very value."""
  # The flags may not have been parsed.
  words = [word for one in sys.argv[1:] for word in one.split('=', 1)]
  places = [i for i, word in enumerate(words[:-1]) if word in ('--workdir', '-workdir')]
  workdir = os.path.expanduser(words[places[-1] + 1]) if places else ''
  if not os.path.exists(os.path.join(workdir, 'manifest.json')):
    return error
  from moe_jax.run import same_run

  return same_run.with_way_on(error, workdir)


if __name__ == '__main__':
  cli.run(main, explain=_with_way_on)
