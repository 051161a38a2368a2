"""Computation of the experts: two matmuls with an activation between them. Plain JAX.

Which implementation runs when (`implementations.py` decides, and nothing else reads the platform):

  platform     in          condition                              implementation
  GPU, TPU     training    always                                 `batched`: all experts at once
  CPU          training    weights below `LEAST_WEIGHTS`          `batched`
  CPU          training    filled rows of each expert are known   `cpu.run_filled`: only those rows
  CPU          training    many experts, few rows                 `cpu.matmul`: one expert at a time
  CPU          training    otherwise                              `batched`
  GPU, TPU     decoding    fewer assignments than experts         `decode`: weights are gathered
  any          decoding    otherwise                              `decode`: loop over filled blocks

XLA on CPUs runs a batched matmul of few rows with many large matrices at a fraction of the speed of
a plain one, hence the CPU paths. `MOE_JAX_CPU_EXPERTS=off` switches them off: a CPU then runs what
the other platforms run, with the same results up to rounding.
"""

from moe_jax.experts.activations import ACTIVATIONS, GATED, activate, hidden_dim
from moe_jax.experts.decode import run_blocks
from moe_jax.experts.implementations import run_experts, should_pack

__all__ = [
  'ACTIVATIONS',
  'GATED',
  'activate',
  'hidden_dim',
  'run_blocks',
  'run_experts',
  'should_pack',
]
