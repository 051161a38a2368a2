"""Runs the trials of a study: python -m moe_jax.sweep --study=FILE --workdir=DIR.

Examples:
  python -m moe_jax.sweep --study=experiments/NAME/study.py --dry_run --probe
  python -m moe_jax.sweep --study=experiments/NAME/study.py --workdir=runs/NAME --pack=8
  python -m moe_jax.sweep --study=experiments/NAME/study.py --workdir=runs/NAME --shard=0/4
"""

import os

from absl import flags

from moe_jax import arguments, cli
from moe_jax.errors import UserError

_STUDY = cli.define_path('study', 'File that defines get_study().')
_WORKDIR = cli.define_path('workdir', 'Of the sweep; shared by all its workers.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print every trial and run none.')
_PROBE = flags.DEFINE_bool(
  'probe', False, 'With --dry_run: prepare the data and run each program for a moment to time it.'
)
_JSON = flags.DEFINE_bool('json', False, 'With --dry_run: print one JSON object.')
_SHARD = flags.DEFINE_string('shard', '0/1', 'i/n: every n-th trial, from the i-th.')
_TRIAL = flags.DEFINE_string('trial', None, 'Run only the trial with this id.')
_PACK = flags.DEFINE_integer(
  'pack', 1, 'Train up to N trials as one program, if they differ only in hyperparameters.'
)
_RESULTS = cli.define_path(
  'results', 'A results.jsonl of earlier runs, whose finished trials are not run again.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'FIELD=VALUE of what changes no result, as mesh.data=2 or data.data_dir=DIR.'
)


def main() -> int:
  """Runs the trials that are not done yet; 1 if a trial failed, 128 + signal if interrupted."""
  file = cli.required(_STUDY)
  arguments.check_file('--study', file)
  index, count = _shard()
  for flag in (_PROBE, _JSON):
    if flag.value and not _DRY_RUN.value:
      raise UserError(f'--{flag.name}', flag.value, 'goes with --dry_run')
  if _PACK.value < 1:
    raise UserError('--pack', _PACK.value, 'must be at least 1')
  if _RESULTS.value is not None:
    arguments.check_file('--results', _RESULTS.value)
  if not _DRY_RUN.value:
    cli.required(_WORKDIR)
  import tqdm

  from moe_jax.run.setup import mesh_of
  from moe_jax.sweep import dry_run, plan, programs, runner
  from moe_jax.sweep.trials import check_new, load_study, trials_of

  study = load_study(file)
  trials = plan.with_id(trials_of(study, plan.free_fields(_SET.value)), _TRIAL.value)
  trials = plan.without_known(trials, _RESULTS.value, quiet=_JSON.value)[index::count]
  evaluates = next((t.config.train.eval_every for t in trials if t.config.train.eval_every), 0)
  if _PACK.value > 1 and evaluates:
    raise UserError(
      'train.eval_every', evaluates, 'must be 0 with --pack; --set=train.eval_every=0 makes it so'
    )
  check_new(study, trials, _WORKDIR.value)
  if _DRY_RUN.value:
    planned = dry_run.make_plan(study, trials, _WORKDIR.value, _PROBE.value)
    cli.show(dry_run.as_json(planned) if _JSON.value else dry_run.text(planned))
    if planned.problems:
      raise planned.problems[0]
    return 0
  workdir = cli.required(_WORKDIR)
  for trial in trials:
    mesh_of(trial.config)
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise UserError('--workdir', workdir, f'cannot be written: {error.strerror}') from error
  try:
    with programs.kept_programs(workdir):
      counts = runner.run(study, trials, workdir, tqdm.tqdm.write, _PACK.value)
  except (runner.Interrupted, KeyboardInterrupt) as interrupted:
    print('interrupted; the same command goes on from here', flush=True)
    # Before the first step a Ctrl-C is Python's own.
    return 128 + getattr(interrupted, 'signal', 2)
  print(
    f'\n{len(trials)} trials: {counts.finished} finished, {counts.diverged} diverged, '
    f'{counts.failed} failed, {counts.elsewhere} held by other workers'
  )
  return 1 if counts.failed else 0


def _shard() -> tuple[int, int]:
  """Returns (i, n) of --shard=i/n."""
  index, _, count = _SHARD.value.partition('/')
  if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
    raise UserError('--shard', _SHARD.value, 'must read i/n with 0 <= i < n')
  return int(index), int(count)


if __name__ == '__main__':
  cli.run(main)
