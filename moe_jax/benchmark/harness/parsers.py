"""Parsers of the flags' values: a wrong one is refused before any import."""

import math
from collections.abc import Callable, Collection
from typing import Any

from absl import flags

from moe_jax.errors import did_you_mean


class PositiveNumber(flags.FloatParser):
  """Parses a finite number above 0."""

  def __init__(self) -> None:
    super().__init__()
    self.syntactic_help = 'above 0 and finite'

  def convert(self, argument: float | str) -> float:
    """Returns the number.

    Raises:
      ValueError: if it is none, or not in bounds.
    """
    value = super().convert(argument)
    if not 0 < value < math.inf:
      raise ValueError(self.syntactic_help)
    return value


class ListOf(flags.ListParser):
  """Parses a list with at least one entry and no entry twice."""

  def __init__(self, convert: Callable[[str], Any], allowed: str) -> None:
    """Creates a parser.

    Args:
      convert: returns the value of an entry, or raises ValueError.
      allowed: completes the sentence `must be ...`.
    """
    super().__init__()
    self.syntactic_help = ''  # Errors say it themselves.
    self._convert, self._allowed = convert, allowed

  def parse(self, argument: str | list[Any]) -> list[Any]:
    """Returns the values.

    Raises:
      ValueError: names the first entry that is wrong.
    """
    values = []
    for word in map(str, super().parse(argument)):
      try:
        value = self._convert(word)
      except ValueError as error:
        raise ValueError(f'must be {self._allowed}{error}') from error
      if value in values:
        raise ValueError(f'names {value} more than once')
      values.append(value)
    if not values:
      raise ValueError(f'must be {self._allowed}')
    return values


def numbers(lowest: int) -> ListOf:
  """Returns a parser of integers that are at least `lowest`."""

  def convert(word: str) -> int:
    if not (word.isdecimal() and int(word) >= lowest):
      raise ValueError
    return int(word)

  return ListOf(convert, f'numbers >= {lowest}')


def names(known: Collection[str]) -> ListOf:
  """Returns a parser of some of the known names."""

  def convert(word: str) -> str:
    if word not in known:
      raise ValueError(did_you_mean(word, known))
    return word

  return ListOf(convert, f'of {", ".join(known)}')
