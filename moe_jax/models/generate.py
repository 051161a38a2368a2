"""Sampling from a decoder with a key-value cache: one prefill, then one token at a time.

No token is ever dropped, so what is sampled does not depend on the other prompts of the call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.data import Tokenizer
from moe_jax.errors import UserError
from moe_jax.models.decoder import Decoder, forward, init_cache, logits
from moe_jax.parallel.mesh import batch_sharding, replicated


def encode_prompt(prompt: str, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
  """Returns the start symbol and the tokens of a prompt.

  Raises:
    UserError: if the prompt is not text or leaves the vocabulary.
  """
  try:
    prompt.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError('--prompt', prompt, 'is not UTF-8 text') from error
  tokens = [tokenizer.bos_id, *(int(token) for token in tokenizer.encode(prompt))]
  outside = [token for token in tokens if not 0 <= token < vocab_size]
  if outside:
    raise UserError(
      '--prompt', prompt, f'token {outside[0]} is outside the vocabulary of {vocab_size}'
    )
  return tokens


def sample_token(
  logits: Float[Array, 'V'],
  key: Key[Array, ''],
  temperature: Float[Array, ''],
  top_k: Int[Array, ''],
  top_p: Float[Array, ''],
) -> Int[Array, '']:
  """Draws one token.

  Args:
    logits: of the next token.
    key: of this row and position.
    temperature: divides the logits; 0 takes the largest.
    top_k: keeps this many largest logits; 0 keeps all. Ties with the k-th are kept.
    top_p: keeps the fewest most probable tokens whose probability reaches this; 1 keeps all.

  Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p).
  """
  vocab_size = logits.shape[0]
  scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
  ordered = jnp.sort(scaled)[::-1]
  kth = ordered[jnp.clip(jnp.where(top_k > 0, top_k, vocab_size), 1, vocab_size) - 1]
  ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
  probs = jax.nn.softmax(ordered)
  # A token stays if the more probable ones before it have not reached top_p: the first always does.
  before = jnp.cumsum(probs) - probs
  last = jnp.min(jnp.where((before < top_p) & (probs > 0), ordered, jnp.inf))
  kept = jnp.where(scaled >= last, scaled, -jnp.inf)
  drawn = jax.random.categorical(key, kept)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)


def generate(
  model: Decoder,
  params: Any,
  router_state: Any,
  prompts: list[list[int]],
  *,
  num_tokens: int,
  eos_id: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
) -> list[list[int]]:
  """Continues each prompt.

  Args:
    model: in mode `decode`.
    params: on the mesh of the model.
    router_state: of the same checkpoint; {} where the routers have none.
    prompts: token ids, each at least one.
    num_tokens: new tokens of each prompt, at most.
    eos_id: ends a continuation; not returned.
    temperature: see `sample_token`.
    top_k: see `sample_token`.
    top_p: see `sample_token`.
    seed: with the place of the prompt in the list, determines what is drawn.

  Returns:
    The new tokens of each prompt.
  """
  rows = len(prompts)
  # Rows that fill up the mesh repeat the first prompt and are thrown away.
  padded = -(-rows // model.mesh.size) * model.mesh.size
  longest = max(len(prompt) for prompt in prompts)
  tokens = np.zeros((padded, longest), np.int32)
  lengths = np.zeros((padded,), np.int32)
  for row in range(padded):
    prompt = prompts[row if row < rows else 0]
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  numbers = (jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(eos_id))
  by_row = batch_sharding(model.mesh)
  with jax.set_mesh(model.mesh):
    new = _generate(
      model,
      num_tokens,
      params,
      router_state,
      jax.device_put(tokens, by_row),
      jax.device_put(lengths, by_row),
      jax.random.key(seed),
      numbers,
    )
  result = []
  for row in np.asarray(new)[:rows].tolist():
    result.append(row[: row.index(eos_id)] if eos_id in row else row)
  return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model, num_tokens, params, router_state, tokens, lengths, key, numbers):
  temperature, top_k, top_p, eos_id = numbers
  batch_size, longest = tokens.shape
  row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))

  def draw(of_rows: Float[Array, 'B V'], index) -> Int[Array, 'B']:
    keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, index))(row_keys)
    numbers = (temperature, top_k, top_p)
    return jax.vmap(lambda row, key: sample_token(row, key, *numbers))(of_rows, keys)

  cell = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), tokens.shape)
  in_prompt: Bool[Array, 'B T'] = cell < lengths[:, None]
  cache = init_cache(model.options, batch_size, longest + num_tokens)
  apply = functools.partial(forward, model, params, router_state=router_state)
  out = apply(tokens, in_prompt.astype(jnp.int32), cell, cache=cache)
  last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
  first = draw(logits(last, out.output), 0)

  def step(carry, index):
    token, done, cache = carry
    done = done | (token == eos_id)
    ones = jnp.ones((batch_size, 1), jnp.int32)
    position = (lengths + index - 1)[:, None]
    out = apply(token[:, None], ones, position, cache=cache)
    drawn = jnp.where(done, eos_id, draw(out.logits[:, 0], index))
    return (drawn, done, out.cache), drawn

  done = jnp.zeros((batch_size,), bool)
  _, rest = jax.lax.scan(step, (first, done, out.cache), jnp.arange(1, num_tokens))
  new = jnp.concatenate([first[:, None], rest.T], axis=1)
  return jax.lax.with_sharding_constraint(new, replicated(model.mesh))
