"""Trains a config: python -m moe_jax.train --config=configs/quickstart.py --workdir=DIR."""

from absl import flags

from moe_jax import cli
from moe_jax.parallel.distributed import join_processes
from moe_jax.train.loop import train

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is kept; new, or the same run.')
_PROFILE = flags.DEFINE_string(
  'profile', None, 'Directory for a trace of a few steps and a table of their time by part.'
)


def main() -> int:
  """Trains, or goes on training; 128 + signal if interrupted."""
  config, workdir = _CONFIG(), cli.required(_WORKDIR)
  join_processes()
  outcome = train(config, workdir, profile=_PROFILE.value)
  return 0 if outcome.finished else 128 + (outcome.interrupted_by or 0)


if __name__ == '__main__':
  cli.run(main)
