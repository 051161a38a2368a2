"""Records what training computes, and holds a later state of the code against it, bit by bit.

  python -m tests.identity record FILE    # before a refactor, on a clean checkout
  python -m tests.identity check FILE     # after each structural commit, on the same machine

A refactor changes no number: every line of metrics.jsonl but its times, and the SHA-256 of the
final parameters, must be equal. No test of the daily run: numbers differ between kinds of CPU.
The runs are the public commands with 8 simulated devices, so it outlives any move of modules.
"""

import argparse
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_TIMES = ('time', 'second', 'goodput', 'data_wait')

_STUDY = """
from configs import debug
from moe_jax.study import Metric, Study, product


def get_study():
  base = debug.get_config()
  base.train.update(num_steps=6, checkpoint_every=3, eval_every=0, log_every=1)
  base.mesh.update(data=1, expert=1)
  return Study(
    name='identity', question='Does a refactor change a number?', base=base,
    arms=product({'optim.learning_rate': (0.001, 0.002)}), seeds=(0, 1),
    metric=Metric('dropless/bits_per_byte', 'bits per byte', lower_is_better=True),
    baseline='learning_rate=0.001',
  )
"""


def _train(config: str, *, steps: int, mesh: tuple[int, int], command=('-m', 'moe_jax.train')):
  """Returns the command, without the working directory."""
  data, expert = mesh
  return [
    *command,
    f'--config={config}',
    f'--config.train.num_steps={steps}',
    '--config.optim.warmup_steps=4',
    '--config.train.log_every=1',
    f'--config.mesh.data={data}',
    f'--config.mesh.expert={expert}',
  ]


def _commands() -> dict[str, list[str]]:
  preset = 'configs/presets/{}.py:debug'.format
  return {
    'debug': _train('configs/debug.py', steps=20, mesh=(2, 4)),
    'quickstart': _train('configs/quickstart.py', steps=20, mesh=(1, 8)),
    'presets/st_moe': _train(preset('st_moe'), steps=10, mesh=(2, 4)),
    'presets/deepseek_moe': _train(preset('deepseek_moe'), steps=10, mesh=(4, 2)),
    'presets/expert_choice': _train(preset('expert_choice'), steps=10, mesh=(8, 1)),
    'two_processes': _train(
      'configs/debug.py',
      steps=10,
      mesh=(2, 4),
      command=('launch/local', '--processes=2', '--devices_per_process=4'),
    ),
  }


def _run(words: list[str]) -> None:
  environment = os.environ | {
    'PYTHONPATH': str(REPOSITORY),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'TF_CPP_MIN_LOG_LEVEL': '2',
  }
  if words[0].startswith('launch/'):
    del environment['XLA_FLAGS']
  done = subprocess.run(
    [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True
  )
  if done.returncode:
    raise SystemExit(f'{" ".join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}')


def _parameters_digest(run_directory: pathlib.Path) -> str:
  code = (
    'import sys, hashlib, jax, numpy, moe_jax\n'
    'digest = hashlib.sha256()\n'
    'for path, leaf in jax.tree_util.tree_leaves_with_path(moe_jax.load_run(sys.argv[1]).params):\n'
    '  digest.update(numpy.ascontiguousarray(leaf).tobytes())\n'
    'print("digest", digest.hexdigest())'
  )
  environment = os.environ | {'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code, str(run_directory)],
    env=environment,
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise SystemExit(f'{run_directory} cannot be loaded:\n{done.stderr[-4000:]}')
  return done.stdout.split('digest ')[1].strip()


def _numbers(run_directory: pathlib.Path) -> dict:
  """Returns {'metrics': lines without times, 'parameters': digest or None}."""
  lines = [json.loads(x) for x in (run_directory / 'metrics.jsonl').read_text().splitlines()]
  kept = [
    {key: value for key, value in line.items() if not any(word in key for word in _TIMES)}
    for line in lines
  ]
  saved = any((run_directory / 'checkpoints').glob('*'))
  return {'metrics': kept, 'parameters': _parameters_digest(run_directory) if saved else None}


def record() -> dict:
  """Runs everything in a scratch directory and returns its numbers by run."""
  numbers = {}
  with tempfile.TemporaryDirectory() as scratch:
    root = pathlib.Path(scratch)
    for name, words in _commands().items():
      print(name, flush=True)
      _run([*words, f'--workdir={root / name}'])
      numbers[name] = _numbers(root / name)
    (root / 'study.py').write_text(_STUDY, encoding='utf-8')
    print('packed_sweep', flush=True)
    _run(
      [
        '-m',
        'moe_jax.sweep',
        f'--study={root / "study.py"}',
        f'--workdir={root / "sweep"}',
        '--pack=4',
      ]
    )
    for path in sorted((root / 'sweep').rglob('metrics.jsonl')):
      # Trials are named by a digest of their config, which a new field may change; the order of
      # arms and seeds in the manifest does not.
      config = json.loads((path.parent / 'manifest.json').read_text())['config']
      key = f'packed_sweep/{config["optim"]["learning_rate"]}/{config["train"]["seed"]}'
      numbers[key] = _numbers(path.parent)
  return numbers


def differences(before: dict, after: dict, path: str = '') -> list[str]:
  """Returns one line per number of `before` that `after` lacks or has otherwise."""
  if isinstance(before, dict) and isinstance(after, dict):
    return [
      line
      for key in before
      for line in (
        differences(before[key], after[key], f'{path}/{key}')
        if key in after
        else [f'{path}/{key}: is missing']
      )
    ]
  if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
    pairs = enumerate(zip(before, after, strict=True))
    return [line for i, (a, b) in pairs for line in differences(a, b, f'{path}[{i}]')]
  return [] if before == after else [f'{path}: {before!r} -> {after!r}'[:300]]


def main() -> None:
  """Records, or checks and prints the differences; exit code 1 if there are any."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('verb', choices=('record', 'check'))
  parser.add_argument('file', type=pathlib.Path)
  arguments = parser.parse_args()
  numbers = record()
  count = sum(len(run['metrics']) for run in numbers.values())
  total = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
  print(f'{len(numbers)} runs, {count} lines, sha256 {total}')
  if arguments.verb == 'record':
    arguments.file.write_text(json.dumps(numbers, indent=1), encoding='utf-8')
    return
  lines = differences(json.loads(arguments.file.read_text(encoding='utf-8')), numbers)
  print('\n'.join(lines[:50]) or 'identical')
  sys.exit(bool(lines))


if __name__ == '__main__':
  main()
