"""What every command shares: flags, the `error:` line and exit codes.

Exit codes: 0 done; 2 the user's input is wrong; 3 a file is damaged and nothing good is left; 130
and 143 interrupted by SIGINT and SIGTERM, with the state saved; 1 a defect of ours.
"""

import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from moe_jax import config as config_lib
from moe_jax.errors import (
  DAMAGED_EXIT_CODE,
  USER_ERROR_EXIT_CODE,
  DamagedError,
  UserError,
  is_refusal,
)

# absl's flags of help.
_HELP = ('help', 'helpfull', 'helpshort', 'helpxml', '?')


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags, runs `main` and leaves with the exit code that its end asks for."""
  # ml_collections reads sys.argv, and there wants the file before the overrides of its fields.
  is_file = [word.startswith(('--config=', '-config=')) for word in sys.argv]
  files = [word for word, yes in zip(sys.argv, is_file, strict=True) if yes]
  others = [word for word, yes in zip(sys.argv, is_file, strict=True) if not yes]
  sys.argv = [others[0], *files, *others[1:]]
  try:
    app.run(lambda argv: _guard(main), flags_parser=_parse)
  except _UsageError as error:
    fail(str(error))
  except SystemExit as end:
    # absl ends a call for help with 1, which here says that something is broken.
    asked = end.code == 1 and asks_for_help(sys.argv)
    raise SystemExit(0 if asked else end.code) from None


def asks_for_help(words: Sequence[str]) -> bool:
  """Whether one of the arguments is a flag of help."""
  return any(word.startswith('-') and word.lstrip('-') in _HELP for word in words)


def print_help(text: str) -> NoReturn:
  """Prints what a command says of itself, and leaves."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    end_of_reading()
  sys.exit(0)


def end_of_reading() -> NoReturn:
  """Leaves when whoever reads has enough, as `head`. What is still to be written goes nowhere."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(0)


class _UsageError(Exception):
  """A flag is unknown, missing or has a value it can't take."""


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(list(argv))
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
    raise _UsageError(_describe(error, argv)) from error
  except BrokenPipeError:
    end_of_reading()
  except OSError as error:
    path = next((w.partition('=')[2] for w in argv if w.lstrip('-').startswith('config=')), '')
    if not os.path.exists(path.partition(':')[0]):
      raise _UsageError(f'--config={path!r}: does not exist') from error
    raise _UsageError(f'--config: cannot be read: {error}') from error
  except SyntaxError as error:
    raise _UsageError(f'--config: {error.filename}:{error.lineno}: {error.msg}') from error
  if len(rest) > 1:
    raise _UsageError(f'argument={rest[1]!r}: not understood; flags are --name=value')
  return rest


def _describe(error: Exception, argv: Sequence[str]) -> str:
  """Finds the override a parsing error is about, as ml_collections does not always name it."""
  if isinstance(error, UserError) and 'Traceback' not in str(error):
    return str(error)
  text = ' '.join(str(error).split())
  overrides = [word for word in argv if word.startswith(('--config.', '-config.'))]
  for override in overrides:
    name, _, value = override.lstrip('-').removeprefix('config.').partition('=')
    room, _, field = name.partition('.')
    known = config_lib.SCHEMA.get(room, {})
    if known and not field:
      return f'{name}={value!r}: a section; set one of its fields, {", ".join(known)}'
    if field not in known:
      allowed = ', '.join(known) if known else ', '.join(config_lib.SCHEMA)
      return f'{name}={value!r}: unknown field; must be one of {allowed}'
    # A command without a config says `Unknown command line flag 'config.NAME'`.
    if f'config.{name}' in text and not text.startswith('Unknown'):
      kind = type(known[field].default).__name__
      return f'{name}={value!r}: must be of type {kind}; {known[field].allowed}'
  if 'Traceback' in text:
    # ml_collections puts what the config file raised, traceback and all, into its message.
    flag = next((word for word in argv if word.lstrip('-').startswith('config=')), '--config')
    last = str(error).strip().splitlines()[-1].strip()
    return f'{flag}: {last.removeprefix("moe_jax.errors.UserError: ")}'
  return text


def _guard(main: Callable[[], int | None]) -> int | None:
  # The libraries log their search for devices, every file they write, and every error they raise.
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook, sys.excepthook = _report_unraisable, _report
  try:
    return main()
  except UserError as error:
    message, code = str(error), USER_ERROR_EXIT_CODE
  except DamagedError as error:
    message, code = str(error), DAMAGED_EXIT_CODE
  except OSError as error:
    if not is_refusal(error):
      raise
    message, code = f'path={error.filename!r}: {error.strerror}', USER_ERROR_EXIT_CODE
  except KeyboardInterrupt:
    sys.exit(130)
  # Here the exception is gone, and with it what it kept alive: half-done coroutines of Orbax would
  # print tracebacks of their own when the interpreter ends.
  sys.unraisablehook = lambda unraisable: None
  gc.collect()
  sys.unraisablehook = _report_unraisable
  fail(message, code)
  return None


# What threads of TensorStore say to the loop that Orbax closed after a first failure.
_TOO_LATE = 'Event loop is closed'


def _report_unraisable(unraisable) -> None:
  if str(unraisable.exc_value) != _TOO_LATE:
    sys.__unraisablehook__(unraisable)


def _report(kind, value, traceback) -> None:
  if str(value) != _TOO_LATE:
    sys.__excepthook__(kind, value, traceback)


def fail(message: str, code: int = USER_ERROR_EXIT_CODE) -> NoReturn:
  """Prints one `error:` line and leaves."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
  sys.exit(code)


def define_config_flag() -> Callable[[], ml_collections.ConfigDict]:
  """Defines --config and returns a function that gives the validated config."""
  holder = config_flags.DEFINE_config_file(
    'config', None, 'configs/NAME.py[:argument]; --config.a.b=value overrides a field.'
  )

  def config() -> ml_collections.ConfigDict:
    if holder.value is None:
      raise UserError('--config', None, 'must be given, for example configs/quickstart.py')
    if not isinstance(holder.value, ml_collections.ConfigDict):
      # ml_collections puts off the error of a file that is not there until the config is used.
      path = config_flags.get_config_filename(flags.FLAGS['config'])
      if not os.path.exists(path):
        raise UserError('--config', path, 'does not exist')
      raise UserError('--config', path, 'must be a file whose get_config() returns a ConfigDict')
    config_lib.validate(holder.value)
    return holder.value

  return config


def required(flag: flags.FlagHolder) -> str:
  """Returns the value of a flag that must be given."""
  if not flag.value:
    raise UserError(f'--{flag.name}', flag.value, 'must be given')
  return flag.value
