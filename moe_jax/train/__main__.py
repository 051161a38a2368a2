"""Trains a config, or goes on training it: python -m moe_jax.train --config=FILE --workdir=DIR.

Examples:
  python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m moe_jax.train --config=configs/debug.py --workdir=runs/mine --config.train.num_steps=100
  python -m moe_jax.train --config=configs/presets/switch.py:quickstart --workdir=runs/switch
"""

from moe_jax import cli
from moe_jax.errors import UserError

_CONFIG = cli.define_config_flag()
_WORKDIR = cli.define_path('workdir', 'Where the run is kept; new, or the same run.')
_PROFILE = cli.define_path(
  'profile', 'Directory for a trace of a few steps and a table of their time by part.'
)


def main() -> int:
  """Trains, or goes on training; 128 + signal if interrupted."""
  workdir = cli.required(_WORKDIR)
  try:
    config = _CONFIG()
  except UserError as error:
    from moe_jax.train import manifest

    raise manifest.with_way_on(error, workdir) from error
  from moe_jax import unread
  from moe_jax.parallel.distributed import join_processes
  from moe_jax.train import manifest
  from moe_jax.train.loop import train

  if not manifest.holds_run(workdir):
    unread.check_unread(config, unread.defaults(config) | cli.overridden_fields())
  join_processes()
  outcome = train(config, workdir, profile=_PROFILE.value)
  return 0 if outcome.finished else 128 + (outcome.interrupted_by or 0)


if __name__ == '__main__':
  cli.run(main)
