"""The choices of papers, one file each, on a small model or on that of another config.

A preset must name every choice that implementations make silently; `make` refuses one that does
not. Each docstring names what the paper leaves open, and what differs here. All have one sequence
in a routing group, and one micro-batch: with more, `train.accumulation_scope` is a choice too.
"""

from typing import Any

from configs import debug, lm_small, quickstart
from moe_jax import routing
from moe_jax.errors import UserError, did_you_mean

_BASES = {'': debug, 'debug': debug, 'quickstart': quickstart, 'lm_small': lm_small}
# Of the field `moe`: all that decides where tokens go and what is added to the loss. What only some
# routers read, `Router.reads` names.
SILENT = (
  'router',
  'every',
  'num_selected_experts',
  'num_shared_experts',
  'group_size',
  'score',
  'softmax_order',
  'renormalize',
  'gate_scale',
  'jitter',
  'priority',
  'capacity_factor',
  'eval_capacity_factor',
  'dispatch',
  'balance_scope',
  'load_balancing_weight',
  'balance_normalization',
  'device_balance_weight',
  'router_z_weight',
  'importance_weight',
  'entropy_weight',
  'router_loss_weight',
  'layer_reduction',
  'router_dtype',
  'router_init_scale',
)


def make(base: str, *, activation: str = '', **choices: Any):
  """Returns a config with a paper's choices.

  Args:
    base: the argument of --config: '' or debug for seconds, quickstart, or lm_small.
    activation: `model.activation`, of the paper's experts; dense layers run it, too.
    **choices: fields of `moe`; each of `SILENT`, and what else the router reads.

  Raises:
    UserError: for another base.
    TypeError: if a choice is left open.
  """
  if base not in _BASES:
    known = ', '.join(name for name in _BASES if name)
    near = did_you_mean(base, _BASES)
    raise UserError('--config', base, f'the argument must be one of {known}{near}')
  own = routing.ROUTERS[choices['router']].reads if 'router' in choices else ()
  if not activation:
    raise TypeError('the preset leaves model.activation open')
  missing = [name for name in (*SILENT, *own) if name not in choices]
  if missing:
    raise TypeError(f'the preset leaves moe.{missing[0]} open')
  config = _BASES[base].get_config()
  if base in ('', 'debug'):
    config.moe.update(num_experts=8, mlp_dim=32)
    config.optim.update(learning_rate=5e-3, warmup_steps=10)
    config.train.update(num_steps=300, checkpoint_every=300, eval_every=0)
  config.model.activation = activation
  config.moe.update(choices)
  return config


def segmented(config: Any, parts: int):
  """Cuts each expert into parts: as many times the experts and the selected, narrower.

  Active parameters and FLOPs stay, but for the router's.

  Raises:
    UserError: if the parts do not divide the hidden units of an expert.

  Source: Dai et al. 2024, arXiv:2401.06066, sec. 3.1.
  """
  moe = config.moe
  if parts < 1 or moe.mlp_dim % parts:
    raise UserError('moe.mlp_dim', moe.mlp_dim, f'must be divisible into {parts} parts')
  moe.update(
    num_experts=moe.num_experts * parts,
    num_selected_experts=moe.num_selected_experts * parts,
    mlp_dim=moe.mlp_dim // parts,
  )
  return config
