"""Code that all commands share: flags, the `error:` line and exit codes.

Exit codes: 0 done; 2 the user's input is wrong; 3 a file is damaged and nothing good is left; 130
and 143 interrupted by SIGINT and SIGTERM, with the state saved; 1 a defect of ours.
"""

import functools
import gc
import importlib.machinery
import json
import math
import os
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from moe_jax import arguments, installed
from moe_jax import config as config_lib
from moe_jax.errors import (
  DAMAGED_EXIT_CODE,
  USER_ERROR_EXIT_CODE,
  DamagedError,
  UserError,
  is_refusal,
  raised_by,
)
from moe_jax.field_names import field_value

_WRAPPER = textwrap.TextWrapper(
  100, initial_indent=' ' * 6, subsequent_indent=' ' * 6, break_on_hyphens=False
)
# The words of this command, as ml_collections wants them; it reads them when --config is parsed.
_WORDS: list[str] = []

# Flags defined by functions of this module belong to the command that calls them.
flags.disclaim_key_flags()


def run(
  main: Callable[[], int | None],
  text: str = '',
  *,
  explain: Callable[[UserError], UserError] = lambda error: error,
) -> None:
  """Parses the flags, runs `main` and exits with the code that fits its outcome.

  A module that is run defines its flags and imports nothing slow, `main` imports the rest: so help
  and errors in flags come at once.

  Args:
    main: the command.
    text: that --help begins with; the docstring of the module of `main` by default.
    explain: adds to an error of a field that a flag set; its message is the one that is printed.
  """
  if asks_for_help(sys.argv):
    print_help(_help(text or main.__globals__['__doc__'] or ''))
  try:
    app.run(lambda argv: _guard(main), flags_parser=functools.partial(_parse, explain))
  except _UsageError as error:
    fail(str(error))
  except SystemExit as end:
    # absl ends a call for its long help with 1, which here means a defect.
    long_help = any(word.lstrip('-') in arguments.LONG_HELP for word in sys.argv)
    raise SystemExit(0 if end.code == 1 and long_help else end.code) from None


def asks_for_help(words: Sequence[str]) -> bool:
  """True if one of the arguments is a help flag."""
  return any(word.startswith('-') and word.lstrip('-') in arguments.HELP for word in words)


def _help(text: str) -> str:
  """Returns the help of a command and of its flags."""
  own = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(sys.argv[0])}
  return '\n'.join([text.strip(), '', 'Flags:', *map(_help_of_flag, own.values())])


def _help_of_flag(flag: flags.Flag) -> str:
  usage = f'--[no]{flag.name}' if flag.boolean else f'--{flag.name}={_placeholder(flag)}'
  # absl adds a clause to the help of a flag that repeats.
  text = ' '.join((flag.help or '').split()).replace('.;', ';')
  if isinstance(flag.parser, flags.EnumParser):
    text = text.partition('>: ')[2]  # absl puts the choices first.
  if flag.name != arguments.CONFIG and flag.default not in (None, []):
    default = (flag.default_as_str or '').strip("'")
    text += f' Default: {default}.'
  return '\n'.join([f'  {usage}', *_WRAPPER.wrap(_sentence(text))])


def _sentence(text: str) -> str:
  """Returns a text with a capital, unless it begins with something that one types."""
  first = text.partition(' ')[0].rstrip('.:;,')
  typed = any(sign in first for sign in '=/.') or first != first.lower()
  return text if typed else text[:1].upper() + text[1:]


def _placeholder(flag: flags.Flag) -> str:
  if flag.name == arguments.CONFIG:
    return 'FILE[:ARGUMENT]'
  if isinstance(flag.parser, flags.EnumParser):
    return '|'.join(flag.parser.enum_values)
  if isinstance(flag.parser, arguments.PathParser):
    return flag.parser.placeholder
  if isinstance(flag.parser, flags.ListParser):
    return 'A,B,...'
  kinds = {flags.IntegerParser: 'INTEGER', flags.FloatParser: 'NUMBER'}
  return next((word for kind, word in kinds.items() if isinstance(flag.parser, kind)), 'TEXT')


def take_word(argv: list[str]) -> str | None:
  """Takes the first argument that is no flag out of a command line, None if there is none.

  For a command whose flags are all true or false: the value of another would be taken for it.
  """
  found = next((i for i, word in enumerate(argv[1:], 1) if not word.startswith('-')), None)
  return None if found is None else argv.pop(found)


def print_help(text: str) -> NoReturn:
  """Prints the help of a command, and exits."""
  show(text)
  sys.exit(0)


def show(text: str) -> None:
  """Prints a text; exits if its reader has gone."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    end_of_reading()


def end_of_reading() -> NoReturn:
  """Exits when the reader has enough, as `head`. What is still to be written is discarded."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(0)


class _UsageError(Exception):
  """A flag is unknown, missing or has a value it can't take."""


def _parse(explain: Callable[[UserError], UserError], argv: Sequence[str]) -> list[str]:
  try:
    _WORDS[:] = arguments.checked(argv[1:], {name: flags.FLAGS[name] for name in flags.FLAGS})
    return flags.FLAGS([argv[0], *_WORDS])
  except UserError as error:
    raise _UsageError(_describe(explain(error))) from error
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
    raise _UsageError(_describe(error)) from error
  except BrokenPipeError:
    end_of_reading()


def _describe(error: BaseException) -> str:
  return ' '.join(str(error).split())


class _ConfigParser(flags.ArgumentParser):
  """Loads a config file, whose code may raise anything.

  The parser of ml_collections forgets where an OSError comes from.
  """

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    """Returns the config, locked, of 'FILE' or 'FILE:ARGUMENT'."""
    path, *words = argument.split(':', 1)
    loader = importlib.machinery.SourceFileLoader('config_config', path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    sys.modules[loader.name] = module
    try:
      loader.exec_module(module)
      get_config = getattr(module, 'get_config', None)
      config = get_config(*words) if callable(get_config) else None
    except UserError as error:
      # Of its argument, which --config holds, or of a field.
      why = error.allowed if error.field == '--config' else _describe(error)
      raise _UsageError(f'--config={argument!r}: {why}') from error
    except (Exception, SystemExit) as error:
      why = raised_by(error, path) or _describe(error) or type(error).__name__
      raise _UsageError(installed.missing(error) or f'--config={argument!r}: {why}') from error
    if not isinstance(config, ml_collections.ConfigDict):
      why = 'defines no get_config(), which must return a ConfigDict'
      if callable(get_config):
        why = f'get_config() must return a ConfigDict, not {type(config).__name__}'
      raise _UsageError(f'--config={path!r}: {why}')
    return config.lock()


def _guard(main: Callable[[], int | None]) -> int | None:
  # The libraries log their search for devices, every file they write and every error they raise.
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
  except ModuleNotFoundError as error:
    message, code = installed.missing(error), USER_ERROR_EXIT_CODE
    if not message:
      raise
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
  """Defines --config and returns `config`."""
  config_flags.DEFINE_config_file(
    'config',
    None,
    'A file of configs/, and its argument if it takes one; --config.SECTION.FIELD=VALUE overrides '
    'a field (python -m moe_jax.config lists them all).',
    sys_argv=_WORDS,
  )
  flags.FLAGS['config'].parser = _ConfigParser()
  return config


def config() -> ml_collections.ConfigDict:
  """Returns the validated config of --config.

  Raises:
    UserError: if it was not given, or has a wrong field.
  """
  value = flags.FLAGS['config'].value
  if value is None:
    raise UserError('--config', None, 'must be given, for example configs/quickstart.py')
  config_lib.validate(value)
  return value


def overridden_fields() -> dict[str, Any]:
  """Returns the fields of the config that were given on the command line, with their defaults."""
  fields = config_flags.get_override_values(flags.FLAGS['config'])
  return {field: field_value(config_lib.SCHEMA, field).default for field in fields}


def define_path(name: str, text: str) -> flags.FlagHolder:
  """Defines a flag that is a path, None by default; `~` is the home folder."""
  return flags.DEFINE(arguments.PathParser(), name, None, text)


def define_source(name: str, text: str) -> flags.FlagHolder:
  """Defines a flag that is a source of text, as `data.name`, None by default."""
  return flags.DEFINE(arguments.SourceParser(), name, None, text)


def define_json_flag() -> flags.FlagHolder:
  """Defines --json, for what a command otherwise prints as text."""
  return flags.DEFINE_bool('json', False, 'Print one JSON document, and nothing else.')


def print_json(value: Any) -> None:
  """Prints a value as one JSON document; numbers that are not finite, which JSON lacks, as null."""
  show(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _finite(one) for name, one in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(one) for one in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def required(flag: flags.FlagHolder | flags.Flag) -> str:
  """Returns the value of a flag that must be given."""
  if not flag.value:
    raise UserError(f'--{flag.name}', flag.value, 'must be given')
  return flag.value
