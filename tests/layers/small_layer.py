"""A MoE layer of 16 sequences x 8 tokens and 8 experts: small, but enough for 8 devices."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.layers import moe_layer, moe_options
from moe_jax.routing import groups
from tests import oracle

WIDTH = 8
VOCAB_SIZE = 11
OPTIONS = moe_options.MoeOptions(
  router='top_k',
  choice=routing.ROUTERS['top_k'].options(num_experts=8, num_selected_experts=2),
  mlp_dim=8,
  activation='swiglu',
  capacity_factor=1.0,
  dispatch='gather',
  router_init_scale=0.1,
)


class Inputs(NamedTuple):
  x: jax.Array
  valid: jax.Array
  params: moe_options.MoeParams


def change(options, **changes):
  """Returns MoE options with changes, of the layer's own numbers or of its router's."""
  router = routing.ROUTERS[changes.get('router', options.router)]
  names = {field.name for field in dataclasses.fields(router.options)}
  before = dataclasses.asdict(changes.pop('choice', options.choice))
  numbers = {name: value for name, value in (before | changes).items() if name in names}
  choice = router.options(**numbers)
  changes = {name: value for name, value in changes.items() if name not in numbers}
  return dataclasses.replace(options, choice=choice, **changes)


def make_options(**changes):
  return change(OPTIONS, **changes)


def draw(options, batch=16, length=8, seed=0):
  """Random input whose last feature is 1, with padding, one sequence of it whole."""
  rng = np.random.default_rng(seed)
  columns = options.mlp_dim * (2 if options.activation in ('swiglu', 'geglu') else 1)
  x = rng.normal(size=(batch, length, WIDTH))
  x[..., -1] = 1
  valid = rng.random((batch, length)) < 0.85
  if batch > 1:
    valid[1] = False
  params = (
    rng.normal(size=(WIDTH, options.num_experts)),
    rng.normal(size=(options.num_experts, WIDTH, columns)) / 3,
    rng.normal(size=(options.num_experts, options.mlp_dim, WIDTH)) / 3,
  )
  as_float = [jnp.asarray(a, jnp.float32) for a in (x, *params)]
  return Inputs(as_float[0], jnp.asarray(valid), make_params(*as_float[1:]))


def make_params(router, w_in, w_out):
  return moe_options.MoeParams({'router': router}, w_in, w_out)


def info_of(valid):
  """Properties of the tokens for routers: an id each, and its position."""
  rows, length = valid.shape
  places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), valid.shape)
  ids = (places * 7 + jnp.arange(rows, dtype=jnp.int32)[:, None] * 3) % VOCAB_SIZE
  return moe_options.TokenInfo(jnp.asarray(valid), ids, places)


def probes(params, num_experts):
  """Experts in whose presence y[b, t, e] is expert e's weight times a constant: 0 if not kept."""
  return moe_options.MoeParams(
    router=params.router,
    w_in=jnp.zeros_like(params.w_in).at[:, -1].set(1.0),
    w_out=jnp.zeros_like(params.w_out).at[:, 0, :num_experts].set(jnp.eye(num_experts)),
  )


def group_keys(options, batch=16):
  return jax.random.split(jax.random.key(7), batch // options.group_size)


def auxiliary(sums, options):
  """The three losses, of comparable size."""
  return (
    routing.load_balancing_loss(sums, options.num_selected_experts)
    + 0.1 * routing.router_z_loss(sums)
    + routing.importance_loss(sums)
  )


def apply(inputs, mesh, options, deterministic=False):
  keys = group_keys(options, inputs.x.shape[0])
  info = info_of(inputs.valid)
  return moe_layer.moe_layer(
    inputs.x,
    info,
    inputs.params,
    state={},
    keys=keys,
    mesh=mesh,
    options=options,
    deterministic=deterministic,
  )[:2]


def expected(inputs, options, deterministic=False):
  """The oracle's layer, given the noise and the permutations that the group's keys stand for."""
  batch, length, _ = inputs.x.shape
  noise_keys, _, order_keys = groups.split_keys(group_keys(options, batch))
  size = length * options.group_size
  noise = None
  if options.jitter and not deterministic:
    ones = jnp.ones((len(noise_keys), size, WIDTH))
    noise = np.asarray(routing.jitter(ones, noise_keys, options.jitter))
  num_assignments = size * options.num_selected_experts
  permutations = [np.asarray(jax.random.permutation(key, num_assignments)) for key in order_keys]
  return oracle.layer(
    inputs.x,
    inputs.valid,
    inputs.params.router['router'],
    *inputs.params[1:],
    options,
    noise=noise,
    permutations=permutations,
  )


def kept_by_expert(layer, num_experts):
  """Mask [B, T, E] of the oracle: expert e got a slot for the token."""
  chosen = np.eye(num_experts, dtype=bool)[layer.expert_index]
  return (chosen & layer.keep[..., None]).any(axis=2)


def check_layer(inputs, mesh, options):
  """y, every sum and the keep-mask against the oracle."""
  y, sums = jax.jit(lambda inputs: apply(inputs, mesh, options))(inputs)
  layer = expected(inputs, options)
  np.testing.assert_allclose(y, layer.y, rtol=1e-4, atol=1e-5)
  for name, value in layer.sums.items():
    np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-5, atol=1e-6, err_msg=name)
