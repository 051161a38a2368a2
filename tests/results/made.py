"""Hand-made studies and records, small enough to work the statistics out on paper."""

from moe_jax import config as config_lib
from moe_jax.results.records import FINISHED, Record
from moe_jax.study import Point, Study

COMMIT = '0123456789abcdef0123456789abcdef01234567'
METRIC = 'dropless/bits_per_byte'
# Every character that LaTeX, Markdown, CSV or a shell takes for more than itself.
HOSTILE = 'a_b & 50% #1 $x$ {y} ~z ^2 \\cmd <i> | "q" `c` [d] *e* --f'


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
