"""The MoE layer's outputs and gradients on an accelerator against those of the CPU."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmark.harness.cases import expert_weights, options_of
from moe_jax.benchmark.harness.peers import libraries
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.errors import UserError
from moe_jax.layers.moe_layer import moe_layer
from moe_jax.layers.moe_options import TokenInfo
from moe_jax.parallel.mesh import make_mesh

# Dispatcher and capacity factor.
CASES = (('gather', 1.0), ('gather', None), ('dropless', 1.0), ('dropless', None))
TOLERANCE = 1e-5


def check() -> float:
  """Prints and returns the largest relative error (norm of the difference over the norm)."""
  tokens, width, experts = 2048, 256, 16
  shape = Shape(tokens, width, 256, 2, 1.0, 'swiglu', 'float32')
  cpu, device = jax.devices('cpu')[0], jax.devices()[0]
  with jax.default_device(cpu):
    keys = jax.random.split(jax.random.key(3), 3)
    # The first feature is 3 in every token: most select expert 0.
    router = (jax.random.normal(keys[1], (width, experts)) / 16).at[0, 0].set(1.0)
    params = expert_weights(keys[0], shape, experts)._replace(router={'router': router})
    x = jax.random.normal(keys[2], (1, tokens, width)).at[..., 0].set(3.0)
    positions = jnp.zeros((1, tokens), jnp.int32)
    rest = (
      TokenInfo(jnp.ones((1, tokens), bool), positions, positions),
      jax.random.split(keys[2], 1),
    )

  def result(on, name, factor):
    options = dataclasses.replace(options_of(shape, experts, name), capacity_factor=factor)
    mesh = make_mesh(1, 1, [on])
    info, group_keys = jax.device_put(rest, on)

    def loss(params, x):
      y = moe_layer(
        x, info, params, state={}, keys=group_keys, mesh=mesh, options=options, deterministic=True
      )[0]
      return jnp.sum(jnp.square(y)), y

    with jax.default_matmul_precision('highest'), jax.set_mesh(mesh):
      program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
      (_, y), gradients = program(*jax.device_put((params, x), on))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]

  worst = []
  print(f'on {device.device_kind}, JAX {jax.__version__}')
  for name, factor in CASES:
    pairs = zip(result(device, name, factor), result(cpu, 'einsum', factor), strict=True)
    # Python's max would lose a NaN, np.max does not.
    error = np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])
    worst.append(error)
    print(f'{name}, capacity factor {factor}: relative error {error:.1e}', flush=True)
  return float(np.max(worst))


def main(*, on_cpu: bool, peers: bool) -> None:
  """Checks, in a process of its own: JAX keeps the memory of a GPU as long as its process lives.

  Args:
    on_cpu: allows to run it without an accelerator.
    peers: their packages must be there.

  Raises:
    UserError: if there is no accelerator, or a package of the peers is missing.
  """
  if not on_cpu and jax.default_backend() == 'cpu':
    why = 'no accelerator is here; --smaller=32 tries the script without one'
    raise UserError('devices', 'cpu', why)
  if peers:
    libraries()
  if not check() < TOLERANCE:
    sys.exit(f'error: the accelerator differs from the CPU by {TOLERANCE} or more')
