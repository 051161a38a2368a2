"""Layers of other libraries, on the weights, tokens and routing of ours, timed in the same rounds.

`grouped_mm` is `torch.nn.functional.grouped_mm` through the experts registry of transformers, which
drops nothing. Never the registry's eager loop: its backward pass is quadratic in E. It is compared
with a dense layer in torch, and with ours in milliseconds. torch and transformers are needed for
nothing else here. On the same GPU as JAX, set XLA_PYTHON_CLIENT_PREALLOCATE=false.

On CPUs torch's threads wait for each other after each matmul: on a busy machine its times are those
of the waits, many times too long. Believe them on a quiet machine only, whatever its A/A control
shows.
"""

import functools
import importlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.benchmark.harness.shape import Shape
from moe_jax.benchmark.harness.timing import is_invalid, milliseconds, ratio
from moe_jax.errors import UserError
from moe_jax.experts import GATED, activate
from moe_jax.layers.moe_options import MoeParams

GROUPED = 'grouped_mm'
DENSE, DENSE_COPY = 'torch dense', 'torch dense copy'
# How far outputs may be from the oracle's, as a share of its largest.
_TOLERANCE = {'float32': 1e-4, 'bfloat16': 3e-2}
_CHECKED_TOKENS = 8


def libraries() -> tuple[Any, Any, str]:
  """Returns torch, the module of transformers with the registry, and the versions of both.

  Raises:
    UserError: if one is not installed, or torch cannot run where JAX does.
  """
  found = []
  for name in ('torch', 'transformers'):
    try:
      found.append(importlib.import_module(name))
    except ModuleNotFoundError as error:
      if error.name != name:
        raise
      raise UserError('--peers', True, f'needs the package {name}: pip install {name}') from error
  torch, transformers = found
  platform = jax.devices()[0].platform
  if platform not in ('cpu', 'gpu') or (platform == 'gpu' and not torch.cuda.is_available()):
    raise UserError('--peers', True, f'torch {torch.__version__} cannot use this {platform}')
  if not hasattr(torch.nn.functional, GROUPED):
    raise UserError(
      '--peers', True, f'torch {torch.__version__} has no {GROUPED}: use 2.10 or newer'
    )
  versions = f'torch {torch.__version__}, transformers {transformers.__version__}'
  try:
    registry = importlib.import_module('transformers.integrations.moe')
  except ModuleNotFoundError as error:
    raise UserError(
      '--peers', True, f'transformers {transformers.__version__} has no registry of experts'
    ) from error
  return torch, registry, versions


def tokamax_ragged_dot() -> Callable[..., Array]:
  """Returns tokamax's `ragged_dot`, which has kernels of its own for GPUs and TPUs.

  Raises:
    UserError: if the package is not installed.
  """
  try:
    return importlib.import_module('tokamax').ragged_dot
  except ModuleNotFoundError as error:
    if error.name != 'tokamax':
      raise
    raise UserError('--arms', 'tokamax', 'needs the package: pip install tokamax') from error


def arms(
  shape: Shape,
  params: MoeParams,
  dense: tuple[Array, Array],
  tokens: Float[Array, 'S D'],
  expert_index: Int[Array, 'S K'],
  backward: bool,
) -> dict[str, Callable[[], Any]]:
  """Returns calls that run once and wait, warmed up: torch's dense layer twice, and `GROUPED`.

  As with ours, the backward pass gives the gradients of the sum of squares of the outputs for
  weights and tokens, and gates are equal. Weights are stored [E D F] like ours.

  Raises:
    UserError: from `libraries`.
    RuntimeError: if the outputs are not those of the selected experts.
  """
  torch, registry, _ = libraries()
  w_in, w_out, dense_in, dense_out, x = (
    torch.from_dlpack(array).detach().requires_grad_(backward)
    for array in (params.w_in, params.w_out, *dense, tokens)
  )
  index = torch.from_dlpack(expert_index).long()
  gates = torch.full(index.shape, 1 / index.shape[1], device=x.device)
  activate, act_fn = _activation(torch, shape.activation)
  experts = _experts(torch, registry, w_in, w_out, shape.activation, act_fn)

  def dense_layer():
    return activate(x @ dense_in) @ dense_out

  def grouped():
    return experts(x, index, gates)

  weights = [experts.first, experts.down_proj, x]
  calls = {
    DENSE: _call(torch, dense_layer, [dense_in, dense_out, x], backward),
    DENSE_COPY: _call(torch, dense_layer, [dense_in, dense_out, x], backward),
    GROUPED: _call(torch, grouped, weights, backward),
  }
  _check(grouped()[:_CHECKED_TOKENS].detach().float().cpu(), shape, params, tokens, expert_index)
  for call in calls.values():
    call()
  return calls


def summary(seconds: dict[str, list[float]], ours: Sequence[str]) -> dict[str, Any]:
  """Returns the part of a row about peers.

  Args:
    seconds: of all arms, by name.
    ours: the arms of this package to compare with `GROUPED`.

  Returns:
    versions, null (torch's dense layer / its copy), void, dense_milliseconds, eta_dense (torch's
    dense layer / `GROUPED`), milliseconds, and `ours`: {arm: time of `GROUPED` / time of the arm}.
  """
  null = ratio(seconds[DENSE], seconds[DENSE_COPY])
  return {
    'versions': libraries()[2],
    'null': null._asdict(),
    'void': is_invalid(null),
    'dense_milliseconds': milliseconds(seconds[DENSE]),
    'eta_dense': ratio(seconds[DENSE], seconds[GROUPED])._asdict(),
    'milliseconds': milliseconds(seconds[GROUPED]),
    'ours': {arm: ratio(seconds[GROUPED], seconds[arm])._asdict() for arm in ours},
  }


def _activation(torch: Any, activation: str) -> tuple[Callable, Callable]:
  """Returns hidden layer -> activated one as `experts.activate`, and the function within it."""
  functional = torch.nn.functional
  gelu = functools.partial(functional.gelu, approximate='tanh')
  functions = {
    'swiglu': functional.silu,
    'geglu': gelu,
    'gelu': gelu,
    'gelu_exact': functional.gelu,
    'relu': functional.relu,
  }
  function = functions[activation]
  if activation not in GATED:
    return function, function

  def gated(hidden):
    gate, value = hidden.chunk(2, dim=-1)
    return function(gate) * value

  return gated, function


def _experts(
  torch: Any, registry: Any, w_in: Any, w_out: Any, activation: str, act_fn: Callable
) -> Any:
  """Returns a module of experts that runs `GROUPED` of the registry."""

  class Experts(torch.nn.Module):
    """As the experts of a model in transformers; its own forward is the eager loop."""

    def __init__(self, config):
      super().__init__()
      self.num_experts = w_in.shape[0]
      self.first, self.down_proj = torch.nn.Parameter(w_in), torch.nn.Parameter(w_out)
      self.act_fn = act_fn
      if activation in GATED:
        self.gate_up_proj = self.first
      else:
        self.up_proj = self.first

    def forward(self, *_):
      raise RuntimeError(f'the registry of experts did not take {GROUPED}')

  decorate = registry.use_experts_implementation(is_transposed=True, has_gate=activation in GATED)
  return decorate(Experts)(types.SimpleNamespace(_experts_implementation=GROUPED))


def _call(torch: Any, layer: Callable, inputs: list[Any], backward: bool) -> Callable[[], Any]:
  """Returns a call that runs a layer once, or its gradients, and waits for the device."""
  wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None

  def call():
    if backward:
      result = torch.autograd.grad(layer().float().square().sum(), inputs)
    else:
      with torch.no_grad():
        result = layer()
    wait()
    return result

  return call


def _check(
  found: Any,
  shape: Shape,
  params: MoeParams,
  tokens: Float[Array, 'S D'],
  expert_index: Int[Array, 'S K'],
) -> None:
  """Compares the outputs of the first tokens with those of their experts, in NumPy."""
  wanted = np.zeros((len(found), shape.embed_dim))
  for token, experts in enumerate(np.asarray(expert_index[: len(found)])):
    for expert in experts:
      hidden = _wide(tokens[token]) @ _wide(params.w_in[expert])
      hidden = np.asarray(activate(jnp.asarray(hidden, jnp.float32), shape.activation))
      wanted[token] += hidden.astype(np.float64) @ _wide(params.w_out[expert]) / len(experts)
  off = np.max(np.abs(found.numpy() - wanted)) / np.max(np.abs(wanted))
  if not off <= _TOLERANCE[shape.dtype]:
    raise RuntimeError(f'{GROUPED}: outputs are off by {off:.1%} of the largest')


def _wide(array: Array) -> Float[np.ndarray, '...']:
  return np.asarray(array).astype(np.float64)
