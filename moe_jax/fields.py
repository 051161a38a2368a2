"""Fields of a config: a default, a meaning and what is allowed.

`moe_jax.schema` makes sections of them, and each router declares its own with them. Without JAX.
"""

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from moe_jax.errors import UserError, did_you_mean


class Field(NamedTuple):
  """One field: its default (whose type is the field's type), meaning, and what is allowed.

  `choices` are the values of a field of names, else ().
  """

  default: Any
  meaning: str
  allowed: str
  check: Callable[[Any], bool]
  choices: tuple[str, ...] = ()


def check_field(name: str, value: Any, field: Field) -> None:
  """Checks one value by itself.

  Args:
    name: 'section.field', for the message.
    value: of that field.
    field: of the schema.

  Raises:
    UserError: if it is of the wrong type or out of bounds.
  """
  kind = type(field.default)
  # bool is an int in Python, and an int serves as a float; nothing else crosses types.
  right_type = type(value) is kind or (kind is float and type(value) is int)
  if not right_type:
    raise UserError(name, value, f'must be of type {kind.__name__}; {field.allowed}')
  if not field.check(value):
    near = did_you_mean(value, field.choices) if field.choices else ''
    raise UserError(name, value, f'{field.allowed}{near}')


def one_of(default: str, choices: tuple[str, ...], meaning: str) -> Field:
  """Returns a field that is one of several names."""
  allowed = f'must be one of {", ".join(choices)}'
  return Field(default, meaning, allowed, lambda v: v in choices, choices)


def at_least(default: int, low: int, meaning: str, high: int = 2**31 - 1) -> Field:
  """Returns a field that is an integer in low..high."""
  return Field(default, meaning, f'must be an integer in {low}..{high}', lambda v: low <= v <= high)


def _as_float32(value: float) -> float:
  """Returns a number as programs hold it: inf beyond float32, 0 below its normal numbers."""
  try:
    rounded = struct.unpack('<f', struct.pack('<f', value))[0]
  except OverflowError:
    return math.copysign(math.inf, value)
  return 0.0 if abs(rounded) < 2.0**-126 else rounded


def _is_number(value: float) -> bool:
  """True if a number is finite in float32, and 0 there only if it is 0."""
  return math.isfinite(_as_float32(value)) and (_as_float32(value) != 0 or value == 0)


def number(
  default: float, meaning: str, allowed: str, check: Callable[[float], bool] = lambda v: True
) -> Field:
  """Returns a field that is a float32 number; `check` gets it rounded to float32."""
  allowed = f'{allowed}, in float32'
  return Field(default, meaning, allowed, lambda v: _is_number(v) and check(_as_float32(v)))


def non_negative(default: float, meaning: str) -> Field:
  """Returns a field that is a float32 number, 0 or above."""
  return number(default, meaning, 'must be a finite number >= 0', lambda v: v >= 0)


def positive(default: float, meaning: str) -> Field:
  """Returns a field that is a float32 number above 0."""
  return number(default, meaning, 'must be a finite number > 0', lambda v: v > 0)


def share(default: float, meaning: str) -> Field:
  """Returns a field that is a float32 number in 0..1, 1 excluded."""
  return number(default, meaning, 'must be at least 0 and below 1', lambda v: 0 <= v < 1)


def held_out(default: float, meaning: str) -> Field:
  """Returns a field that is a share below one half."""
  return Field(default, meaning, 'must be at least 0 and below 0.5', lambda v: 0 <= v < 0.5)


def anything(default: Any, meaning: str) -> Field:
  """Returns a field of text, or true or false, without bounds."""
  kind = {bool: 'true or false', str: 'text'}[type(default)]
  return Field(default, meaning, f'must be {kind}', lambda v: True)
