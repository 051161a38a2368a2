"""The dense twin of another config: the same active FLOPs per token, no experts.

python -m moe_jax.train --config=configs/dense_matched.py --workdir=runs/dense_matched
python -m moe_jax.train --config=configs/dense_matched.py:lm_small --workdir=runs/lm_small_dense

Each MoE layer becomes a dense layer whose hidden units are those of the experts one token passes
(selected and shared). Only the router's own matmul, E / (3 K F) of the experts', is not replaced.
"""

from configs import debug, lm_small, quickstart
from moe_jax.errors import UserError, did_you_mean

_ORIGINALS = {'quickstart': quickstart, 'debug': debug, 'lm_small': lm_small}


def get_config(arg: str = 'quickstart'):
  """Returns the dense twin of the config that `arg` names."""
  if arg not in _ORIGINALS:
    allowed = f'the argument must be one of {", ".join(_ORIGINALS)}{did_you_mean(arg, _ORIGINALS)}'
    raise UserError('--config', arg, allowed)
  config = _ORIGINALS[arg].get_config()
  moe = config.moe
  if moe.every != 1:
    active = (moe.num_selected_experts + moe.num_shared_experts) * moe.mlp_dim
    if active != config.model.mlp_dim:
      raise UserError(
        '--config', arg, 'dense and MoE layers differ in active width; no one width matches'
      )
  config.model.mlp_dim = (moe.num_selected_experts + moe.num_shared_experts) * moe.mlp_dim
  moe.num_experts = 0
  return config
