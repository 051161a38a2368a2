"""The page of a study as a file: what it holds and what it cannot do."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import math

import pytest

from moe_jax.results.page import Cell, write_page
from moe_jax.results.records import STATUSES
from tests.results import example

STUDY, RECORDS = example.study(), example.records()


class _Parser(html.parser.HTMLParser):
  """Every element with its attributes, and the text of those that hold raw text."""

  def __init__(self):
    super().__init__()
    self.elements = []
    self.texts = {}

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_data(self, data):
    if self.elements and self.elements[-1][0] in ('script', 'style', 'title') and data.strip():
      self.texts.setdefault(self.elements[-1][0], []).append(data)


def _written(tmp_path, study=STUDY, records=RECORDS, columns=None, rows=None):
  """The page parsed, and its data."""
  default_columns, default_rows = example.table()
  path = write_page(
    study,
    records,
    default_columns if columns is None else columns,
    default_rows if rows is None else rows,
    tmp_path / 'index.html',
  )
  parser = _Parser()
  parser.feed(path.read_text(encoding='utf-8'))
  return parser, json.loads(parser.texts['script'][0])


def test_the_same_records_give_the_same_page_and_nothing_else_is_left(tmp_path):
  for name in ('one.html', 'other.html'):
    write_page(STUDY, RECORDS, *example.table(), tmp_path / name)
  one, other = sorted(tmp_path.iterdir())
  assert one.read_bytes() == other.read_bytes()


def test_nothing_is_loaded_from_anywhere(tmp_path):
  parser, _ = _written(tmp_path)
  links = {
    value
    for _, attributes in parser.elements
    for name, value in attributes.items()
    if name in ('src', 'href', 'srcset', 'action', 'data', 'poster', 'style')
  }
  assert links == {'data:,'}
  # Data, then the program; neither asks for anything by itself.
  data, script = parser.texts['script']
  (style,) = parser.texts['style']
  assert 'url(' not in style and '@import' not in style
  for word in ('fetch(', 'XMLHttpRequest', 'WebSocket', 'import(', 'eval(', 'innerHTML'):
    assert word not in script
  # The name of an XML namespace is the only address.
  assert script.count('http') == script.count('http://www.w3.org/2000/svg') == 1
  assert 'http' not in style


def test_the_security_policy_names_this_script_and_style_alone(tmp_path):

  parser, _ = _written(tmp_path)
  policy = next(
    attributes['content']
    for _, attributes in parser.elements
    if attributes.get('http-equiv') == 'Content-Security-Policy'
  )
  rules = dict(rule.strip().split(' ', 1) for rule in policy.split(';'))
  assert rules['default-src'] == "'none'"
  for kind, text in (('script', parser.texts['script'][1]), ('style', parser.texts['style'][0])):
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert rules[f'{kind}-src'] == f"'sha256-{digest}'"


@pytest.mark.parametrize(
  'hostile',
  [
    example.HOSTILE,
    '<!--<script>',
    ']]> &lt; \u2028 \u2029 \x00 \\u003c/script> {{data}} {{script}} \\1 \\g<0>',
  ],
)
def test_hostile_text_anywhere_stays_text(hostile, tmp_path):
  before, _ = _written(tmp_path)
  records = [
    dataclasses.replace(
      record,
      arm=hostile,
      reason=hostile,
      command=hostile,
      git_commit=hostile,
      config={hostile: {hostile: hostile}},
      data={'name': hostile},
      metrics={hostile: 1.0},
    )
    for record in RECORDS[:3]
  ]
  study = dataclasses.replace(STUDY, name=hostile, question=hostile, arms=())
  rows = [{'arm': hostile, hostile: Cell(hostile, hostile)}]
  after, content = _written(tmp_path, study, records, {'arm': hostile, hostile: hostile}, rows)
  # The markup is the same but for the data.
  assert [tag for tag, _ in after.elements] == [tag for tag, _ in before.elements]
  assert after.texts['script'][1] == before.texts['script'][1]
  assert content['study']['question'] == hostile
  assert content['rows'] == [{'arm': hostile, hostile: {'text': hostile, 'order': hostile}}]
  assert content['columns'] == [['arm', hostile], [hostile, hostile]]
  for record in content['records']:
    assert record['arm'] == record['reason'] == record['command'] == hostile
    assert record['config'] == {hostile: {hostile: hostile}}


def test_every_trial_comes_with_all_that_is_shown(tmp_path):
  _, content = _written(tmp_path)
  assert len(content['records']) == len(RECORDS)
  for shown, record in zip(content['records'], RECORDS, strict=True):
    whole = json.loads(json.dumps(dataclasses.asdict(record)))
    del whole['load']
    for domains in whole['domains'].values():
      for metrics in domains.values():
        metrics.pop('router/load', None)
    assert shown == whole
  assert content['study']['arms'] == [arm.name for arm in STUDY.arms]
  assert content['study']['dropped'] == [
    ['num_experts=1, num_selected_experts=2', 'a token cannot select 2 of 1 expert']
  ]
  assert content['study']['metric']['name'] == 'dropless/bits_per_byte'


def test_the_program_knows_every_status(tmp_path):
  parser, _ = _written(tmp_path)
  script = parser.texts['script'][1]
  assert f'const STATUSES = [FINISHED, {", ".join(map(repr, STATUSES[1:]))}];' in script


def test_numbers_that_json_lacks_become_gaps(tmp_path):
  record = dataclasses.replace(
    RECORDS[0], curve=[[1, math.nan], [2, math.inf]], metrics={'loss': -math.inf, 'layers': (1, 2)}
  )
  rows = [{'arm': 'dense', 'mean': math.nan, 'other': 1}]
  _, content = _written(tmp_path, records=[record], columns={'arm': '', 'mean': ''}, rows=rows)
  assert content['records'][0]['curve'] == [[1, None], [2, None]]
  assert content['records'][0]['metrics'] == {'loss': None, 'layers': [1, 2]}
  assert content['rows'] == [{'arm': 'dense', 'mean': None}]


def test_cells_have_a_text_and_an_order(tmp_path):
  columns = {'arm': 'arm', 'mean': 'mean', 'gap': 'gap'}
  rows = [{'arm': 'dense', 'mean': Cell('2.5 ± 0.1', 2.5), 'gap': Cell('', None)}]
  _, content = _written(tmp_path, columns=columns, rows=rows)
  assert content['rows'] == [
    {
      'arm': 'dense',
      'mean': {'text': '2.5 ± 0.1', 'order': 2.5},
      'gap': {'text': '', 'order': None},
    }
  ]


@pytest.mark.parametrize(
  ('columns', 'rows'), [({'mean': 'mean'}, []), ({'arm': 'arm'}, [{'mean': 1.0}])]
)
def test_a_table_without_arms_is_refused(columns, rows, tmp_path):
  with pytest.raises(ValueError, match='must have an arm'):
    write_page(STUDY, RECORDS, columns, rows, tmp_path / 'index.html')
  assert list(tmp_path.iterdir()) == []


def test_a_study_without_trials_has_a_page(tmp_path):
  _, content = _written(tmp_path, records=[], rows=[])
  assert content['records'] == content['rows'] == []
