"""Sampling from a model that has `Task.decode`: one prefill, then one token at a time.

No token is ever dropped, so what is sampled does not depend on the other prompts of the call.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.data import Tokenizer
from moe_jax.errors import UserError
from moe_jax.models.task import Task
from moe_jax.parallel.sharding import batch_sharding, constrain

# Of sums of probabilities in float32.
_ROUNDING = 1e-6


class Sampling(NamedTuple):
  """Parameters of sampling: see `sample_token`; `eos_id` ends a row."""

  temperature: Float[Array, '']
  top_k: Int[Array, '']
  top_p: Float[Array, '']
  eos_id: Int[Array, '']


class Rows(NamedTuple):
  """State of the continuation of each prompt.

  Attributes:
    token: drawn last, not in the cache yet.
    done: whether the end was drawn before it.
    lengths: of the prompts.
    next_index: of the next token among the new ones, from 0.
    keys: of each row.
    cache: of all tokens before.
  """

  token: Int[Array, 'B']
  done: Bool[Array, 'B']
  lengths: Int[Array, 'B']
  next_index: Int[Array, '']
  keys: Key[Array, 'B']
  cache: Any


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
  """Draws one token: of those that `keep` leaves, by their logits divided by the temperature.

  Args:
    logits: of the next token.
    key: of this row and position.
    temperature: divides the logits; 0 takes the largest.
    top_k: see `keep`.
    top_p: see `keep`.
  """
  kept = keep(logits / jnp.where(temperature > 0, temperature, 1.0), top_k, top_p)
  drawn = jax.random.categorical(key, kept)
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits)).astype(jnp.int32)


def keep(
  logits: Float[Array, 'V'], top_k: Int[Array, ''], top_p: Float[Array, '']
) -> Float[Array, 'V']:
  """Returns the logits, -inf for the tokens that are not drawn from.

  Args:
    logits: divided by the temperature.
    top_k: keeps this many largest logits; 0 keeps all. Ties with the k-th are kept.
    top_p: keeps the fewest most probable tokens whose probability reaches this, to 1e-6; of equally
      probable ones those of lower id. 1 keeps all.

  Source: Fan et al. 2018, arXiv:1805.04833 (top-k); Holtzman et al. 2020, arXiv:1904.09751 (top-p).
  """
  vocab_size = logits.shape[0]
  order = jnp.argsort(logits, stable=True, descending=True)
  ordered = logits[order]
  kth = ordered[jnp.clip(jnp.where(top_k > 0, top_k, vocab_size), 1, vocab_size) - 1]
  ordered = jnp.where(ordered >= kth, ordered, -jnp.inf)
  # A token stays if the more probable ones before it have not reached top_p: the first always does.
  reached = jnp.cumsum(jax.nn.softmax(ordered))[:-1]
  stays = jnp.concatenate([jnp.ones(1, bool), (reached < top_p - _ROUNDING) | (top_p >= 1)])
  return jnp.full_like(logits, -jnp.inf).at[order].set(jnp.where(stays, ordered, -jnp.inf))


def generate(
  task: Task,
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
    task: in mode `decode`; one that has `Task.decode`.
    params: on the mesh of the model.
    router_state: of the same checkpoint; {} where the routers have none.
    prompts: token ids, each at least one.
    num_tokens: new tokens of each prompt, at most.
    eos_id: ends a continuation; not returned.
    temperature: see `sample_token`.
    top_k: see `sample_token`.
    top_p: see `sample_token`.
    seed: with the index of the prompt in the list, determines what is drawn.

  Returns:
    The new tokens of each prompt.
  """
  rows = len(prompts)
  # Rows that fill up the mesh repeat the first prompt and are discarded.
  padded = -(-rows // task.mesh.size) * task.mesh.size
  longest = max(len(prompt) for prompt in prompts)
  tokens = np.zeros((padded, longest), np.int32)
  lengths = np.zeros((padded,), np.int32)
  for row in range(padded):
    prompt = prompts[row if row < rows else 0]
    tokens[row, : len(prompt)] = prompt
    lengths[row] = len(prompt)
  how = Sampling(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.int32(eos_id))
  by_row = batch_sharding(task.mesh)
  with jax.set_mesh(task.mesh):
    start = prefill(
      task,
      longest + num_tokens,
      params,
      router_state,
      jax.device_put(tokens, by_row),
      jax.device_put(lengths, by_row),
      jax.random.key(seed),
      how,
    )
    first = np.asarray(start.token)
    rest, _ = continue_rows(task, num_tokens - 1, params, router_state, start, how)
  new = np.concatenate([first[:, None], np.asarray(rest)], axis=1)
  result = []
  for row in new[:rows].tolist():
    result.append(row[: row.index(eos_id)] if eos_id in row else row)
  return result


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
  task: Task,
  max_length: int,
  params: Any,
  router_state: Any,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, 'B'],
  key: Key[Array, ''],
  how: Sampling,
) -> Rows:
  """Reads the prompts and draws the first new token of each.

  Args:
    task: in mode `decode`; one that has `Task.decode`.
    max_length: cells of the cache, for prompt and continuation.
    params: of the model.
    router_state: of the model.
    tokens: of the prompts, filled up on the right with anything.
    lengths: of the prompts, at least 1.
    key: with the row and the index of a token, determines what is drawn.
    how: it is drawn.
  """
  batch_size, longest = tokens.shape
  row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch_size))
  cell = jnp.broadcast_to(jnp.arange(longest, dtype=jnp.int32), tokens.shape)
  in_prompt: Bool[Array, 'B T'] = cell < lengths[:, None]
  hooks = task.decode
  assert hooks is not None
  cache = hooks.init_cache(batch_size, max_length)
  logits, cache = hooks.read(params, router_state, tokens, in_prompt, cell, cache, lengths - 1)
  index = jnp.ones((), jnp.int32)
  token = _draw(logits, row_keys, index - 1, how)
  done = jnp.zeros((batch_size,), bool)
  return _by_row(Rows(token, done, lengths, index, row_keys, cache), task)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def continue_rows(
  task: Task, num_tokens: int, params: Any, router_state: Any, rows: Rows, how: Sampling
) -> tuple[Int[Array, 'B N'], Rows]:
  """Draws N more tokens of each row.

  `rows` are donated, the cache with them: use only those that are returned, which are the state to
  continue from.

  Args:
    task: in mode `decode`; one that has `Task.decode`.
    num_tokens: N; 0 draws nothing.
    params: of the model.
    router_state: of the model.
    rows: from `prefill` or from here.
    how: tokens are drawn. A row that is done gets the symbol of the end again and again.
  """
  hooks = task.decode
  assert hooks is not None

  def step(rows: Rows, _):
    done = rows.done | (rows.token == how.eos_id)
    tokens, first = rows.token[:, None], jnp.zeros_like(rows.token)
    valid = jnp.ones(tokens.shape, bool)
    position = (rows.lengths + rows.next_index - 1)[:, None]
    logits, cache = hooks.read(params, router_state, tokens, valid, position, rows.cache, first)
    drawn = _draw(logits, rows.keys, rows.next_index, how)
    drawn = jnp.where(done, how.eos_id, drawn)
    return rows._replace(token=drawn, done=done, next_index=rows.next_index + 1, cache=cache), drawn

  rows, new = jax.lax.scan(step, rows, None, length=num_tokens)
  return constrain(new.T, task.mesh), _by_row(rows, task)


def _draw(
  row_logits: Float[Array, 'B V'], row_keys: Key[Array, 'B'], index: Int[Array, ''], how: Sampling
) -> Int[Array, 'B']:
  """Draws the token number `index` of each row."""
  keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, index))(row_keys)
  numbers = (how.temperature, how.top_k, how.top_p)
  return jax.vmap(lambda row, key: sample_token(row, key, *numbers))(row_logits, keys)


def _by_row(rows: Rows, task: Task) -> Rows:
  """Fixes how rows lie on the mesh: a donated array is used again only if it comes back alike."""
  by_row = {name: value for name, value in rows._asdict().items() if name != 'next_index'}
  by_row = constrain(by_row, task.mesh, 'batch')
  return rows._replace(next_index=constrain(rows.next_index, task.mesh), **by_row)
