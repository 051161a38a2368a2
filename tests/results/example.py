"""A study with hand-made records: of every status, with everything that figures and pages show."""

import hashlib
import math

import numpy as np

from moe_jax import config as config_lib
from moe_jax.results.records import DIVERGED, FAILED, FINISHED, UNFINISHED, Record
from moe_jax.study import Comparison, Study, chain, point, product, where

NUM_STEPS, NUM_LAYERS = 1000, 2
DOMAINS = ('drama', 'epic', 'scripture')
HOSTILE = '</script><script>alert(1)</script> "quoted" & \'single\' <img src=x onerror=alert(2)>'
TOP_1 = 'num_experts={}, num_selected_experts=1'
TOP_2 = 'num_experts={}, num_selected_experts=2'

# The trials that did not end well, by (arm, seed).
_ENDINGS = {
  (TOP_1.format(64), 2): (DIVERGED, 'loss is nan at step 420', 420),
  (TOP_2.format(16), 1): (FAILED, HOSTILE, 0),
  (TOP_1.format(4), 0): (UNFINISHED, 'stopped by SIGTERM', 700),
}


def study() -> Study:
  axes = {'moe.num_experts': (4, 16, 64), 'moe.num_selected_experts': (1, 2)}
  too_few = product({'moe.num_experts': (1,), 'moe.num_selected_experts': (2,)})
  return Study(
    name='expert_count',
    question='Do more experts help at equal training FLOPs?',
    base=config_lib.get_config(),
    arms=chain(
      point('dense', {'moe.num_experts': 0}),
      product(axes),
      where(
        too_few,
        lambda changes: changes['moe.num_experts'] >= changes['moe.num_selected_experts'],
        'a token cannot select 2 of 1 expert',
      ),
    ),
    seeds=(0, 1, 2),
    baseline='dense',
    comparisons=(Comparison(TOP_2.format(64), 'dense'),),
    x='moe.num_experts',
    lines='moe.num_selected_experts',
  )


def records() -> list[Record]:
  """Returns a record of each trial, the same at each call."""
  of = study()
  return [
    _record(arm.name, arm.changes, seed) for arm in of.arms if not arm.dropped for seed in of.seeds
  ]


def table() -> tuple[dict[str, str], list[dict]]:
  """Returns columns and rows as a caller of `write_page` gives them."""
  columns = {'arm': 'arm', 'mean': 'mean (bits per byte)', 'total': 'parameters', 'note': 'note'}
  rows = []
  for arm in [arm.name for arm in study().arms if not arm.dropped]:
    trials = [record for record in records() if record.arm == arm]
    values = [r.metrics['dropless/bits_per_byte'] for r in trials if r.status == FINISHED]
    rows.append(
      {
        'arm': arm,
        'mean': float(np.mean(values)),
        'total': trials[0].parameters['total'],
        'note': HOSTILE if arm == 'dense' else None,
      }
    )
  return columns, rows


def _record(arm: str, changes: dict, seed: int) -> Record:
  config = config_lib.get_config()
  with config.unlocked():
    for field, value in (changes | {'train.seed': seed, 'train.num_steps': NUM_STEPS}).items():
      room, name = field.split('.')
      config[room][name] = value
  num_experts = config.moe.num_experts
  selected = config.moe.num_selected_experts if num_experts else 0
  key = f'{arm} {seed}'
  trial = hashlib.sha256(key.encode()).hexdigest()[:12]
  rng = np.random.default_rng(int(trial, 16))
  status, reason, step = _ENDINGS.get((arm, seed), (FINISHED, '', NUM_STEPS))
  quality = 2.5 - 0.05 * math.log2(max(num_experts, 1)) - 0.08 * selected + 0.02 * rng.normal()
  sparse = step > 0 and num_experts > 0
  metrics, domains = {}, {}
  if status == FINISHED:
    for evaluation, worse, drop in (('capacity', 0.02, 0.02 + 0.02 * selected), ('dropless', 0, 0)):
      metrics[f'{evaluation}/bits_per_byte'] = quality + worse
      metrics[f'{evaluation}/loss'] = (quality + worse) * math.log(2)
      domains[evaluation] = {
        domain: {'bits_per_byte': quality + worse + 0.1 * index}
        for index, domain in enumerate(DOMAINS)
      }
      if num_experts:
        shares = np.abs(drop * (1 + 0.3 * rng.normal(size=NUM_LAYERS)))
        metrics[f'{evaluation}/router/drop_share'] = float(shares.mean())
        metrics[f'{evaluation}/router/drop_share_per_layer'] = shares.tolist()
        for of_domain in domains[evaluation].values():
          load = rng.dirichlet(np.full(num_experts, 2.0), NUM_LAYERS)
          of_domain['router/load'] = load.tolist()
  active = 400_000 + 100_000 * selected + (200_000 if not num_experts else 0)
  return Record(
    trial=trial,
    arm=arm,
    seed=seed,
    status=status,
    reason=reason,
    step=step,
    num_steps=NUM_STEPS,
    changes=dict(changes),
    config=config.to_dict(),
    data={'name': 'tier1', 'fingerprint': 'a3f1' * 16, 'tokenizer': 'bytes'} if step else {},
    git_commit='0123456789abcdef0123456789abcdef01234567' if step else None,
    git_dirty=arm == 'dense' if step else None,
    devices={'platform': 'cpu', 'kind': 'cpu', 'count': 8} if step else {},
    mesh={'data': 2, 'expert': 4} if step else {},
    parameters={'total': 400_000 + 200_000 * max(num_experts, 1), 'active': active},
    flops_per_token=6 * active + num_experts,
    tokens=step * 8192,
    metrics=metrics,
    domains=domains,
    curve=_curve(quality, step, status, rng),
    load=_load(num_experts, step, rng) if sparse else [],
    command=f"python -m moe_jax.sweep trial --study=expert_count --arm='{arm}' --seed={seed}",
  )


def _curve(quality: float, step: int, status: str, rng: np.random.Generator) -> list:
  steps = np.arange(25, step + 1, 25)
  losses = quality * math.log(2) + 4 * np.exp(-steps / 90) + 0.01 * rng.normal(size=len(steps))
  if status == DIVERGED:
    losses[-4:] *= np.array([1.1, 1.4, 3, 20])
  return [[int(at), float(loss)] for at, loss in zip(steps, losses, strict=True)]


def _load(num_experts: int, step: int, rng: np.random.Generator) -> list:
  start = rng.dirichlet(np.full(num_experts, 1.0), NUM_LAYERS)
  rows = []
  for at in range(50, step + 1, 50):
    share = start * math.exp(-at / 250) + (1 - math.exp(-at / 250)) / num_experts
    share = share * np.exp(0.1 * rng.normal(size=share.shape))
    rows.append([at, (share / share.sum(-1, keepdims=True)).tolist()])
  return rows
