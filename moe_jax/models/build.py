"""From a config to a task: the only file in which config fields become layer options.

`FAMILIES` names the families of models, each a function from a config to its `Task`;
`moe_jax.schema` lists the names for `model.family`. A family without experts needs
`moe.num_experts=0`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from jax.sharding import Mesh

from moe_jax import config as config_lib
from moe_jax.dispatch import DECODE
from moe_jax.errors import UserError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.decoder import Decoder, DecoderOptions
from moe_jax.models.language_model import LanguageModel
from moe_jax.models.task import Task

MODES = ('train', 'eval', 'decode')


def build_task(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  vocab_size: int,
  mode: str,
  batch_size: int = 1,
  *,
  returns_routing: bool = False,
) -> Task:
  """Returns the task of a config, of the family `model.family`; parameters are the same by mode.

  Args:
    config: validated.
    mesh: axes ('data', 'expert').
    vocab_size: V of the tokenizer.
    mode: `train` uses capacity_factor and the balance scopes of the config; `eval` uses
      eval_capacity_factor and one scope; `decode` never drops, reads
      only the experts that were selected, and has no gradient.
    batch_size: sequences in a (micro-)batch; `train` derives the balance scopes from it.
    returns_routing: whether a forward pass returns all that the routers computed for each token.

  Raises:
    UserError: if a model of the config cannot be decoded.
  """
  if mode not in MODES:
    raise ValueError(f'mode={mode!r}: must be one of {MODES}')
  family = FAMILIES[config.model.family]
  return family.make(config, mesh, vocab_size, mode, batch_size, returns_routing=returns_routing)


def _decoder(
  config: ml_collections.ConfigDict,
  mesh: Mesh,
  vocab_size: int,
  mode: str,
  batch_size: int,
  *,
  returns_routing: bool,
) -> LanguageModel:
  has_router = mode == 'decode' and config.moe.num_experts
  if has_router and not config_lib.router_options(config).decodes:
    raise UserError(
      'moe.evaluation',
      config.moe.evaluation,
      f'the run cannot be decoded: {config.moe.router} then looks at later tokens to choose for '
      'one',
    )
  model, moe = config.model, config.moe
  options = DecoderOptions(
    vocab_size=vocab_size,
    num_layers=model.num_layers,
    embed_dim=model.embed_dim,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads,
    head_dim=config_lib.head_dim(config),
    mlp_dim=model.mlp_dim,
    activation=model.activation,
    rope_theta=model.rope_theta,
    norm_epsilon=model.norm_epsilon,
    tied_embeddings=model.tied_embeddings,
    remat=model.remat,
    compute_dtype=model.compute_dtype,
    moe=_moe_options(config, mode, batch_size, returns_routing) if moe.num_experts else None,
    every=moe.every if moe.num_experts else 1,
    num_shared_experts=moe.num_shared_experts,
  )
  return LanguageModel(mesh, vocab_size, Decoder(options, mesh))


class Family(NamedTuple):
  """A family of models.

  Attributes:
    make: takes the arguments of `build_task`, `returns_routing` by keyword, and returns the task.
    plural: what its models are called, as in a methods section.
    shown: (field, 'text {}') of the sizes that such a section names.
  """

  make: Callable[..., Task]
  plural: str
  shown: tuple[tuple[str, str], ...] = ()


FAMILIES = {
  'decoder': Family(
    _decoder,
    'decoder-only Transformers',
    (
      ('model.num_layers', '{} blocks'),
      ('model.embed_dim', 'width {}'),
      ('model.num_heads', '{} heads'),
    ),
  )
}


def _moe_options(
  config: ml_collections.ConfigDict,
  mode: str,
  batch_size: int,
  returns_routing: bool,
) -> MoeOptions:
  moe = config.moe
  capacity_factor = {
    'train': moe.capacity_factor,
    'eval': moe.eval_capacity_factor,
    'decode': None,
  }[mode]
  if not config_lib.limits_slots(moe):
    capacity_factor = None
  choice = config_lib.router_options(config)
  return MoeOptions(
    router=moe.router,
    choice=dataclasses.replace(
      choice, training=mode == 'train', group_size=1 if mode == 'decode' else moe.group_size
    ),
    mlp_dim=moe.mlp_dim,
    activation=config.model.activation,
    capacity_factor=capacity_factor,
    jitter=moe.jitter,
    priority=moe.priority,
    balance_scopes=config_lib.balance_scopes(config, batch_size) if mode == 'train' else 1,
    balance_normalization=moe.balance_normalization,
    device_balance_parts=moe.device_balance_parts,
    dispatch=DECODE if mode == 'decode' else moe.dispatch,
    router_init_scale=moe.router_init_scale,
    exchange=moe.exchange,
    returns_routing=returns_routing,
  )
