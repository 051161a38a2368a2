"""Checks and times the MoE layer on an accelerator within ten minutes.

  .venv/bin/python launch/accelerator.py [--peers] [--minutes=10]

First y and all gradients of each dispatcher on the accelerator against one-hot products on the CPU,
in float32 at full precision, under a skewed router; a difference ends it with exit code 1. Then
what the product of the router costs in float32 and in bfloat16, and `moe_jax.benchmark dispatch` in
bfloat16 on the shapes below, until the time is up; --peers adds transformers' grouped_mm, which
needs torch and transformers.
"""

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Tokens, D, F, E (or several), K; the first four are layers of published models.
SHAPES = (
  (32_768, 2_048, 1_024, '64', 8),
  (32_768, 2_048, 768, '128', 8),
  (16_384, 4_096, 14_336, '8', 2),
  (32_768, 1_536, 256, '512', 8),
  (32_768, 1_024, 512, '8,64,256,1024', 8),
)
CASES = (('gather', 1.0), ('gather', None), ('dropless', 1.0), ('dropless', None))
TOLERANCE = 1e-5


def check() -> float:
  """Prints and returns the largest relative error (norm of the difference over the norm)."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from moe_jax.benchmark import layer
  from moe_jax.benchmark.arms import Shape, expert_weights
  from moe_jax.layers.moe import TokenInfo, moe_layer
  from moe_jax.parallel.mesh import make_mesh

  jax.config.update('jax_default_matmul_precision', 'highest')
  tokens, width, experts = 2048, 256, 16
  shape = Shape(tokens, width, 256, 2, 1.0, 'swiglu', 'float32')
  cpu, device = jax.devices('cpu')[0], jax.devices()[0]
  with jax.default_device(cpu):
    keys = jax.random.split(jax.random.key(3), 3)
    # The first feature is 3 in every token: expert 0 is asked for by most.
    router = (jax.random.normal(keys[1], (width, experts)) / 16).at[0, 0].set(1.0)
    params = expert_weights(keys[0], shape, experts)._replace(router={'router': router})
    x = jax.random.normal(keys[2], (1, tokens, width)).at[..., 0].set(3.0)
    places = jnp.zeros((1, tokens), jnp.int32)
    rest = (TokenInfo(jnp.ones((1, tokens), bool), places, places), jax.random.split(keys[2], 1))

  def result(on, name, factor):
    options = dataclasses.replace(layer.options_of(shape, experts, name), capacity_factor=factor)
    mesh = make_mesh(1, 1, [on])
    info, group_keys = jax.device_put(rest, on)

    def loss(params, x):
      y = moe_layer(x, info, params, {}, group_keys, mesh, options, True)[0]
      return jnp.sum(jnp.square(y)), y

    with jax.set_mesh(mesh):
      program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
      (_, y), gradients = program(*jax.device_put((params, x), on))
    return [np.asarray(leaf) for leaf in jax.tree.leaves((y, gradients))]

  worst = 0.0
  print(f'on {device.device_kind}, JAX {jax.__version__}')
  for name, factor in CASES:
    pairs = zip(result(device, name, factor), result(cpu, 'einsum', factor), strict=True)
    error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    worst = max(worst, error)
    print(f'{name}, capacity factor {factor}: relative error {error:.1e}', flush=True)
  return worst


def main() -> None:
  """Runs the check, then the benchmarks."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--peers', action='store_true')
  parser.add_argument('--minutes', type=float, default=10)
  arguments = parser.parse_args()
  end = time.monotonic() + 60 * arguments.minutes
  if not check() < TOLERANCE:
    sys.exit(f'error: the accelerator differs from the CPU by {TOLERANCE} or more')
  for command in commands(arguments.peers):
    print('python', ' '.join(command), flush=True)
    try:
      subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, timeout=max(1, end - time.monotonic())
      )
    except subprocess.TimeoutExpired:
      print('the time is up; what is missing above was not measured')
      return


def commands(peers: bool) -> list[list[str]]:
  """Returns the benchmarks in their order: the router's two products, then the shapes."""
  result = []
  for tokens, width, hidden, experts, selected in SHAPES:
    shape = [
      *('--dtype=bfloat16', f'--num_tokens={tokens}', f'--embed_dim={width}'),
      *(f'--mlp_dim={hidden}', f'--num_experts={experts}', f'--num_selected_experts={selected}'),
    ]
    if not result:
      for dtype in ('float32', 'bfloat16'):
        flags = ['--routers=top_k,loss_free', f'--router_dtype={dtype}']
        result.append(['-m', 'moe_jax.benchmark', 'router', *flags, *shape])
    flags = ['--routings=uniform', '--arms=gather,dropless,ragged_dot,copy']
    more = ['--peers'] if peers else []
    result.append(['-m', 'moe_jax.benchmark', 'dispatch', *flags, *shape, *more])
  return result


if __name__ == '__main__':
  main()
