"""Decoding: a batch of single tokens, each of which meets all experts and selects few.

Two levels. `layer`: only the experts, under a uniform random routing given beforehand, each
implementation against a dense layer of the same active FLOPs. `model`: whole
decoding steps with router, attention and cache, against a dense model of the same active FLOPs. A
layer measured by itself finds its weights in the cache of the CPU if they fit; in a model they come
from memory.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import dispatch as dispatch_lib
from moe_jax import routing
from moe_jax.benchmark.harness.cases import dense_of, dense_weights, expert_weights, options_of
from moe_jax.benchmark.harness.routings import choose
from moe_jax.benchmark.harness.shape import Shape
from moe_jax.benchmark.harness.timing import (
  Compiled,
  compile_arm,
  is_invalid,
  measure,
  profiled,
  ratio,
)
from moe_jax.benchmark.suites.dispatch_rows import layer_of
from moe_jax.dispatch import decode_blocks
from moe_jax.experts import hidden_dim
from moe_jax.experts.decode import implementation
from moe_jax.models.decoder import Decoder, DecoderOptions
from moe_jax.models.generate import Rows, Sampling, continue_rows
from moe_jax.models.language_model import LanguageModel
from moe_jax.parallel.mesh import make_mesh
from moe_jax.routing.plan import Plan
from moe_jax.train.state import init_params

# decode: as `moe_jax.generate` runs the experts. gather: the weights of each assignment's expert
# copied, two batched matmuls. one_by_one: a loop over blocks of one row. grouped: a loop over
# blocks of the mean load and more. slots: a slot for every token at every expert.
IMPLEMENTATIONS = ('decode', 'gather', 'one_by_one', 'grouped', 'slots')
# There are E slots for each token, and gathering copies weights: beyond these not measured.
MOST_SLOTS, MOST_BYTES = 4096, 4e9
# Of the model: tokens drawn in one call, tokens in the cache before, vocabulary, width of a head.
STEPS, CONTEXT, VOCAB_SIZE, HEAD_DIM = 8, 128, 1024, 64
# That each arm of the layer runs in a round: one call may take a millisecond.
LEAST_SECONDS = 0.1


def rows(
  shape: Shape,
  *,
  batches: Sequence[int],
  num_experts: Sequence[int],
  num_layers: int,
  rounds: int,
  seed: int,
  profile: str = '',
) -> Iterator[dict[str, Any]]:
  """Measures each number of experts and each batch on one device, the layer and the model.

  Args:
    shape: of all rows; its number of tokens and its capacity factor are not read.
    batches: sequences that are decoded together.
    num_experts: values of E.
    num_layers: of the model; 0 leaves it out.
    rounds: of interleaved calls.
    seed: of weights, routings and orders.
    profile: directory for a trace of each row's arm `decode`; empty for none.

  Yields:
    level, batch, num_experts, way (what `decode` is), rows_in_block, experts_chosen (different
    ones of a layer; None for the model), null, void, `arms`: {name: eta_dense (time of dense / time
    of the arm), tokens_per_second, weight_bytes (of the experts that one layer reads in a step, a
    block at a time; None where the routing is not known), compile_seconds, temporary_bytes}, and
    `not_measured`: {name: why}, and with `profile` the table of the time of `decode` by part.
    `dense` is among the arms.
  """
  for experts in num_experts:
    for batch in batches:
      sized = shape._replace(num_tokens=batch)
      yield _layer_row(sized, experts, rounds, seed, profile)
      if num_layers:
        yield _model_row(sized, experts, num_layers, rounds, seed, profile)


def _layer_row(
  shape: Shape, num_experts: int, rounds: int, seed: int, profile: str
) -> dict[str, Any]:
  plan = plan_of(shape, num_experts, seed)
  keys = jax.random.split(jax.random.key(seed), 3)
  dtype = jnp.dtype(shape.dtype)
  tokens = jax.random.normal(keys[0], (shape.num_tokens, 1, shape.embed_dim), dtype)
  params = expert_weights(keys[1], shape, num_experts)
  dense = dense_weights(keys[2], shape)
  dense_layer = lambda weights, x: dense_of(weights, x, shape.activation)  # noqa: E731
  compiled = {name: compile_arm(dense_layer, dense, tokens) for name in ('dense', 'dense copy')}
  not_measured = {}
  for name in IMPLEMENTATIONS:
    why = _too_much(name, shape, num_experts)
    if why:
      not_measured[name] = why
    else:
      arm = arm_of(name, shape, num_experts)
      compiled[name] = compile_arm(arm, params, tokens, plan)
  calls = {name: arm.call for name, arm in compiled.items()}
  seconds = measure(calls, rounds, seed, LEAST_SECONDS)
  loads = np.bincount(np.asarray(plan.expert_index).ravel(), minlength=num_experts)
  weight_bytes = {name: blocks_of(name, loads, shape) * bytes_of_expert(shape) for name in compiled}
  return _row('layer', shape, num_experts, seconds) | {
    'experts_chosen': int((loads > 0).sum()),
    'arms': _arms(compiled, seconds, shape.num_tokens, weight_bytes),
    'not_measured': not_measured,
    **profiled(compiled['decode'], profile, f'E{num_experts}-batch{shape.num_tokens}-layer'),
  }


def _model_row(
  shape: Shape, num_experts: int, num_layers: int, rounds: int, seed: int, profile: str
) -> dict[str, Any]:
  mesh = make_mesh(1, 1, jax.devices()[:1])
  not_measured = {}
  with jax.set_mesh(mesh):
    dense = _model_arm(decoder_of(shape, 0, num_layers, '', mesh), shape, seed)
    compiled = {'dense': dense, 'dense copy': dense}
    for name, dispatcher in (('decode', dispatch_lib.DECODE), ('slots', 'gather')):
      why = _too_much(name, shape, num_experts)
      if why:
        not_measured[name] = why
        continue
      model = decoder_of(shape, num_experts, num_layers, dispatcher, mesh)
      compiled[name] = _model_arm(model, shape, seed)
    seconds = measure({name: arm.call for name, arm in compiled.items()}, rounds, seed)
    name = f'E{num_experts}-batch{shape.num_tokens}-model'
    table = profiled(compiled['decode'], profile, name)
  return _row('model', shape, num_experts, seconds) | {
    'experts_chosen': None,
    'arms': _arms(compiled, seconds, shape.num_tokens * STEPS, {}),
    'not_measured': not_measured,
    **table,
  }


def _row(
  level: str, shape: Shape, num_experts: int, seconds: dict[str, list[float]]
) -> dict[str, Any]:
  total = shape.num_tokens * shape.num_selected_experts
  null = ratio(seconds['dense'], seconds['dense copy'])
  return {
    'level': level,
    'batch': shape.num_tokens,
    'num_experts': num_experts,
    'way': implementation(total, num_experts, jax.devices()[0].platform),
    'rows_in_block': decode_blocks.rows_in_block(total, num_experts),
    'null': null._asdict(),
    'void': is_invalid(null),
  }


def _arms(
  compiled: dict[str, Compiled],
  seconds: dict[str, list[float]],
  num_tokens: int,
  weight_bytes: dict[str, int],
) -> dict[str, Any]:
  return {
    name: {
      'eta_dense': ratio(seconds['dense'], seconds[name])._asdict(),
      'tokens_per_second': num_tokens / float(np.median(seconds[name])),
      'weight_bytes': weight_bytes.get(name),
      'compile_seconds': arm.compile_seconds,
      'temporary_bytes': arm.temporary_bytes,
    }
    for name, arm in compiled.items()
    if name != 'dense copy'
  }


def plan_of(shape: Shape, num_experts: int, seed: int) -> Plan:
  """Returns the plan of a step: each sequence a group of one token, experts uniformly at random."""
  chosen = jnp.asarray(choose('uniform', shape, num_experts, seed))[:, None]
  nothing = jnp.zeros((*chosen.shape[:2], num_experts))
  gates = jnp.full(chosen.shape, 1 / shape.num_selected_experts)
  choice = routing.Choice(chosen, gates, jnp.ones(chosen.shape, bool), nothing, nothing, {})
  keys = jax.random.split(jax.random.key(0), len(chosen))
  return routing.make_plan(choice, jnp.ones(chosen.shape[:2], bool), keys, capacity=1)


def arm_of(name: str, shape: Shape, num_experts: int) -> Callable:
  """Returns (weights, tokens [B 1 D], plan) -> outputs [B 1 D] of one of `IMPLEMENTATIONS`."""
  if name == 'slots':
    return layer_of('gather', shape.activation)
  total = shape.num_tokens * shape.num_selected_experts
  how: dict[str, Any] = {
    'decode': {},
    'gather': {'which': 'gather', 'num_rows': 1},
    'one_by_one': {'which': 'loop', 'num_rows': 1},
    'grouped': {'which': 'loop', 'num_rows': _grouped_rows(total, num_experts)},
  }[name]
  platform = jax.devices()[0].platform

  def arm(params, tokens, plan):
    weights = (params.w_in, params.w_out)
    return dispatch_lib.run_decode(
      tokens, plan, weights, activation=shape.activation, platform=platform, **how
    )

  return arm


def _grouped_rows(num_assignments: int, num_experts: int) -> int:
  return decode_blocks.rows_in_block(max(num_assignments, num_experts), num_experts)


def blocks_of(name: str, loads: np.ndarray, shape: Shape) -> int:
  """Returns how often an arm reads the weights of an expert, for the loads of a routing."""
  total, experts = int(loads.sum()), len(loads)
  rows_of = {
    'decode': decode_blocks.rows_in_block(total, experts),
    'gather': 1,
    'one_by_one': 1,
    'grouped': _grouped_rows(total, experts),
  }
  if name in rows_of:
    return int(np.sum(-(-loads // rows_of[name])))
  return experts if name == 'slots' else shape.num_selected_experts


def bytes_of_expert(shape: Shape) -> int:
  """Returns the bytes of one expert's weights, which are stored in float32."""
  columns = hidden_dim(shape.mlp_dim, shape.activation) + shape.mlp_dim
  return shape.embed_dim * columns * 4


def _too_much(name: str, shape: Shape, num_experts: int) -> str:
  """Returns why an arm is not measured; empty if it is."""
  if name == 'slots' and num_experts * shape.num_tokens > MOST_SLOTS:
    return f'{num_experts * shape.num_tokens:,} slots for {shape.num_tokens} tokens'
  copied = shape.num_tokens * shape.num_selected_experts * bytes_of_expert(shape)
  if name == 'gather' and copied > MOST_BYTES:
    return f'{copied / 1e9:.0f} GB of copied weights'
  return ''


def decoder_of(
  shape: Shape, num_experts: int, num_layers: int, dispatch: str, mesh: jax.sharding.Mesh
) -> LanguageModel:
  """Returns a decoder with experts in every layer; num_experts 0 is its dense twin."""
  moe = None
  if num_experts:
    moe = dataclasses.replace(options_of(shape, num_experts, dispatch), capacity_factor=None)
  heads = max(1, shape.embed_dim // HEAD_DIM)
  options = DecoderOptions(
    vocab_size=VOCAB_SIZE,
    num_layers=num_layers,
    embed_dim=shape.embed_dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=HEAD_DIM,
    mlp_dim=shape.num_selected_experts * shape.mlp_dim,
    activation=shape.activation,
    rope_theta=10000.0,
    norm_epsilon=1e-5,
    tied_embeddings=False,
    remat=False,
    compute_dtype=shape.dtype,
    moe=moe,
    every=1,
    num_shared_experts=0,
  )
  return LanguageModel(mesh, VOCAB_SIZE, Decoder(options, mesh))


def _model_arm(task: LanguageModel, shape: Shape, seed: int) -> Compiled:
  """Returns a call that draws `STEPS` tokens of each sequence behind a context of `CONTEXT`."""
  batch = shape.num_tokens
  params = jax.jit(lambda: init_params(task, jnp.int32(seed)))()
  greedy = Sampling(jnp.float32(0), jnp.int32(0), jnp.float32(1), jnp.int32(-1))
  token = np.random.default_rng(seed).integers(0, VOCAB_SIZE, batch, np.int32)
  held = [
    Rows(
      token=jnp.asarray(token),
      done=jnp.zeros((batch,), bool),
      lengths=jnp.full((batch,), CONTEXT, jnp.int32),
      next_index=jnp.int32(1),
      keys=jax.random.split(jax.random.key(seed), batch),
      cache=task.decode.init_cache(batch, CONTEXT + STEPS),
    )
  ]
  lowered = continue_rows.lower(task, STEPS, params, {}, held[0], greedy)
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start

  def call() -> None:
    # From the same position each time: the cache is as long, and its cells are written again.
    rows = held[0]._replace(next_index=jnp.int32(1))
    _, held[0] = jax.block_until_ready(compiled(params, {}, rows, greedy))

  start = time.perf_counter()
  call()
  first = time.perf_counter() - start
  analysis: Any = compiled.memory_analysis()
  return Compiled(
    call, first, seconds, analysis.temp_size_in_bytes, lambda: compiled.as_text() or ''
  )
