"""Measures of specialisation against hand-worked cases, enumeration and redrawn labels."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from moe_jax.train import specialization
from moe_jax.train.routing_counts import RoutingCounts


def information(joint):
  """Mutual information in bits, cell by cell."""
  joint = np.asarray(joint, float)
  p = joint / joint.sum()
  return sum(
    p[r, e] * math.log2(p[r, e] / (p[r].sum() * p[:, e].sum()))
    for r, e in np.ndindex(*p.shape)
    if p[r, e]
  )


def joint_of(labels, sets, num_labels):
  """Counts of (label, expert); `sets` holds True for each expert that a token selected."""
  joint = np.zeros((num_labels, sets.shape[1]), int)
  np.add.at(joint, labels, sets)
  return joint


def baseline_of(labels, sets, num_labels):
  by_number = np.bincount(sets.sum(1), minlength=sets.shape[1] + 1)
  sizes = np.bincount(labels, minlength=num_labels)
  return specialization.expected_mutual_information(sizes, sets.sum(0), by_number)


def random_sets(rng, num_tokens, num_experts, num_selected, skew=0.0):
  """Sets of experts that know nothing of the token."""
  scores = rng.gumbel(size=(num_tokens, num_experts)) - skew * np.arange(num_experts)
  order = np.argsort(-scores, 1)
  sets = np.zeros((num_tokens, num_experts), bool)
  np.put_along_axis(sets, order[:, :num_selected], True, 1)
  return sets


def test_information_by_hand():
  mutual = specialization.mutual_information
  assert mutual(np.array([[2, 0], [0, 2]])) == pytest.approx(1)
  assert mutual(np.array([[3, 6], [1, 2]])) == pytest.approx(0, abs=1e-12)
  # 1 - H(1/4) = 1 - 2 + 3/4 log2(3) = 0.18872...
  assert mutual(np.array([[3, 1], [1, 3]])) == pytest.approx(0.75 * math.log2(3) - 1)
  assert mutual(np.zeros((2, 3), int)) == 0
  joint = np.random.default_rng(0).integers(0, 4, (5, 7))
  assert mutual(joint) == pytest.approx(information(joint))


@pytest.mark.parametrize('num_selected', [1, 2])
def test_baseline_is_the_mean_over_all_ways_to_deal_labels(num_selected):
  labels = np.array([0, 0, 0, 1, 1, 2])
  sets = random_sets(np.random.default_rng(1), 6, 4, num_selected, skew=0.5)
  every = {*itertools.permutations(labels.tolist())}
  assert len(every) == math.factorial(6) // (6 * 2)
  mean = np.mean([information(joint_of(list(one), sets, 3)) for one in every])
  assert baseline_of(labels, sets, 3) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize(
  ('population', 'labelled', 'drawn'),
  [(3000, 700, 100), (3000, 1500, 45), (3000, 2900, 2000), (100_000, 2100, 1000)],
)
def test_the_series_is_as_good_as_the_sum(population, labelled, drawn):
  n = np.arange(max(1, labelled + drawn - population), min(labelled, drawn) + 1)
  exact = scipy.stats.hypergeom.pmf(n, population, labelled, drawn) @ (n * np.log(n))
  mean = labelled * drawn / population
  assert mean > specialization._SMALL_MEAN
  found = specialization._expected_xlogx(population, np.array([labelled]), drawn)[0]
  # What enters the baseline is what exceeds the mean's own.
  own = mean * math.log(mean)
  assert found - own == pytest.approx(exact - own, rel=1e-3)


@pytest.mark.parametrize('kind', ['two of eight', 'any number'])
def test_random_experts_have_no_information_beyond_the_baseline(kind):
  rng = np.random.default_rng(2)
  num_tokens, num_labels = 6000, 300
  # Token ids as in text: few are frequent.
  labels = np.minimum(rng.zipf(1.3, num_tokens) - 1, num_labels - 1)
  if kind == 'two of eight':
    sets = random_sets(rng, num_tokens, 8, 2, skew=0.3)
  else:
    sets = rng.random((num_tokens, 8)) < np.linspace(0.05, 0.6, 8)
  found = []
  for _ in range(40):
    joint = joint_of(rng.permutation(labels), sets, num_labels)
    found.append(specialization.mutual_information(joint))
  baseline = baseline_of(labels, sets, num_labels)
  raw = specialization.mutual_information(joint_of(labels, sets, num_labels))
  # Far above 0 without any information, and all of it is the baseline.
  assert raw > 0.03
  assert baseline == pytest.approx(np.mean(found), rel=0.02)
  assert abs(raw - baseline) < 5 * np.std(found)


@pytest.mark.parametrize(('num_domains', 'num_experts'), [(4, 4), (3, 6), (8, 2)])
def test_full_specialisation_has_all_the_information_there_can_be(num_domains, num_experts):
  rng = np.random.default_rng(3)
  labels = np.repeat(np.arange(num_domains), 500)
  # Experts of one domain, domains of one expert, or each its own.
  each = max(1, num_experts // num_domains)
  expert = (labels * each + rng.integers(0, each, len(labels))) % num_experts
  sets = expert[:, None] == np.arange(num_experts)
  raw = specialization.mutual_information(joint_of(labels, sets, num_domains))
  assert raw == pytest.approx(math.log2(min(num_domains, num_experts)), rel=1e-3)
  assert 0 < baseline_of(labels, sets, num_domains) < 0.01


def test_overlap_of_loads_by_hand():
  overlap = specialization.load_overlap
  assert overlap(np.array([[2, 2], [5, 5]])) == 1
  assert overlap(np.array([[2, 0], [0, 5]])) == 0
  # Shares (3/4, 1/4, 0), (1/4, 1/4, 2/4), (0, 0, 1): pairs share 1/4 + 1/4, 0 and 2/4.
  assert overlap(np.array([[3, 1, 0], [1, 1, 2], [0, 0, 9]])) == pytest.approx((0.5 + 0 + 0.5) / 3)
  assert overlap(np.array([[3, 1], [0, 0]])) == 1


def test_coactivation_by_hand():
  # 6 tokens select {0, 1}, 2 select {0, 2}, 4 select {1}; none selects 3.
  together = np.array([[8, 6, 2, 0], [6, 10, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]])
  matrix, number, baseline = specialization.coactivation(together)
  expected = [[1, 3 / 4, 1 / 4, 0], [3 / 5, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(matrix, expected)
  # Most frequent partners: 1 of expert 0 (3/4), 0 of 1 (3/5) and of 2 (all).
  assert number == pytest.approx((8 * 3 / 4 + 10 * 3 / 5 + 2 * 1) / 20)
  # By load: expert 0 has 1 partner per token, 1 with 10 of 12; 1 has 3/5, 0 with 8 of 10; 2 has 1,
  # 1 with 10 of 18.
  expected = (8 * 10 / 12 + 10 * 3 / 5 * 8 / 10 + 2 * 10 / 18) / 20
  assert baseline == pytest.approx(expected)


def test_coactivation_between_chance_and_fixed_sets():
  rng = np.random.default_rng(4)
  chance = random_sets(rng, 50_000, 8, 2).astype(int)
  _, number, baseline = specialization.coactivation(chance.T @ chance)
  assert baseline == pytest.approx(1 / 7, rel=0.02)
  assert number == pytest.approx(baseline, rel=0.1)
  pairs = np.repeat(random_sets(rng, 1000, 4, 1).astype(int), 2, axis=1)
  assert specialization.coactivation(pairs.T @ pairs)[1] == 1
  one = random_sets(rng, 1000, 4, 1).astype(int)
  assert specialization.coactivation(one.T @ one)[1:] == (0, 0)


def test_similarity_of_random_directions():
  # In the plane the mean of |cos| is 2 / pi.
  assert specialization.random_similarity(2) == pytest.approx(2 / math.pi)
  vectors = np.random.default_rng(5).normal(size=(400, 50))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  cosine = np.abs(vectors @ vectors.T)[np.triu_indices(400, 1)]
  assert specialization.random_similarity(50) == pytest.approx(cosine.mean(), rel=0.02)


def counts_of(labels, sets):
  asked = sets.astype(int)
  return RoutingCounts(
    tokens=np.bincount(labels),
    by_token=joint_of(labels, sets, labels.max() + 1)[None],
    together=(asked.T @ asked)[None],
    by_number=np.bincount(asked.sum(1), minlength=asked.shape[1] + 1)[None],
  )


def test_all_measures_are_lists_over_layers_with_the_baseline_subtracted():
  rng = np.random.default_rng(6)
  labels = rng.integers(0, 9, 400)
  domain = (labels > 5).astype(int)
  sets = random_sets(rng, 400, 4, 2)
  sets[:, 0] = domain
  counts = counts_of(labels, sets)
  by_domain = [sets[domain == d].sum(0)[None] for d in (0, 1)]
  sizes = np.bincount(domain).tolist()
  found = specialization.measures(counts, by_domain, sizes)
  for name, of, number in (('domain', domain, 2), ('token', labels, 9)):
    baseline = baseline_of(of, sets, number)
    raw = information(joint_of(of, sets, number))
    assert found[f'router/expert_{name}_mi_baseline'] == pytest.approx([baseline])
    assert found[f'router/expert_{name}_mi'] == pytest.approx([raw - baseline])
    assert raw - baseline > 0.1
  assert np.shape(found['router/coactivation_matrix']) == (1, 4, 4)
  # One domain, and tables of token ids that were too large to keep.
  less = specialization.measures(counts._replace(by_token=None), [sets.sum(0)[None]], [400])
  assert set(less) == {f'router/coactivation{end}' for end in ('', '_baseline', '_matrix')}


def test_nobody_asked_for_anything():
  labels, sets = np.arange(6) % 3, np.zeros((6, 4), bool)
  found = specialization.measures(counts_of(labels, sets), [sets[:0].sum(0)[None]] * 2, [3, 3])
  assert found.pop('router/domain_load_overlap') == [1]
  assert not np.any([np.ravel(value).any() for value in found.values()])
