"""Kinds of the fields of a manifest: what a reader may rely on once it is read."""

from collections.abc import Callable
from typing import Any

from moe_jax.field_names import split_field

# The file in the directory of a run that the process which writes it holds locked.
LOCK = '.lock'
_TEXT, _COUNT, _OBJECT, _NUMBERS = 'text', 'a count', 'an object', 'an object of numbers'
# Kinds of the fields. Those of `NEEDED` must be there; others came later, or some runs lack them.
KINDS = {
  'config': 'sections of fields',
  'status': _TEXT,
  'step': _COUNT,
  'vocab_size': _COUNT,
  'data': _OBJECT,
  'data.fingerprint': _TEXT,
  'data.tokenizer': _TEXT,
  'data.name': _TEXT,
  'data.domains': 'a list of texts',
  'mesh': _NUMBERS,
  'devices': _OBJECT,
  'devices.count': _COUNT,
  'devices.processes': _COUNT,
  'devices.platform': _TEXT,
  'devices.kind': _TEXT,
  'devices.matmul_precision': _TEXT,
  'moe_jax': 'text or null',
  'git_commit': 'text or null',
  'git_dirty': 'true, false or null',
  'python': _TEXT,
  'packages': _OBJECT,
  'seed': _COUNT,
  'parameters': _NUMBERS,
  'training_flops_per_token': 'a number',
  'causal': 'true or false',
  'routing': _NUMBERS,
  'resumed_from': 'a list of objects',
  'ancestry': 'a list of objects',
  'lengthened': 'a list of objects',
  'logging': 'a list of three counts each',
  'seconds': _NUMBERS,
  'compilations': _COUNT,
  'pack': _COUNT,
  'packed_with': _COUNT,
  'cause': _TEXT,
}
NEEDED = ('config', 'status', 'step', 'vocab_size', 'data', 'data.fingerprint', 'mesh', 'devices')


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
  return _is_number(value) and isinstance(value, int) and value >= 0


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
  return isinstance(value, list) and all(map(of, value))


def _is_object(value: Any, of: Callable[[Any], bool] = lambda value: True) -> bool:
  return isinstance(value, dict) and all(map(of, value.values()))


_IS: dict[str, Callable[[Any], bool]] = {
  _TEXT: lambda value: isinstance(value, str),
  'text or null': lambda value: value is None or isinstance(value, str),
  'a number': _is_number,
  _COUNT: _is_count,
  'true or false': lambda value: isinstance(value, bool),
  'true, false or null': lambda value: value is None or isinstance(value, bool),
  'a list of texts': lambda value: _is_list(value, lambda x: isinstance(x, str)),
  'a list of objects': lambda value: _is_list(value, _is_object),
  'a list of three counts each': lambda value: _is_list(
    value, lambda x: _is_list(x, _is_count) and len(x) == 3
  ),
  _OBJECT: _is_object,
  _NUMBERS: lambda value: _is_object(value, _is_number),
  'sections of fields': lambda value: _is_object(value, _is_object),
}


def problem_of(manifest: Any) -> str:
  """Returns which field of a manifest is missing or of the wrong kind; '' if none is."""
  if not isinstance(manifest, dict):
    return 'it is not an object'
  for field, kind in KINDS.items():
    section, name = split_field(field)
    holder = manifest.get(section, {}) if name else manifest
    key = name or section
    if key not in holder:
      if field in NEEDED:
        return f'it lacks {field}'
    elif not _IS[kind](holder[key]):
      return f'{field} is not {kind}'
  return ''
