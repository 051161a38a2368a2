"""Full names of config fields, `section.field`."""

from collections.abc import Mapping
from typing import Any

import ml_collections


def split_field(field: str) -> tuple[str, str]:
  """Returns section and name of a field; the name is '' for a section itself."""
  section, _, name = field.partition('.')
  return section, name


def field_value(sections: Mapping[str, Any] | ml_collections.ConfigDict, field: str) -> Any:
  """Returns the entry of a field in sections, those of a config or of the schema.

  Raises:
    KeyError: if there is no such field.
  """
  section, name = split_field(field)
  return sections[section][name]
