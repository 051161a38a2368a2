"""The words of a command line: checked, and completed, before anything slow is imported.

absl reads flags one by one, and the file of --config among them, which needs seconds of imports.
Everything that can be wrong with the words themselves is reported here first: unknown flags and
fields, values of the wrong type or out of bounds, flags given twice.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from moe_jax.errors import UserError, did_you_mean
from moe_jax.field_names import split_field
from moe_jax.fields import check_field
from moe_jax.schema import SCHEMA

CONFIG = 'config'
HELP = ('help', 'helpshort', 'h', '?')
# absl's own, for the flags of its libraries, too.
LONG_HELP = ('helpfull', 'helpxml')
# absl's words for true and false.
_PARSERS: dict[type, flags.ArgumentParser] = {
  bool: flags.BooleanParser(),
  int: flags.IntegerParser(),
  float: flags.FloatParser(),
  str: flags.ArgumentParser(),
}


class _Word(NamedTuple):
  """A flag as it was given; `value` is None where it has none."""

  name: str
  value: str | None

  def __str__(self):
    return f'--{self.name}' if self.value is None else f'--{self.name}={self.value}'


class PathParser(flags.ArgumentParser):
  """Parses a path: the shell leaves the `~` of --flag=~/folder to the command."""

  syntactic_help = 'a path'
  placeholder = 'PATH'

  def parse(self, argument: str) -> str:
    """Returns the path with a leading `~` replaced by the home folder."""
    try:
      argument.encode()
    except UnicodeEncodeError as error:
      # Checkpoints can't be written there, which is known only after the first steps.
      raise ValueError('must be a path in UTF-8') from error
    return expand_home(argument)


class SourceParser(PathParser):
  """Parses a source of text, as `data.name`; that of text:PATH is a path."""

  placeholder = 'SOURCE'


def expand_home(path: str) -> str:
  """Returns a path, or `text:PATH`, with a leading `~` replaced by the home folder.

  Raises:
    ValueError: if it names a user that does not exist.
  """
  kind, colon, rest = path.partition(':')
  if colon and kind == 'text':
    return f'text:{expand_home(rest)}'
  expanded = os.path.expanduser(path)
  if path.startswith('~') and expanded == path:
    raise ValueError('no such home folder')
  return expanded


def checked(words: Sequence[str], defined: Mapping[str, flags.Flag]) -> list[str]:
  """Returns the words of a command as --name=value, the config file before its overrides.

  Args:
    words: without the name of the command.
    defined: the flags that absl knows, by name.

  Raises:
    UserError: names the first word that is wrong.
  """
  config, overrides, others = [], [], []
  seen: dict[str, str | None] = {}
  for word in _split(_with_flag_files(words), defined):
    if word.name == CONFIG and CONFIG in defined:
      word = _Word(CONFIG, _checked_file(word.value))
      config.append(word)
    elif word.name.startswith(f'{CONFIG}.'):
      if CONFIG not in defined:
        raise UserError(f'--{word.name}', word.value, 'this command has no --config')
      _check_override(word)
      overrides.append(word)
    else:
      _check_flag(word, defined)
      others.append(word)
    repeats = word.name in defined and isinstance(defined[word.name], flags.MultiFlag)
    if word.name in seen and not repeats:
      name = word.name.removeprefix(f'{CONFIG}.')
      name = name if name != word.name else f'--{name}'
      raise UserError(name, word.value, f'given twice, first as {seen[word.name]!r}; give it once')
    seen[word.name] = word.value
  if overrides and not config:
    raise UserError('--config', None, f'must be given, for {overrides[0]} overrides a field of it')
  return [str(word) for word in (*config, *overrides, *others)]


def _with_flag_files(words: Sequence[str]) -> list[str]:
  """Returns the words with --flagfile replaced by those in the file."""
  try:
    return flags.FLAGS.read_flags_from_files(list(words), force_gnu=True)
  except (flags.Error, OSError, UnicodeDecodeError) as error:
    text = ' '.join(str(error).removeprefix('ERROR:: ').split())
    raise UserError(f'--flagfile: {text}') from error


def _split(words: Sequence[str], defined: Mapping[str, flags.Flag]) -> Iterator[_Word]:
  """Yields each flag with its value, which may be the next word; booleans say true or false."""
  rest = iter(words)
  for word in rest:
    if not word.startswith('-') or not word.strip('-'):
      raise UserError('argument', word, 'not understood; flags are --name=value')
    name, equals, value = word.removeprefix('-').removeprefix('-').partition('=')
    if equals:
      yield _Word(name, value)
    elif name.startswith('no') and _is_boolean(name[2:], defined):
      yield _Word(name[2:], 'false')
    elif _is_boolean(name, defined):
      yield _Word(name, 'true')
    elif name in defined or name.startswith(f'{CONFIG}.') or name == CONFIG:
      yield _Word(name, next(rest, None))
    else:
      yield _Word(name, None)


def _is_boolean(name: str, defined: Mapping[str, flags.Flag]) -> bool:
  if name.startswith(f'{CONFIG}.'):
    section, field = split_field(name.removeprefix(f'{CONFIG}.'))
    known = SCHEMA.get(section, {})
    return field in known and isinstance(known[field].default, bool)
  return name in (*HELP, *LONG_HELP) or (name in defined and bool(defined[name].boolean))


def _check_flag(word: _Word, defined: Mapping[str, flags.Flag]) -> None:
  name, value = word
  if name in (*HELP, *LONG_HELP):
    return
  if name not in defined:
    near = did_you_mean(name, [*defined, *HELP[:1]], '--')
    why = f'unknown flag{near or "; --help lists the flags"}'
    raise UserError(f'--{name}: {why}') if value is None else UserError(f'--{name}', value, why)
  if value is None:
    raise UserError(f'--{name}', None, 'must have a value: --name=value')
  parser = defined[name].parser
  try:
    parser.parse(value)
  except (ValueError, TypeError) as error:
    choices = getattr(parser, 'enum_values', None)
    if choices:
      allowed = f'must be one of {", ".join(choices)}{did_you_mean(value, choices)}'
    elif isinstance(parser, flags.BooleanParser):
      allowed = 'must be true or false'
    elif parser.syntactic_help and not isinstance(parser, PathParser):
      allowed = f'must be {parser.syntactic_help}'
    else:
      allowed = str(error)
    raise UserError(f'--{name}', value, allowed) from error


def _checked_file(value: str | None) -> str:
  """Returns the value of --config with its home folder; the file must be there."""
  if not value:
    raise UserError('--config', value, 'must be given, for example configs/quickstart.py')
  try:
    value = expand_home(value)
  except ValueError as error:
    raise UserError('--config', value, str(error)) from error
  path = value.partition(':')[0]
  # A pipe will do, too.
  if not os.path.exists(path) or os.path.isdir(path):
    check_file('--config', path)
  return value


def check_file(name: str, path: str) -> None:
  """Checks that a path is that of a file.

  Raises:
    UserError: names the flag or argument, and files of nearly that name.
  """
  if not os.path.isfile(path):
    raise UserError(name, path, 'is no file' if os.path.exists(path) else _nowhere(path))


def check_folder(name: str, path: str) -> None:
  """Checks that a path is that of a folder.

  Raises:
    UserError: names the flag or argument, and folders of nearly that name.
  """
  if not os.path.isdir(path):
    raise UserError(name, path, 'is no folder' if os.path.exists(path) else _nowhere(path))


def _nowhere(path: str) -> str:
  """Returns that a path does not exist, and what there is that differs in one of its last names."""
  missing = pathlib.Path(path)
  folder = missing.parent
  try:
    if folder.is_dir():
      there = [p for p in folder.iterdir() if p.suffix == missing.suffix]
    else:
      there = [p / missing.name for p in folder.parent.iterdir() if (p / missing.name).exists()]
  except OSError:
    there = []
  near = did_you_mean(str(missing), [str(p) for p in there if p.name[0] not in '._'])
  return f'does not exist{near}'


def _check_override(word: _Word) -> None:
  """Checks an override of a field of the config; the field must exist and its value fit."""
  name = word.name.removeprefix(f'{CONFIG}.')
  section, field = split_field(name)
  known = SCHEMA.get(section, {})
  if known and not field:
    raise UserError(name, word.value, f'a section; set one of its fields, {", ".join(known)}')
  if field not in known:
    raise UserError(name, word.value, f'unknown field{near_fields(name)}')
  if word.value is None:
    raise UserError(name, None, f'must have a value; {known[field].allowed}')
  value: Any = word.value
  kind = type(known[field].default)
  try:
    value = _PARSERS[kind].parse(value)
  except (ValueError, TypeError) as error:
    raise UserError(
      name, value, f'must be of type {kind.__name__}; {known[field].allowed}'
    ) from error
  check_field(name, value, known[field])


def near_fields(name: str) -> str:
  """Returns the fields that resemble an unknown one; all of its section where none does."""
  section, field = split_field(name)
  everywhere = [f'{s}.{f}' for s, fields in SCHEMA.items() for f in fields]
  same = [full for full in everywhere if split_field(full)[1] == (field or section)]
  if same:
    near = f'; did you mean {" or ".join(same)}?'
  elif not field:
    near = did_you_mean(section, [*SCHEMA, *(split_field(full)[1] for full in everywhere)])
  else:
    own = [full for full in everywhere if full.startswith(f'{section}.')]
    near = did_you_mean(name, own) or did_you_mean(name, everywhere)
  return near or f'; must be one of {", ".join(SCHEMA.get(section, SCHEMA))}'
