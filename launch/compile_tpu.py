"""Compiles the MoE layer's gradient ahead of time for TPUs that are not there.

  pip install libtpu
  TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu .venv/bin/python launch/compile_tpu.py [--topology=v5e:2x4]

Prints for one chip and for all of them (as 2 x n/2 where 4 divides their number, else 1 x n) what
the compiler says of each dispatcher: temporary memory and floating-point operations of a chip,
exchanges and loops. Over several chips also with `moe.exchange=ragged`, where the platform has it;
the padded exchanges beside it are of the numbers of rows, and the rounds of `dropless`. Nothing
runs. With --topology= the program is for the devices of this machine.
"""

import argparse
import itertools
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from moe_jax.benchmark.harness.cases import options_of  # noqa: E402
from moe_jax.benchmark.harness.shape import Shape  # noqa: E402
from moe_jax.dispatch import why_not  # noqa: E402
from moe_jax.layers.moe_layer import moe_layer  # noqa: E402
from moe_jax.layers.moe_options import MoeParams, TokenInfo  # noqa: E402
from moe_jax.parallel.mesh import make_mesh  # noqa: E402

DISPATCHERS = ('gather', 'dropless')


def compiled(devices, data: int, ways: tuple[str, str], shape: Shape, num_experts: int, batch: int):
  """Returns the compiled gradient of the layer on a mesh of (data, the rest) devices.

  Args:
    devices: of the mesh.
    data: of them along the data axis.
    ways: the dispatcher and its exchange.
    shape: of the layer.
    num_experts: E.
    batch: sequences, each a routing group of `shape.num_tokens / batch` tokens.
  """
  mesh = make_mesh(data, len(devices) // data, devices)
  options = options_of(shape, num_experts, *ways)
  struct, width, hidden = jax.ShapeDtypeStruct, shape.embed_dim, shape.mlp_dim
  params = MoeParams(
    router={'router': struct((width, num_experts), jnp.float32)},
    w_in=struct((num_experts, width, 2 * hidden), jnp.float32),
    w_out=struct((num_experts, hidden, width), jnp.float32),
  )
  tokens = (batch, shape.num_tokens // batch)

  def loss(params, x):
    info = TokenInfo(jnp.ones(tokens, bool), *2 * (jnp.zeros(tokens, jnp.int32),))
    keys = jax.random.split(jax.random.key(0), batch)
    y = moe_layer(
      x, info, params, state={}, keys=keys, mesh=mesh, options=options, deterministic=True
    )[0]
    return jnp.sum(jnp.square(y.astype(jnp.float32)))

  x = struct((*tokens, width), jnp.dtype(shape.dtype))
  with jax.set_mesh(mesh):
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()


def lines(devices, shape: Shape, num_experts: int, batch: int):
  """Yields what is printed."""
  devices = list(devices)
  for number in dict.fromkeys((1, len(devices))):
    data = 2 if number % 4 == 0 else 1
    exchanges = ['padded']
    if number > data and why_not('ragged', devices[0].platform) is None:
      exchanges.append('ragged')
    for ways in itertools.product(DISPATCHERS, exchanges):
      program = compiled(devices[:number], data, ways, shape, num_experts, batch)
      text = program.as_text()
      padded, ragged = (
        len(re.findall(rf' {name}(?:-start)?\(', text))
        for name in ('all-to-all', 'ragged-all-to-all')
      )
      yield (
        f'{devices[0].device_kind}, mesh {data} x {number // data}, {" ".join(ways)}: '
        f'{program.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB temporary, '
        f'{program.cost_analysis()["flops"]:.3g} operations, '
        f'{padded} padded and {ragged} ragged exchanges, {text.count(" while(")} loops'
      )


def main() -> None:
  """Compiles for the topology."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--topology', default='v5e:2x4')
  topology = parser.parse_args().topology
  devices = jax.devices()
  if topology:
    try:
      devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except Exception as error:  # Of libtpu, whatever it raises.
      print(f'error: --topology={topology}: {" ".join(str(error).split())}', file=sys.stderr)
      sys.exit(2)
  shape = Shape(4096, 512, 1024, 2, 1.25, 'swiglu', 'bfloat16')
  for line in lines(devices, shape, 64, 8):
    print(line, flush=True)


if __name__ == '__main__':
  main()
