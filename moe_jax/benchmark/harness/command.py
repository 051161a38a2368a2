"""The flags that several suites have, and the printing of rows.

Imports no JAX before rows are printed.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags

from moe_jax import cli, schema
from moe_jax.benchmark.harness import parsers
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.errors import UserError

FLAGS = flags.FLAGS

# Flags defined by functions of this module belong to the command that is run.
flags.disclaim_key_flags()


def add_flags() -> None:
  """Defines the flags of every suite."""
  flags.DEFINE_bool('json', False, 'Print one JSON object per row.')
  flags.DEFINE_integer('rounds', 9, 'Rounds of interleaved calls.', lower_bound=9)


def add_list(name: str, parser: parsers.ListOf, default: str, text: str) -> None:
  """Defines a flag that is a list."""
  flags.DEFINE(parser, name, default, text, serializer=flags.CsvListSerializer(','))


def add_layer_flags(num_experts: str, tokens: str = '') -> None:
  """Defines the sizes of the layer that a suite measures.

  Args:
    num_experts: values by default, joined by commas.
    tokens: the help of --num_tokens; without one, there is neither this flag nor
      --capacity_factor.
  """
  add_list('num_experts', parsers.numbers(1), num_experts, 'values of E, the number of experts.')
  if tokens:
    flags.DEFINE_integer('num_tokens', 4096, tokens, lower_bound=1)
  flags.DEFINE_integer('embed_dim', 512, 'D, of a token.', lower_bound=1)
  flags.DEFINE_integer('mlp_dim', 1024, 'F, hidden units of one expert.', lower_bound=1)
  flags.DEFINE_integer('num_selected_experts', 2, 'K, of a token.', lower_bound=1)
  if tokens:
    flags.DEFINE(parsers.PositiveNumber(), 'capacity_factor', 1.25, 'the same for every E.')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'of the matmuls.')
  flags.DEFINE_integer('seed', 0, 'of weights, inputs and orders.')


def add_activation_flag() -> None:
  """Defines --activation."""
  choices = schema.SCHEMA['model']['activation'].choices
  flags.DEFINE_enum('activation', 'swiglu', list(choices), 'of all arms.')


def add_tokens_per_expert_flag() -> None:
  """Defines --tokens_per_expert."""
  text = 'tokens for each expert, on average; 0 for num_tokens.'
  flags.DEFINE_integer('tokens_per_expert', 0, text, lower_bound=0)


def add_reuse_memory_flag() -> None:
  """Defines --reuse_memory."""
  flags.DEFINE_bool(
    'reuse_memory',
    False,
    'write results over those of the call before, instead of new memory; peers have their own.',
  )


def add_profile_flag() -> None:
  """Defines --profile."""
  cli.define_path('profile', 'directory for traces and tables of the time by part.')


def num_experts() -> list[int]:
  """Returns the values of E.

  Raises:
    UserError: if there are fewer experts than a token selects.
  """
  if min(FLAGS.num_experts) < FLAGS.num_selected_experts:
    allowed = f'must be numbers >= {FLAGS.num_selected_experts}, of --num_selected_experts'
    raise UserError('--num_experts', FLAGS.num_experts, allowed)
  return FLAGS.num_experts


def shape() -> Shape:
  """Returns the sizes of the layer; without --num_tokens those of one token."""
  has_tokens = 'num_tokens' in FLAGS
  return Shape(
    num_tokens=FLAGS.num_tokens if has_tokens else 1,
    embed_dim=FLAGS.embed_dim,
    mlp_dim=FLAGS.mlp_dim,
    num_selected_experts=FLAGS.num_selected_experts,
    capacity_factor=FLAGS.capacity_factor if has_tokens else 1.0,
    activation=FLAGS.activation,
    dtype=FLAGS.dtype,
  )


def tokens_per_expert() -> int:
  """Returns the value of --tokens_per_expert.

  Raises:
    UserError: if the number of all tokens is given, too.
  """
  if FLAGS.tokens_per_expert and FLAGS['num_tokens'].present:
    raise UserError('--num_tokens', FLAGS.num_tokens, 'is given by --tokens_per_expert; leave one')
  return FLAGS.tokens_per_expert


def profile() -> str:
  """Returns the directory of --profile, which is made; empty without one."""
  if FLAGS.profile is None:
    return ''
  from moe_jax import profiling

  profiling.check_directory('--profile', FLAGS.profile)
  return FLAGS.profile


def show(
  rows: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str], head: str = ''
) -> None:
  """Prints rows as they come, as JSON with --json, else as text.

  Args:
    rows: measured while they are read.
    line: returns the text of a row.
    head: printed first, above the text.
  """
  import jax

  if not FLAGS.json:
    cli.show(f'on {jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
    if head:
      cli.show(head)
  for row in rows:
    cli.show(json.dumps(row) if FLAGS.json else line(row) + _profile_text(row))


def _profile_text(row: dict[str, Any]) -> str:
  if 'profile' not in row:
    return ''
  from moe_jax import profiling

  return f'\n{profiling.as_text(row["profile"])}'
