"""The MoE layer once more, in NumPy float64 with loops, written from the formulas alone.

It knows nothing of JAX, of devices, or of how the package sorts, gathers and exchanges.
"""

import fractions
import math
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
  """One routing group: rank in the expert's queue, kept or not, weight; and slot -> assignment."""

  slot: np.ndarray
  keep: np.ndarray
  weights: np.ndarray
  source: np.ndarray


class Layer(NamedTuple):
  """Output of a MoE layer; keep [B, T, K] and expert_index are for looking inside."""

  y: np.ndarray
  sums: dict[str, np.ndarray]
  expert_index: np.ndarray
  keep: np.ndarray


def softmax(z):
  z = np.asarray(z, np.float64)
  exp = np.exp(z - z.max(axis=-1, keepdims=True))
  return exp / exp.sum(axis=-1, keepdims=True)


def logsumexp(z):
  z = np.asarray(z, np.float64)
  top = z.max(axis=-1)
  return top + np.log(np.exp(z - top[..., None]).sum(axis=-1))


def top_k(z, k):
  """Returns the k largest of one row, best first; of equals the lower index first."""
  return np.array(sorted(range(len(z)), key=lambda e: (-z[e], e))[:k])


def gates(z, chosen, softmax_order, renormalize):
  """Returns the weights of the chosen experts of one token, before any drop."""
  if softmax_order == 'after':
    return softmax(np.asarray(z, np.float64)[chosen])
  g = softmax(z)[chosen]
  return g / g.sum() if renormalize == 'before_drop' else g


def capacity(group_size, num_experts, num_selected, factor):
  """Returns ceil(S K factor / E), at least 1; `factor` is the decimal as text."""
  slots = fractions.Fraction(factor) * group_size * num_selected / num_experts
  return max(1, math.ceil(slots))


def queue(priority, router_probs, num_selected, permutation=None):
  """Returns the assignments (s, k) of a group, the one to be served first first."""
  size = len(router_probs)
  if priority == 'token':
    return [(s, k) for s in range(size) for k in range(num_selected)]
  if priority == 'choice':
    return [(s, k) for k in range(num_selected) for s in range(size)]
  if priority == 'priority':
    order = sorted(range(size), key=lambda s: (-max(router_probs[s]), s))
    return [(s, k) for k in range(num_selected) for s in order]
  if priority == 'random':
    # permutation[s K + k] is the place of the assignment in the queue.
    order = np.argsort(permutation)
    return [(int(i) // num_selected, int(i) % num_selected) for i in order]
  raise ValueError(priority)


def plan(expert_index, gate, valid, order, num_experts, slots, renormalize, chosen=None):
  """Serves the queue: each assignment takes the next slot of its expert, while there is one.

  What is not `chosen` [S, K] requests none; None is all.
  """
  size, num_selected = expert_index.shape
  slot = np.zeros((size, num_selected), int)
  keep = np.zeros((size, num_selected), bool)
  source = np.full((num_experts, slots), size * num_selected)
  waiting = [0] * num_experts
  for s, k in order:
    if not valid[s] or (chosen is not None and not chosen[s, k]):
      continue
    e = expert_index[s, k]
    slot[s, k] = waiting[e]
    if waiting[e] < slots:
      keep[s, k] = True
      source[e, waiting[e]] = s * num_selected + k
    waiting[e] += 1
  weights = np.where(keep, gate, 0.0).astype(np.float64)
  if renormalize == 'after_drop':
    for s in range(size):
      if weights[s].sum() > 0:
        weights[s] /= weights[s].sum()
  return Plan(slot, keep, weights, source)


def activate(hidden, activation):
  """Returns the activated hidden layer; of gated ones the first half is the gate."""
  gate, value = np.split(hidden, 2, axis=-1) if activation in ('swiglu', 'geglu') else (hidden, 1)
  if activation == 'relu':
    return np.maximum(gate, 0)
  if activation == 'swiglu':
    return gate / (1 + np.exp(-gate)) * value
  if activation == 'gelu_exact':
    return gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2
  tanh = np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
  return gate * (1 + tanh) / 2 * value


def expert(x, w_in, w_out, activation):
  return activate(x @ np.asarray(w_in, np.float64), activation) @ np.asarray(w_out, np.float64)


def group_tokens(batch, length, group_size):
  """Returns the tokens (b, t) of each group: position first, then sequence."""
  return [
    [(first + i, t) for t in range(length) for i in range(group_size)]
    for first in range(0, batch, group_size)
  ]


def layer(x, valid, router, w_in, w_out, options, noise=None, permutations=None):
  """Returns y and the sums of a whole batch.

  Args:
    x: [B, T, D].
    valid: [B, T].
    router: [D, E].
    w_in: [E, D, F1].
    w_out: [E, F, D].
    options: MoeOptions, read as a record of numbers and names.
    noise: [G, S, D], what jitter multiplies the router's input by.
    permutations: [G, S * K], the queue of `random`.
  """
  x, router = np.asarray(x, np.float64), np.asarray(router, np.float64)
  valid = np.asarray(valid)
  batch, length, _ = x.shape
  num_experts, num_selected = options.num_experts, options.num_selected_experts
  size = length * options.group_size
  slots = size
  if options.capacity_factor is not None:
    factor = str(options.capacity_factor)
    slots = min(size, capacity(size, num_experts, num_selected, factor))
  y = np.zeros_like(x)
  expert_index = np.zeros((batch, length, num_selected), int)
  keep = np.zeros((batch, length, num_selected), bool)
  groups = group_tokens(batch, length, options.group_size)
  scopes = options.balance_scopes
  sums = empty_sums(scopes, num_experts)
  for g, tokens in enumerate(groups):
    rows = np.array([x[b, t] for b, t in tokens])
    ok = np.array([valid[b, t] for b, t in tokens])
    router_input = rows if noise is None else rows * np.asarray(noise[g], np.float64)
    z = router_input @ router
    p = softmax(z)
    chosen = np.array([top_k(row, num_selected) for row in z])
    gate = np.array(
      [
        gates(row, e, options.choice.softmax_order, options.choice.renormalize)
        for row, e in zip(z, chosen, strict=True)
      ]
    )
    permutation = None if permutations is None else permutations[g]
    order = queue(options.priority, p, num_selected, permutation)
    made = plan(chosen, gate, ok, order, num_experts, slots, options.choice.renormalize)
    scope = np.array([b * scopes // batch for b, _ in tokens])
    add_to_sums(sums, scope, z, chosen, made.keep, ok, slots)
    for s, (b, t) in enumerate(tokens):
      expert_index[b, t], keep[b, t] = chosen[s], made.keep[s]
      for k, e in enumerate(chosen[s]):
        if made.keep[s, k]:
          y[b, t] += made.weights[s, k] * expert(rows[s], w_in[e], w_out[e], options.activation)
  if options.capacity_factor is None:
    sums['slots'] = sums['kept_per_expert'].sum()  # without a capacity none is set aside
  return Layer(y, sums, expert_index, keep)


def empty_sums(num_scopes, num_experts):
  return {
    'tokens': np.zeros(num_scopes),
    'tokens_per_expert': np.zeros((num_scopes, num_experts)),
    'prob_sum': np.zeros((num_scopes, num_experts)),
    'kept_per_expert': np.zeros(num_experts),
    'tokens_all_dropped': np.zeros(()),
    'logsumexp_squared': np.zeros(()),
    'entropy': np.zeros(()),
    'top_prob': np.zeros(()),
    'logsumexp_max': np.array(-np.inf),
    'slots': np.zeros(()),
  }


def add_to_sums(sums, scope, z, chosen, keep, valid, slots):
  """Adds one group's valid tokens, one by one; each expert had `slots` of them.

  `scope` is one number, or one for each token.
  """
  scope = np.broadcast_to(scope, len(z))
  sums['slots'] += slots * z.shape[-1]
  p, lse = softmax(z), logsumexp(z)
  for s in np.flatnonzero(valid):
    sums['tokens'][scope[s]] += 1
    sums['prob_sum'][scope[s]] += p[s]
    for k, e in enumerate(chosen[s]):
      sums['tokens_per_expert'][scope[s], e] += 1
      sums['kept_per_expert'][e] += keep[s, k]
    sums['tokens_all_dropped'] += not keep[s].any()
    sums['logsumexp_squared'] += lse[s] ** 2
    sums['logsumexp_max'] = np.maximum(sums['logsumexp_max'], lse[s])
    sums['entropy'] += -sum(q * math.log(q) for q in p[s] if q > 0)
    sums['top_prob'] += p[s].max()


def load_balancing_loss(sums, num_selected):
  """E sum_e f_e P_e in each scope, scopes weighted by their tokens."""
  total = 0.0
  for tokens, counts, probs in zip(
    sums['tokens'], sums['tokens_per_expert'], sums['prob_sum'], strict=True
  ):
    if tokens:
      f, mean_prob = counts / (num_selected * tokens), probs / tokens
      total += tokens * len(f) * float(f @ mean_prob)
  return total / max(1, sums['tokens'].sum())


def router_z_loss(sums):
  return sums['logsumexp_squared'] / max(1, sums['tokens'].sum())


def entropy_loss(sums):
  return sums['entropy'] / max(1, sums['tokens'].sum())


def importance_loss(sums):
  """CV^2 of the summed probabilities in each scope, scopes weighted by their tokens."""
  total = 0.0
  for tokens, probs in zip(sums['tokens'], sums['prob_sum'], strict=True):
    if tokens:
      total += tokens * probs.var() / probs.mean() ** 2
  return total / max(1, sums['tokens'].sum())


def central_difference(function, x, direction, epsilon=1e-6):
  """Returns the slope of a float64 function along a direction."""
  x, direction = np.asarray(x, np.float64), np.asarray(direction, np.float64)
  return (function(x + epsilon * direction) - function(x - epsilon * direction)) / (2 * epsilon)
