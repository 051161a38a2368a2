"""Hyperparameters of routers: each router declares its own, in its file.

A router file has one frozen dataclass `Options`: what its functions may read, each field with its
default, its meaning and its bounds. What several routers read is declared once, in a group here,
which their `Options` inherit. `moe_jax.schema` makes fields of `moe` of them all.

Without JAX, which takes seconds to import and which router files need: `declared` runs nothing of
them but `class Options` and constants before it.
"""

import ast
import dataclasses
import pathlib
from typing import Any

from moe_jax import fields
from moe_jax.fields import Field

FOLDER = pathlib.Path(__file__).parent / 'routing' / 'routers'
SCORES = ('softmax', 'sigmoid', 'sqrt_softplus')
SOFTMAX_ORDERS = ('before', 'after')
BIAS_UPDATES = ('sign', 'proportional', 'multiplicative', 'centred')


def hyperparameter(field: Field) -> Any:
  """Declares an attribute of `Options` as a field of the config."""
  return dataclasses.field(default=field.default, metadata={'field': field})


@dataclasses.dataclass(frozen=True)
class RouterOptions:
  """Options of every router, all that one without hyperparameters has.

  `moe_jax.schema` documents them; the layer and the plan read them, too. `capacity` is C of a
  routing group in the mode at hand, `training` False in evaluation and decoding, `group_size` the
  sequences in a group: token s of a group belongs to sequence s % group_size at position s //
  group_size.
  """

  num_experts: int
  num_selected_experts: int
  capacity: int = 1
  training: bool = True
  group_size: int = 1
  renormalize: str = 'before_drop'

  @property
  def decodes(self) -> bool:
    """True if evaluation selects for each token by itself, so that a text can be decoded."""
    return True

  @classmethod
  def example(cls, num_experts: int, num_selected_experts: int) -> dict[str, Any]:
    """Returns settings for benchmarks, where defaults are refused or differ from the paper."""
    del num_experts, num_selected_experts
    return {}


@dataclasses.dataclass(frozen=True)
class MatrixOptions(RouterOptions):
  """Of routers that multiply tokens with a matrix."""

  router_dtype: str = hyperparameter(
    fields.one_of(
      'float32',
      ('float32', 'bfloat16'),
      "Of the factors of the router's matmul, which is summed in float32; bfloat16 is faster on "
      'GPUs and selects other experts here and there (evaluate --compare_router_dtype).',
    )
  )


@dataclasses.dataclass(frozen=True)
class ScoreOptions(RouterOptions):
  """Of routers whose gates are one of several functions of the logits."""

  score: str = hyperparameter(fields.one_of('softmax', SCORES, 'What gates are read from.'))


@dataclasses.dataclass(frozen=True)
class SoftmaxOrderOptions(RouterOptions):
  """Of routers that take a softmax before or after they select."""

  softmax_order: str = hyperparameter(
    fields.one_of(
      'before',
      SOFTMAX_ORDERS,
      'Gates from the softmax over all experts (before selection) or over the K selected (after).',
    )
  )


@dataclasses.dataclass(frozen=True)
class GateScaleOptions(RouterOptions):
  """Of routers whose gates may be scaled."""

  gate_scale: float = hyperparameter(fields.positive(1.0, 'Multiplies the gates.'))


@dataclasses.dataclass(frozen=True)
class LearnedNoiseOptions(MatrixOptions):
  """Of routers with learned noise on their logits."""

  noise_floor: float = hyperparameter(
    fields.non_negative(0.0, 'Added to the softplus of the noise.')
  )


@dataclasses.dataclass(frozen=True)
class TopKOptions(MatrixOptions, ScoreOptions, SoftmaxOrderOptions, GateScaleOptions):
  """Of routers whose gates are those of the K largest logits."""


@dataclasses.dataclass(frozen=True)
class BiasRateOptions(RouterOptions):
  """Of routers with a selection bias. `bias_rate` is a traced scalar where trials are packed."""

  bias_rate: Any = hyperparameter(
    Field(
      0.001,
      'Size of a step of the selection bias.',
      'must be at least 1e-30 and at most 1000',
      lambda v: 1e-30 <= v <= 1000,
    )
  )


@dataclasses.dataclass(frozen=True)
class BiasOptions(BiasRateOptions):
  """Of routers whose selection bias follows the load."""

  bias_update: str = hyperparameter(
    fields.one_of('sign', BIAS_UPDATES, 'How the selection bias follows the load.')
  )


@dataclasses.dataclass(frozen=True)
class ExpertGroupOptions(RouterOptions):
  """Of routers that select groups of experts first."""

  num_expert_groups: int = hyperparameter(
    fields.at_least(1, 1, 'Equal groups of experts; divides num_experts.')
  )
  num_selected_groups: int = hyperparameter(
    fields.at_least(1, 1, 'Groups of experts a token may choose from.')
  )


COMMON_FIELDS = tuple(field.name for field in dataclasses.fields(RouterOptions))


def own_fields(options: type[RouterOptions]) -> dict[str, Field]:
  """Returns {name: field} of the hyperparameters that a class declares or inherits."""
  return {
    field.name: field.metadata['field']
    for field in dataclasses.fields(options)
    if field.name not in COMMON_FIELDS
  }


def router_names(folder: pathlib.Path = FOLDER) -> tuple[str, ...]:
  """Returns the names of all routers: those of the files in `routing/routers`."""
  return tuple(sorted(path.stem for path in folder.glob('*.py') if path.stem != '__init__'))


def declared(folder: pathlib.Path = FOLDER) -> dict[str, Field]:
  """Returns the hyperparameters of all routers by name, their meanings with who reads them.

  Raises:
    ValueError: if two router files declare one name.
  """
  found: dict[str, Field] = {}
  readers: dict[str, list[str]] = {}
  routers = router_names(folder)
  for router in routers:
    options = _options_class((folder / f'{router}.py').read_text(encoding='utf-8'), router)
    for name, field in own_fields(options).items():
      if found.setdefault(name, field) is not field:
        raise ValueError(
          f'{name} is declared in routing/routers/{readers[name][0]}.py and in {router}.py; '
          'declare it once, in a group of moe_jax/router_options.py'
        )
      readers.setdefault(name, []).append(router)
  return {
    name: field._replace(meaning=_with_readers(field.meaning, readers[name], routers))
    for name, field in found.items()
  }


def _options_class(source: str, router: str) -> type[RouterOptions]:
  """Runs `class Options` of a router file, and constants before it; the common one without it."""
  # What a declaration may use: the groups above, fields, and literals of its own file.
  names: dict[str, Any] = {**globals(), '__name__': f'moe_jax.routing.routers.{router}'}
  for node in ast.parse(source).body:
    is_class = isinstance(node, ast.ClassDef) and node.name == 'Options'
    if is_class or _is_constant(node):
      exec(compile(ast.Module([node], type_ignores=[]), f'{router}.py', 'exec'), names)
    if is_class:
      return names['Options']
  return RouterOptions


def _is_constant(node: ast.stmt) -> bool:
  """True if a statement assigns a literal to a name."""
  if not isinstance(node, ast.Assign):
    return False
  try:
    ast.literal_eval(node.value)
  except ValueError:
    return False
  return all(isinstance(target, ast.Name) for target in node.targets)


def _with_readers(meaning: str, readers: list[str], routers: tuple[str, ...]) -> str:
  """Names the routers that read a field, or those that do not if they are fewer."""
  others = [name for name in routers if name not in readers]
  if len(readers) <= len(others):
    return f'{", ".join(readers)}: {meaning[0].lower()}{meaning[1:]}'
  return f'{meaning} Not of {", ".join(others)}.'
