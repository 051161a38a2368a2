"""Continues prompts with a trained model: python -m moe_jax.generate --workdir=DIR --prompt=TEXT.

Examples:
  python -m moe_jax.generate --workdir=runs/quickstart --prompt='HAMLET. '
  python -m moe_jax.generate --workdir=runs/quickstart --prompt=One --prompt=Two --temperature=0
  python -m moe_jax.generate --workdir=runs/quickstart --prompt=One --num_tokens=20 --json
"""

import math

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError

_WORKDIR = cli.define_path('workdir', 'Directory of the run.')
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'Text to continue; may be given several times.')
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 200, 'New tokens for each prompt, at most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, '0 always takes the most probable token.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Sample among this many most probable tokens; 0 all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Sample among tokens that reach this probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn.')
_STEP = flags.DEFINE_integer('step', None, 'Checkpoint; the newest by default.')
_MESH = flags.DEFINE_string('mesh', None, "data=D,expert=E; the run's own by default.")
_JSON = cli.define_json_flag()


def _check_flags() -> None:
  checks = (
    (_NUM_TOKENS, 1 <= _NUM_TOKENS.value <= 65536, 'must be in 1..65536'),
    (
      _TEMPERATURE,
      math.isfinite(_TEMPERATURE.value) and _TEMPERATURE.value >= 0,
      'must be a finite number >= 0',
    ),
    (_TOP_K, _TOP_K.value >= 0, 'must be at least 0'),
    (_TOP_P, 0 < _TOP_P.value <= 1, 'must be above 0 and at most 1'),
    (_SEED, 0 <= _SEED.value < 2**31, 'must be in 0..2**31-1'),
  )
  for flag, good, allowed in checks:
    if not good:
      raise UserError(f'--{flag.name}', flag.value, allowed)


def main() -> None:
  """Prints each prompt with its continuation."""
  workdir = cli.required(_WORKDIR)
  if not _PROMPT.value:
    raise UserError('--prompt', _PROMPT.value, 'must be given')
  _check_flags()
  from moe_jax.models.build import build_task
  from moe_jax.models.generate import encode_prompt, generate
  from moe_jax.run import device_errors
  from moe_jax.run.restore import restore_run

  less = 'lower it, give fewer --prompt at a time, or a --mesh of more devices'
  with device_errors.instead('--num_tokens', _NUM_TOKENS.value, less):
    run = restore_run(workdir, _STEP.value, _MESH.value)
    task = build_task(run.config, run.mesh, run.tokenizer.vocab_size, 'decode')
    if task.decode is None:
      raise UserError('model.family', run.config.model.family, 'cannot be sampled from')
    prompts = [
      encode_prompt(text, run.tokenizer, run.tokenizer.vocab_size) for text in _PROMPT.value
    ]
    continuations = generate(
      task,
      run.params,
      run.router_state,
      prompts,
      num_tokens=_NUM_TOKENS.value,
      eos_id=run.tokenizer.eos_id,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
      seed=_SEED.value,
    )
  texts = [run.tokenizer.decode(tokens) for tokens in continuations]
  if _JSON.value:
    cli.print_json(
      {
        'step': run.step,
        'samples': [
          {'prompt': prompt, 'continuation': text, 'num_tokens': len(tokens)}
          for prompt, text, tokens in zip(_PROMPT.value, texts, continuations, strict=True)
        ],
      }
    )
    return
  for prompt, text in zip(_PROMPT.value, texts, strict=True):
    print(f'--- {prompt!r}')
    print(prompt + text)


if __name__ == '__main__':
  cli.run(main)
