"""Hand-made studies and records, small enough to work the statistics out on paper."""

from moe_jax import config as config_lib
from moe_jax.results import summary
from moe_jax.results.records import DIVERGED, FAILED, FINISHED, Record
from moe_jax.study import Comparison, Point, Study

COMMIT = '0123456789abcdef0123456789abcdef01234567'
METRIC = 'dropless/bits_per_byte'
# Every character that LaTeX, Markdown, CSV or a shell takes for more than itself.
HOSTILE = 'a_b & 50% #1 $x$ {y} ~z ^2 \\cmd <i> | "q" `c` [d] *e* --f'
# Of data: the same text, cut otherwise.
OTHER_TOKENIZER = {'name': 'tier1', 'fingerprint': 'e' * 64, 'tokenizer': 'u' * 64}


def make_study(arms=('dense', 'moe'), **fields) -> Study:
  """Returns a study of arms given by name or as points, with seeds 0, 1 and 2."""
  points = tuple(arm if isinstance(arm, Point) else Point(arm, {}) for arm in arms)
  defaults = {'name': 'made', 'question': 'Does it help?', 'seeds': (0, 1, 2)}
  return Study(**{'base': config_lib.get_config(), 'arms': points} | defaults | fields)


def make_record(arm='dense', seed=0, value=2.0, metrics=None, **fields) -> Record:
  """Returns the record of a finished trial with a value of the metric, unless `fields` differ."""
  finished = fields.get('status', FINISHED) == FINISHED
  defaults = {
    'trial': f'{arm} {seed}',
    'status': FINISHED,
    'step': 100,
    'num_steps': 100,
    'config': make_config(),
    'data': {'name': 'tier1', 'fingerprint': 'f' * 64, 'tokenizer': 't' * 64},
    'git_commit': COMMIT,
    'git_dirty': False,
    'devices': {'platform': 'cpu', 'kind': 'cpu', 'count': 8},
    'parameters': {'total': 1_200_000, 'active': 400_000},
    'flops_per_token': 2_400_000,
    'tokens': 800_000,
    'metrics': ({METRIC: value} | (metrics or {})) if finished else {},
  }
  return Record(arm=arm, seed=seed, **defaults | fields)


def make_records(values: dict[str, list[float]]) -> list[Record]:
  """Returns finished trials: {arm: [value of seed 0, of seed 1, ...]}."""
  return [
    make_record(arm, seed, value) for arm, row in values.items() for seed, value in enumerate(row)
  ]


def make_config(**moe) -> dict:
  """Returns a resolved config with changes of its room `moe`."""
  config = config_lib.get_config()
  config.moe.update(moe)
  return config.to_dict()


def make_broken() -> summary.Summary:
  """A summary with everything that can go wrong, under names that mean something to each format."""
  arms = (
    'dense',
    HOSTILE,
    Point('single', {'moe.num_experts': 4}),
    Point('[none] \\', {}, 'K_2 > E & more'),
    'dead',
  )
  study = make_study(
    arms,
    question='Is 50% of $5 {enough}?',
    name='my_study',
    baseline='dense',
    comparisons=(Comparison(HOSTILE, 'dense'), Comparison('dead', HOSTILE)),
  )
  records = [
    *make_records({'dense': [2.0, 2.1, 2.2]}),
    make_record(HOSTILE, 0, 1.5, metrics={'capacity/router/drop_share': 0.25}),
    make_record(HOSTILE, 1, 1.62, metrics={'capacity/router/drop_share': 0.5}),
    make_record(
      HOSTILE, 2, status=DIVERGED, step=40, reason='loss is nan:\n\n  x_1 ^ \\end{tabular} & %'
    ),
    make_record('single', 1, 1.23456789, changes={'moe.num_experts': 4}),
    *(make_record('dead', seed, status=FAILED, reason='λ\x00é') for seed in range(3)),
  ]
  return summary.summarize(study, records)
