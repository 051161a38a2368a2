"""Time that the trials of a study take here: measured where something was run, else by FLOPs.

Training and evaluation are steps and batches of a program each. Their seconds come, best first,
from a probe, from earlier trials of the same program in the working directory, from earlier trials
of other programs in proportion to the FLOPs, and from the FLOPs at a third of the rate of a large
matmul. One-time costs of a program (compiling) and of a trial (initial values, checkpoints) are
counted separately. Preparing data is not in it.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.study import Study
from moe_jax.sweep import evaluate_trials
from moe_jax.sweep.evaluations import config_for
from moe_jax.sweep.trials import Trial, vocab_size_of
from moe_jax.train import accounting
from moe_jax.train.program import program_of

TRAINING, EVALUATION = 'training', 'evaluation'
# Seconds assumed where nothing was measured: to compile a program, and to start and end a trial.
COMPILING = {TRAINING: 30.0, EVALUATION: 15.0}
STARTING = 5.0
# How the seconds of a step are known, best first.
_HOW = (
  'as measured',
  'as measured of other programs, in proportion to FLOPs',
  'from its FLOPs at {rate:.1e} FLOP/s, a third of what a large matmul reaches here (--probe '
  'measures it)',
)


class Measured(NamedTuple):
  """Seconds of one program.

  Attributes:
    setup: before the first step or batch, compiling included.
    step: of one step or batch of one trial.
    flops: of that step or batch.
  """

  setup: float
  step: float
  flops: float


# Measurements by (training or evaluation, program).
Measurements = Mapping[tuple[str, str], Sequence[Measured]]


class Work(NamedTuple):
  """Work that one trial gives to one program.

  Attributes:
    part: training or evaluation.
    program: a key of programs.
    steps: steps or batches; None if unknown, as the data is not prepared.
    flops: of a step or batch.
  """

  part: str
  program: str
  steps: int | None
  flops: float


class Estimate(NamedTuple):
  """The time of all trials, one after the other.

  Attributes:
    seconds: by 'training', 'evaluation', 'compiling' and 'starting'.
    basis: how each of them was found, in words.
    unknown: parts that are not counted, in words; '' if none.
  """

  seconds: dict[str, float]
  basis: dict[str, str]
  unknown: str

  @property
  def total(self) -> float:
    """Seconds in all."""
    return sum(self.seconds.values())


def work_of(study: Study, trial: Trial, num_batches: int | None) -> list[Work]:
  """Returns the programs that a trial runs: its training, then the study's evaluations in order.

  Args:
    study: whose evaluations are counted.
    trial: not begun.
    num_batches: of an evaluation; None if the data is not prepared.
  """
  config = trial.config
  tokens = config.data.batch_size * config.data.sequence_length
  forward = accounting.computed_flops_per_token(config, vocab_size_of(config))
  work = [Work(TRAINING, program_of(config), config.train.num_steps, 3 * forward * tokens)]
  for name in study.evaluations:
    eval_config = config_for(config, name)
    program = evaluate_trials.evaluation_program(eval_config)
    eval_config.moe.capacity_factor = eval_config.moe.eval_capacity_factor
    forward = accounting.computed_flops_per_token(eval_config, vocab_size_of(config))
    microbatch = tokens / config.train.accumulation_steps
    work.append(Work(EVALUATION, program, num_batches, forward * microbatch))
  return work


def step_seconds(work: Work, measured: Measurements, rate: float) -> tuple[str, float]:
  """Returns how the seconds of a step or batch are known, of `_HOW`, and the seconds."""
  own = measured.get((work.part, work.program), ())
  if own:
    return _HOW[0], float(np.median([m.step for m in own]))
  others = [m.step / m.flops for (of, _), many in measured.items() if of == work.part for m in many]
  if others:
    return _HOW[1], work.flops * float(np.median(others))
  return _HOW[2], work.flops / rate


def seconds_of(work: Sequence[Work], measured: Measurements, rate: float) -> float:
  """Returns the seconds of the steps and batches of one trial, those that are known."""
  return sum((one.steps or 0) * step_seconds(one, measured, rate)[1] for one in work)


def estimate(work: Sequence[Sequence[Work]], measured: Measurements, rate: float) -> Estimate:
  """Returns the time of trials.

  Args:
    work: of each trial that is not done.
    measured: of programs that have run; {} if none has.
    rate: floating-point operations a second where nothing was measured.
  """
  seconds, basis, unknown = {}, {}, ''
  for part in (TRAINING, EVALUATION):
    every = [one for trial_work in work for one in trial_work if one.part == part]
    known = [one for one in every if one.steps is not None]
    if len(known) < len(every):
      unknown = 'evaluation, as its data is not prepared here (--probe prepares and measures it)'
    each = [step_seconds(one, measured, rate) for one in known]
    seconds[part] = sum((one.steps or 0) * s for one, (_, s) in zip(known, each, strict=True))
    if known:
      basis[part] = _basis(part, known, [how for how, _ in each], rate)
  seconds['compiling'], basis['compiling'] = _compiling(work, measured)
  seconds['starting'], basis['starting'] = _starting(len(work), measured)
  return Estimate(seconds, basis, unknown)


def _basis(part: str, known: Sequence[Work], hows: Sequence[str], rate: float) -> str:
  """Returns how many steps or batches there are, and how their seconds are known.

  Args:
    part: training or evaluation.
    known: work of the part, whose steps are known.
    hows: of `_HOW`, for each.
    rate: floating-point operations a second where nothing was measured.
  """
  training = part == TRAINING
  noun, one = ('steps', 'step') if training else ('batches', 'batch')
  counts = {how: hows.count(how) for how in _HOW if how in hows}
  said = [how.format(rate=rate) for how in counts]
  if len(counts) > 1:
    said = [f'{text} ({count})' for text, count in zip(said, counts.values(), strict=True)]
  total = sum(work.steps or 0 for work in known)
  runs = f'{len(known)} {"trials" if training else "evaluations"}'
  return f'{total:,} {noun} of {runs}, the time of a {one} {", ".join(said)}'


def _compiling(work: Sequence[Sequence[Work]], measured: Measurements) -> tuple[float, str]:
  """Returns the seconds that programs take once: the longest set-up of each, else an assumption."""
  programs = {(one.part, one.program) for trial_work in work for one in trial_work}
  known = {key: max(m.setup for m in measured[key]) for key in programs if measured.get(key)}
  total = sum(known.values())
  for part in (TRAINING, EVALUATION):
    rest = sum(key[0] == part and key not in known for key in programs)
    others = [max(m.setup for m in many) for (of, _), many in measured.items() if of == part]
    total += rest * (float(np.median(others)) if others else COMPILING[part])
  assumed = (
    f'assumed to take {COMPILING[TRAINING]:.0f} s each of training, {COMPILING[EVALUATION]:.0f} s '
    'of evaluation'
  )
  how = 'the longest set-up of each, or that of others' if measured else assumed
  return total, f'{len(programs)} programs, {how}'


def _starting(num_trials: int, measured: Measurements) -> tuple[float, str]:
  """Returns the seconds of set-up of every trial whose program is compiled: the shortest seen."""
  each = 0.0
  for part in (TRAINING, EVALUATION):
    warm = [
      min(m.setup for m in many) for (of, _), many in measured.items() if of == part and many[1:]
    ]
    each += float(np.median(warm)) if warm else 0.0
  if not each:
    return num_trials * STARTING, f'{num_trials} trials, assumed to take {STARTING:.0f} s each'
  return num_trials * each, f'{num_trials} trials, {each:.1f} s each as measured'


def measured_in(
  work: Sequence[Work], outcome: Mapping[str, Any]
) -> dict[tuple[str, str], Measured]:
  """Returns the measurements of a finished trial of its programs.

  Args:
    work: of the trial, from `work_of`.
    outcome: with or without `seconds`, which earlier versions did not keep.
  """
  seconds = outcome.get('seconds', {})
  told = [seconds.get(TRAINING, {}), *seconds.get(EVALUATION, {}).values()]
  found = {}
  # Another version of the study may have had other evaluations.
  for one, of in zip(work, told, strict=False):
    # The first step is set-up, as it compiles.
    if of.get('steps', 0) > 1:
      step = of['running'] / (of['steps'] - 1) / of['together']
      found[one.part, one.program] = Measured(of['setup'], step, one.flops)
  return found


def matmul_rate() -> float:
  """Returns the floating-point operations a second of a large matmul here."""
  x = jnp.ones((1024, 1024))
  matmul = jax.jit(lambda x: x @ x)
  matmul(x).block_until_ready()
  seconds = []
  for _ in range(5):
    start = time.perf_counter()
    matmul(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * 1024**3 / sorted(seconds)[2]
