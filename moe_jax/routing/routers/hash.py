"""Hash layer: a fixed table gives the experts of each token id.

One-letter dimensions: V vocabulary, K assignments of a token.
"""

import dataclasses
import heapq

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from moe_jax import fields
from moe_jax.router_options import RouterOptions, hyperparameter
from moe_jax.routing import router as router_lib
from moe_jax.routing.router import Choice, Params, RouterInputs, State
from moe_jax.routing.routers.random_choice import distinct_experts
from moe_jax.routing.routers.round_robin import fixed_choice

TABLES = ('random', 'balanced')


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
  """Hyperparameters of this router."""

  hash_table: str = hyperparameter(
    fields.one_of('random', TABLES, 'Random table, or balanced by frequency of tokens.')
  )
  hash_seed: int = hyperparameter(fields.at_least(0, 0, 'Of the random table.'))


def new_state(options: Options, embed_dim: int, vocab_size: int) -> State:
  """Returns the random table: K distinct experts for each id, drawn from the seed of the table."""
  del embed_dim
  table = distinct_experts(
    jax.random.key(options.hash_seed),
    vocab_size,
    options.num_experts,
    options.num_selected_experts,
  )
  # State is float32, in which expert numbers are exact up to 2**24.
  return {'table': table.astype(jnp.float32)}


def from_counts(state: State, counts: Num[Array | np.ndarray, 'V'], options: Options) -> State:
  """Returns the balanced table if the options select it. Runs once, on the host.

  Ids in descending order of count, equal counts by lower id; each takes the K distinct experts with
  the fewest tokens so far, the lightest first, equal ones by lower index, and each of the K is
  charged the id's full count. Ids that never occur weigh nothing, so any choice balances them: they
  keep their random experts, lest all go to the one expert that happens to be lightest at the end.
  """
  if options.hash_table != 'balanced':
    return state
  table = np.array(state['table'])
  # int64: the tokens of a text, summed for an expert, may leave int32.
  counts = np.asarray(counts).astype(np.int64)
  # A heap of (load, expert), of equal loads the lower expert first; sorted, so a heap already.
  lightest = [(0, expert) for expert in range(options.num_experts)]
  for token_id in np.argsort(-counts, kind='stable'):
    count = int(counts[token_id])
    if not count:
      # In descending order: all ids from here on never occur.
      break
    # All K are taken before any is put back, so they are distinct.
    taken = [heapq.heappop(lightest) for _ in range(options.num_selected_experts)]
    for choice, (load, expert) in enumerate(taken):
      table[token_id, choice] = expert
      heapq.heappush(lightest, (load + count, expert))
  return {'table': jnp.asarray(table)}


def choose(params: Params, state: State, inputs: RouterInputs, options: RouterOptions) -> Choice:
  """Looks up the K experts of each token id; gate 1 / K each, so 1 with K = 1.

  Source: Roller et al. 2021, arXiv:2106.04426. The random table was checked in ParlAI's
  hash_ladder.py (13fe067): one expert drawn for each id (there from seed 42), no gate. The balanced
  one is known from descriptions. Differs: K > 1 sends the whole token to K whole experts of equal
  weight (not parts of a token vector to parts of an expert); the same table in every layer; ids
  that never occur in the text stay random in the balanced table. An id outside the vocabulary takes
  the experts of the nearest id.
  """
  del params
  rows = jnp.clip(inputs.token_ids, 0, state['table'].shape[0] - 1)
  return fixed_choice(state['table'][rows].astype(jnp.int32), options.num_experts)


def allowed(options: Options) -> tuple[str, str] | None:
  """Rejects the name of an unknown table."""
  if options.hash_table not in TABLES:
    return 'hash_table', f'must be one of {TABLES}'
  return None


ROUTER = router_lib.Router(
  name='hash',
  paper='Roller et al. 2021, arXiv:2106.04426',
  summary='a fixed table from token id to experts, random or balanced by frequency',
  choose=choose,
  options=Options,
  causal=True,
  learns=False,
  reads_tokens=False,
  balance='fixed',
  cost='one look-up',
  params=router_lib.no_params,
  state=new_state,
  from_counts=from_counts,
  allowed=allowed,
)
