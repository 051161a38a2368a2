"""Measures of how far experts specialise: pure functions of counts, in NumPy.

One-letter dimensions: L MoE layers, E experts, V token ids, R labels (domains, or token ids).

The counts are of the experts selected, before any drop, over valid tokens (`RoutingCounts` says
what an assignment is for each kind of router). Where every token goes to every expert (dense
mixture, Soft MoE) there is no selection, and only the similarity of weights is given.

Mutual information of finitely many tokens is above 0 even where experts are independent of the
label: by about (R - 1)(E - 1) / 2 nats over the number of assignments, which is much where labels
  are
token ids. So the *permutation baseline* is subtracted: the expected value when the labels are dealt
out again among the tokens, each token keeping its set of experts. It is computed, not drawn.

The permutation deals with tokens as if they were independent. Those of a document are not, so
between domains of few documents something above 0 remains that is due to the documents, not to
their domains. And domains differ in their words: `hash`, which knows nothing but the token id, has
information about the domain, too. Compare arms on the same split, with an untrained router or
`hash` among them, before calling a small number specialisation.
"""

import math
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float, Int

from moe_jax.train.routing_counts import RoutingCounts

# Counts of a smaller mean are summed over; of a larger one, a series is exact to 1e-4.
_SMALL_MEAN = 20
# Values that such a count takes: beyond its mean and 12 deviations is nothing.
_MOST_VALUES = 80
# Tokens of a label up to which the sum of their assignments has its distribution computed.
_MOST_CONVOLVED = 32


def mutual_information(joint: Int[np.ndarray, 'R E']) -> float:
  """Returns the plug-in mutual information of label and expert, in bits.

  sum_re p_re log2(p_re / (p_r p_e)), p_re the share of all assignments that are of tokens of label
  r and to expert e. At most the entropy of the label, and of the load; 0 of no assignment.
  """
  joint = np.asarray(joint, np.float64)
  total = joint.sum()
  if not total:
    return 0.0
  parts = (_xlogx(joint), -_xlogx(joint.sum(0)), -_xlogx(joint.sum(1)), _xlogx(total))
  return max(0.0, float(sum(np.sum(part) for part in parts) / total / math.log(2)))


def expected_mutual_information(
  tokens: Int[np.ndarray, 'R'], by_expert: Int[np.ndarray, 'E'], by_number: Int[np.ndarray, 'E1']
) -> float:
  """Returns the mean of `mutual_information` over all assignments of labels to tokens, in bits.

  A token keeps its set of experts, so the tokens of label r that selected expert e are drawn
  without replacement from all: hypergeometric. Exact to about 1e-4 of its value where every token
  selects the same number of experts. Otherwise the number of assignments of a label varies, too: it
  is taken as a sum of independent draws.

  Args:
    tokens: of each label.
    by_expert: tokens that selected each expert.
    by_number: tokens that selected 0, 1, ... experts.

  Source: Vinh, Epps & Bailey 2010, JMLR 11 (theorem 2): the hypergeometric model of the adjusted
  mutual information. Differs: a token may be counted for several experts.
  """
  tokens, by_expert = np.asarray(tokens, np.int64), np.asarray(by_expert, np.int64)
  total = int(by_expert.sum())
  if not total:
    return 0.0
  # Labels of as many tokens have the same expectation.
  sizes, times = np.unique(tokens[tokens > 0], return_counts=True)
  population = int(tokens.sum())
  cell_sum = sum(
    float(np.sum(times * _expected_xlogx(population, sizes, drawn)))
    for drawn in by_expert.tolist()
    if drawn
  )
  label_sum = float(np.sum(times * _expected_xlogx_of_sums(population, sizes, by_number)))
  nats = cell_sum - label_sum - float(np.sum(_xlogx(by_expert))) + float(_xlogx(total))
  return max(0.0, nats / total / math.log(2))


def _expected_xlogx(
  population: int, labelled: Int[np.ndarray, 'U'], drawn: int
) -> Float[np.ndarray, 'U']:
  """Returns E[N ln N], N of `drawn` tokens of a population being among the labelled ones."""
  share, rest = labelled / population, max(population - 1, 1)
  mean = drawn * share
  variance = mean * (1 - share) * (population - drawn) / rest
  skew = variance * (1 - 2 * share) * (population - 2 * drawn) / max(population - 2, 1)
  series = _xlogx(mean) + variance / (2 * mean)
  series += -skew / (6 * mean**2) + 3 * variance**2 / (12 * mean**3)
  small = mean <= _SMALL_MEAN
  series[small] = _summed_xlogx(population, labelled[small], drawn)
  return series


def _summed_xlogx(
  population: int, labelled: Int[np.ndarray, 'U'], drawn: int
) -> Float[np.ndarray, 'U']:
  """The same by summing over all values that N takes, whose probabilities grow by known ratios."""
  lowest = np.maximum(0, labelled + drawn - population)[:, None]
  highest = np.minimum(labelled, drawn)[:, None]
  labelled = labelled[:, None]
  n = lowest + np.arange(_MOST_VALUES)
  others = (population - labelled - drawn + n + 1).astype(np.float64)
  ratio = (labelled - n) * (drawn - n) / ((n + 1.0) * others)
  with np.errstate(divide='ignore'):
    steps = np.log(np.where(n < highest, ratio, 0.0))
  log_probs = np.cumsum(np.concatenate([np.zeros_like(steps[:, :1]), steps[:, :-1]], 1), 1)
  probs = np.exp(log_probs - log_probs.max(1, keepdims=True))
  return np.sum(probs * _xlogx(n), 1) / probs.sum(1)


def _expected_xlogx_of_sums(
  population: int, sizes: Int[np.ndarray, 'U'], by_number: Int[np.ndarray, 'E1']
) -> Float[np.ndarray, 'U']:
  """Returns E[A ln A], A the assignments of as many tokens, drawn from all."""
  probs = np.asarray(by_number, np.float64) / population
  numbers = np.arange(len(probs))
  each = float(probs @ numbers)
  variance = float(probs @ np.square(numbers - each))
  sum_variance = sizes * variance * (population - sizes) / max(population - 1, 1)
  result = _xlogx(sizes * each) + sum_variance / (2 * sizes * each)
  if variance:
    distribution = np.ones(1)
    for size in range(1, _MOST_CONVOLVED + 1):
      distribution = np.convolve(distribution, probs)
      result[sizes == size] = distribution @ _xlogx(np.arange(len(distribution)))
  return result


def _xlogx(x: Any) -> np.ndarray:
  return np.asarray(scipy.special.xlogy(x, x), np.float64)


def load_overlap(by_expert: Int[np.ndarray, 'R E']) -> float:
  """Returns the overlap of the loads of domains: 1 if all have the same, 0 if they share no expert.

  The mean over pairs of domains of sum_e min(p_e, q_e), p and q their shares of assignments: 1
  minus the total variation distance. Domains count alike, whatever their size; one without any
  assignment is left out. Of few tokens it is below 1 by chance.
  """
  by_expert = np.asarray(by_expert, np.float64)
  by_expert = by_expert[by_expert.sum(1) > 0]
  load = by_expert / by_expert.sum(1, keepdims=True)
  pairs = zip(*np.triu_indices(len(load), 1), strict=True)
  overlaps = [np.minimum(load[i], load[j]).sum() for i, j in pairs]
  return float(np.mean(overlaps)) if overlaps else 1.0


def coactivation(together: Int[np.ndarray, 'E E']) -> tuple[Float[np.ndarray, 'E E'], float, float]:
  """Returns how often two experts are selected by the same token: matrix, number, baseline.

  The matrix holds the share of expert e's tokens that also selected f; 1 on the diagonal, 0 in the
  row of an expert without tokens. The number is the share that goes to the expert's most frequent
  partner, averaged over all assignments: 1 if experts come in fixed sets, 0 with one expert for
  each token. The baseline is the number if partners were drawn by their loads: as many for e's
  tokens as they have, each f with probability n_f / sum_{g != e} n_g.

  Source: the matrix is the expert co-activation of Muennighoff et al. 2024 (OLMoE),
  arXiv:2409.02060, sec. 5.2.
  """
  together = np.asarray(together, np.float64)
  by_expert = np.diagonal(together)
  matrix = together / np.maximum(by_expert, 1)[:, None]
  total = by_expert.sum()
  if len(by_expert) < 2 or not total:
    return matrix, 0.0, 0.0
  apart = ~np.eye(len(by_expert), dtype=bool)
  partners = np.where(apart, matrix, 0)
  largest = np.max(np.where(apart, by_expert[None, :], 0), 1)
  drawn = partners.sum(1) * largest / np.maximum(total - by_expert, 1)
  number = float(by_expert @ partners.max(1) / total)
  return matrix, number, float(by_expert @ np.minimum(drawn, 1) / total)


def random_similarity(size: int) -> float:
  """Returns the mean absolute cosine of two random directions in n dimensions.

  Gamma(n / 2) / (sqrt(pi) Gamma((n + 1) / 2)), about sqrt(2 / (pi n)).
  """
  log_ratio = scipy.special.gammaln(size / 2) - scipy.special.gammaln((size + 1) / 2)
  return float(np.exp(log_ratio) / math.sqrt(math.pi))


def measures(
  counts: RoutingCounts, by_domain: list[Int[np.ndarray, 'L E']], tokens_of_domains: list[int]
) -> dict[str, Any]:
  """Returns all measures of a split except the similarity of weights.

  Args:
    counts: of the whole split, as NumPy arrays.
    by_domain: tokens of each domain that selected each expert.
    tokens_of_domains: valid tokens of each.

  Returns:
    Lists over layers, in bits, the baseline subtracted (so it may be slightly below 0):
      router/expert_domain_mi: mutual information of expert and domain.
      router/expert_token_mi: the same of expert and token id.
    What was subtracted: router/expert_domain_mi_baseline, router/expert_token_mi_baseline.
    And
      router/domain_load_overlap: see `load_overlap`.
      router/coactivation, router/coactivation_baseline: see `coactivation`.
      router/coactivation_matrix: the same [L][E][E].
    With a single domain there is nothing of domains, and nothing of token ids where
    `counts.by_token` is None.
  """
  result: dict[str, Any] = {}
  domain_sizes = np.array(tokens_of_domains, np.int64)
  if np.count_nonzero(domain_sizes) > 1:
    by_expert_LDE = np.array(by_domain).swapaxes(0, 1)
    result |= _informations('domain', counts, domain_sizes, by_expert_LDE)
    result['router/domain_load_overlap'] = [load_overlap(by_expert) for by_expert in by_expert_LDE]
  if counts.by_token is not None:
    result |= _informations('token', counts, np.asarray(counts.tokens), np.asarray(counts.by_token))
  matrices, numbers, baselines = zip(*map(coactivation, counts.together), strict=True)
  result['router/coactivation'] = list(numbers)
  result['router/coactivation_baseline'] = list(baselines)
  result['router/coactivation_matrix'] = [matrix.tolist() for matrix in matrices]
  return result


def _informations(
  label: str,
  counts: RoutingCounts,
  sizes: Int[np.ndarray, 'R'],
  joint: Int[np.ndarray, 'L R E'],
) -> dict[str, list[float]]:
  raw = [mutual_information(layer) for layer in joint]
  baseline = [
    expected_mutual_information(sizes, np.diagonal(together), by_number)
    for together, by_number in zip(counts.together, counts.by_number, strict=True)
  ]
  name = f'router/expert_{label}_mi'
  return {
    name: [one - other for one, other in zip(raw, baseline, strict=True)],
    f'{name}_baseline': baseline,
  }
