"""Tables of hand-made studies: numbers as they must read, and names that no format can break."""

import csv
import io
import math
import pathlib
import re
import shutil
import subprocess

import hypothesis
import pytest
from hypothesis import strategies

from moe_jax.errors import UserError
from moe_jax.results import markup, methods, summary, tables
from moe_jax.results.records import DIVERGED, FAILED
from moe_jax.results.statistics import Interval
from moe_jax.study import Comparison, Point
from tests.results import made

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
NUMBER = tables._Style(str, str, '-')


@pytest.fixture(scope='module')
def broken():
  """A summary with everything that can go wrong, under names that mean something to each format."""
  arms = (
    'dense',
    made.HOSTILE,
    Point('single', {'moe.num_experts': 4}),
    Point('[none] \\', {}, 'K_2 > E & more'),
    'dead',
  )
  study = made.make_study(
    arms,
    question='Is 50% of $5 {enough}?',
    name='my_study',
    baseline='dense',
    comparisons=(Comparison(made.HOSTILE, 'dense'), Comparison('dead', made.HOSTILE)),
  )
  records = [
    *made.make_records({'dense': [2.0, 2.1, 2.2]}),
    made.make_record(made.HOSTILE, 0, 1.5, metrics={'capacity/router/drop_share': 0.25}),
    made.make_record(made.HOSTILE, 1, 1.62, metrics={'capacity/router/drop_share': 0.5}),
    made.make_record(
      made.HOSTILE, 2, status=DIVERGED, step=40, reason='loss is nan:\n\n  x_1 ^ \\end{tabular} & %'
    ),
    made.make_record('single', 1, 1.23456789, changes={'moe.num_experts': 4}),
    *(made.make_record('dead', seed, status=FAILED, reason='λ\x00é') for seed in range(3)),
  ]
  return summary.summarize(study, records)


def test_arms_in_markdown():
  values = {'dense': [3.0, 5.0, 7.0], 'moe': [2.0, 3.0, 4.0]}
  study = made.make_study(baseline='dense', comparisons=(Comparison('moe', 'dense'),))
  text = tables.markdown(summary.summarize(study, made.make_records(values)))
  # Half widths: 4.30265 * 2 / sqrt(3) = 4.968 and half of it. Tokens of an expert: 2 of 8.
  rest = '1.2M | 400k | 2.4M | 800k | 200k |\n'
  assert f'\n| dense | 3 of 3 | 5.0 ± 5.0 | - | {rest}' in text
  assert f'\n| moe | 3 of 3 | 3.0 ± 2.5 | -2.0 ± 2.5 | {rest}' in text
  # p = 1 - sqrt(12 / 14).
  assert '\n| moe | dense | open | 3 | -2.0 ± 2.5 | 0.074 | 0.074 |\n' in text
  assert text.startswith('Does it help?\n\n| arm | averaged | bits per byte | minus dense |')
  assert 'dropless/bits\\_per\\_byte in bits per byte on the test split (lower is better)' in text
  for title in ('Trials without', 'Arms that were not run', 'Warnings'):
    assert title not in text


def test_nothing_is_left_out_of_markdown(broken):
  text = tables.markdown(broken)
  for row in _markdown_rows(text):
    assert len(row) in (9, 7)
  names = [row[0] for row in _markdown_rows(text) if len(row) == 9][2:]
  assert names == ['dense', made.HOSTILE, 'single', 'dead']
  plain = _markdown_shown(text)
  assert f'- {made.HOSTILE}, seed 2: diverged at step 40 of 100: loss is nan: x_1 ^ ' in plain
  assert '- single, seed 0: missing: no record\n' in plain
  assert plain.count('- dead, seed ') == 3 and '- [none] \\: K_2 > E & more\n' in plain
  for warning in broken.warnings:
    assert f'- {warning}\n' in plain
  assert '| single | 1 of 3 | 1.235 | -0.8654 |' in text
  assert '| dead | 0 of 3 | - | - | 1.2M | 400k | 2.4M | - | - |' in text
  # Differences -0.5 and -0.48: t = 0.49 / 0.01, p = 2 / pi * atan(1 / 49) = 0.0130. Holm's over
  # both, also where nothing is paired and there is no p-value.
  assert re.search(r'\| dense \| better \| 2 \| -0.49 ± 0.13 \| 0.013 \| 0.026 \|\n', text)
  assert re.search(r'\| dead \| .* \| untested \| 0 \| - \| - \| - \|\n', text)


def test_nothing_is_left_out_of_latex(broken):
  text = tables.latex(broken)
  cells = check_latex(text)
  arms, planned = _joined(cells)
  assert list(arms) == ['arm', 'dense', made.HOSTILE, 'single', 'dead']
  assert [len(row) for row in arms.values()] == [8] * 5
  assert [row[:2] for row in planned.values()] == [
    ['minus', 'verdict'],
    ['dense', 'better'],
    [made.HOSTILE, 'untested'],
  ]
  assert list(planned) == ['arm', made.HOSTILE, 'dead']
  assert arms['single'][:3] == ['1 of 3', '$1.235$', '$-0.8654$']
  assert arms['dense'][1] == r'$2.10 \pm 0.25$'
  items = [_shown(item) for item in re.findall(r'^\\item (.*)$', text, re.MULTILINE)]
  assert items[0] == (
    f'{made.HOSTILE}, seed 2: diverged at step 40 of 100: loss is nan: x_1 ^ \\end{{tabular}} & %'
  )
  assert items[1] == 'single, seed 0: missing: no record'
  assert items[3] == 'dead, seed 0: failed at step 100 of 100: [U+03BB][U+0000]é'
  assert items[-1] == '[none] \\: K_2 > E & more' and len(items) == 7
  comments = [line for line in text.split('\n') if line.startswith('%')]
  assert comments[2:] == [f'% Warning: {warning}' for warning in broken.warnings]


def test_a_wide_latex_table_goes_on_in_a_second_one(broken):
  text = tables.latex(broken)
  assert text.count(r'\begin{tabular}') > 2
  for row in check_latex(text):
    # With the two characters between columns. Beside names that long one column is not too many.
    width = sum(len(cell.strip('$').replace(r'\pm', '±')) + 2 for cell in row)
    assert width <= 88 or len(row) in (2, 4)
  # An arm of a short name needs one.
  narrow = made.make_study()
  assert tables.latex(summary.summarize(narrow, [])).count(r'\begin{tabular}') == 2


def _joined(cells: list[list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
  """Returns cells beside the name of an arm, of all parts: of arms, of planned comparisons."""
  arms: dict[str, list[str]] = {}
  planned: dict[str, list[str]] = {}
  first = cells.index(next(row for row in cells if row[:2] == ['arm', 'minus']))
  for number, (name, *others) in enumerate(cells):
    (arms if number < first else planned).setdefault(name, []).extend(others)
  return arms, planned


def test_further_columns(broken):
  name = 'capacity/router/drop_share'
  row = _markdown_rows(tables.markdown(broken, {name: 'drops'}))[3]
  # 0.25 and 0.5: deviation 0.177, standard error 0.125, half width 12.7062 * 0.125.
  assert row[0] == made.HOSTILE and row[9] == '0.4 ± 1.6'
  cells = check_latex(tables.latex(broken, {name: 'drops'}))
  arms, _ = _joined(cells)
  assert [row[-1] for row in arms.values()][:3] == ['drops', '--', r'$0.4 \pm 1.6$']
  for table in (tables.markdown, tables.latex):
    with pytest.raises(UserError, match='metrics=.*capacity/router/drop_share'):
      table(broken, {'capacity/drop_share': 'drops'})


@pytest.mark.parametrize(
  ('mean', 'half', 'text'),
  [
    (2.28234, 0.01214, '2.282 ± 0.012'),
    (2.28234, 0.0996, '2.282 ± 0.100'),
    (2.28234, 1.26, '2.3 ± 1.3'),
    (123.456, 34.4, '123 ± 34'),
    (12345.6, 678.9, '12346 ± 679'),
    (-0.0001, 0.01, '0.000 ± 0.010'),
    (1e-6, 2.5e-7, '0.00000100 ± 0.00000025'),
    (2.0, 1e-17, '2.000000000000 ± 0.000000000000'),
    (2.0, 0.0, '2 ± 0'),
    (1.23456, math.nan, '1.235'),
    (math.nan, math.nan, '-'),
  ],
)
def test_digits_come_from_the_interval(mean, half, text):
  interval = Interval(mean, mean - half, mean + half, 3)
  if half == 1e-17:
    interval = Interval(0.0, -half, half, 3)
    text = text.replace('2.0', '0.0')
  assert tables._interval(interval, NUMBER) == text
  if not math.isnan(mean):
    sign = '' if text.startswith('-') else '+'
    assert tables._interval(interval, NUMBER, '+') == sign + text


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, '0'), (999, '999'), (999.4, '999'), (999.6, '1k'), (1234, '1.23k'), (999_600, '1M'),
    (3.28e6, '3.28M'), (1.5e9, '1.5G'), (2e12, '2T'), (4096.5, '4.1k'),
  ],
)  # fmt: skip
def test_counts(number, text):
  assert tables.count(number) == text


@pytest.mark.parametrize(
  ('p', 'text'), [(math.nan, '-'), (0.0004, '<0.001'), (0.0123, '0.012'), (1.0, '1.000')]
)
def test_p_values(p, text):
  assert tables._p_value(p, NUMBER) == text


def test_csv_has_every_arm_and_every_digit(broken):
  rows = list(csv.DictReader(io.StringIO(tables.csv_text(broken))))
  assert [row['arm'] for row in rows] == [arm.name for arm in broken.arms]
  by_name = {row['arm']: row for row in rows}
  hostile, arm = by_name[made.HOSTILE], broken.arms[1]
  assert float(hostile['mean']) == arm.interval.mean
  assert float(hostile['low']) == arm.interval.low
  assert float(hostile['high']) == arm.interval.high
  assert float(hostile['bootstrap_low']) == 1.5 and float(hostile['bootstrap_high']) == 1.62
  assert float(hostile['difference']) == arm.difference.interval.mean
  assert float(hostile['difference_low']) == arm.difference.interval.low
  assert float(hostile['difference_p']) == arm.difference.p_value
  assert hostile['difference_pairs'] == '2' and hostile['trials'] == '3'
  assert (hostile['seed 0'], hostile['seed 1'], hostile['seed 2']) == ('1.5', '1.62', '')
  assert hostile['capacity/router/drop_share'] == '0.375'
  assert hostile['without_value'].startswith('seed 2: diverged at step 40 of 100: loss is nan')
  assert hostile['parameters_total'] == '1200000' and hostile['tokens_per_expert'] == '200000.0'
  single, none, dead = by_name['single'], by_name['[none] \\'], by_name['dead']
  assert single['mean'] == '1.23456789' and single['low'] == single['difference_p'] == ''
  assert none['dropped'] == 'K_2 > E & more' and none['mean'] == '' and none['averaged'] == '0'
  assert dead['mean'] == '' and dead['without_value'].count('failed') == 3
  assert all(None not in row and None not in row.values() for row in rows)


def test_methods_say_what_was_done(broken):
  text = methods.methods(broken)
  assert check_latex(text) == [] and text.count('\n') == 1
  for words in (
    'my\\_study (4 arms): Is 50\\% of',
    '2 blocks, width 128, 4 heads; they have 1.2M parameters, of which 400k',
    'differ in moe.num\\_experts.',
    'tier1 (fingerprint ffffffffffffffff) as bytes for 1000 steps, 32 sequences a step',
    'seeds 0, 1, 2,',
    'dropless/bits\\_per\\_byte in bits per byte on the test split (lower is better)',
    '2 planned comparisons: mean difference paired by seed',
    # dense 3, hostile 2, single 1.
    '6 of 12 trials have no value and are in no mean (1 diverged, 2 missing, 3 failed)',
    f'moe\\_jax at commit {made.COMMIT}, on 8 x cpu (cpu).',
  ):
    assert words in text, (words, text)
  assert 'uncommitted' not in text and 'causal' not in text


def test_methods_say_what_is_wrong():
  records = [
    made.make_record(
      'dense',
      seed,
      config=made.make_config(router='expert_choice', num_experts=4 + 4 * seed),
      git_dirty=True,
      git_commit=commit,
      parameters={'total': 1000 + seed, 'active': 1000 * (1 + seed)},
    )
    for seed, commit in enumerate(['a1', 'b2'])
  ]
  made_of = summary.summarize(made.make_study(['dense'], seeds=(0, 1)), records)
  text = methods.methods(made_of)
  assert (
    'dense is not causal: a token can depend on later ones (moe.router=expert\\_choice)' in text
  )
  assert 'commits a1, b2 with uncommitted changes' in text
  assert 'Arms differ' not in text and 'planned' not in text and 'no value' not in text
  note = 'note = {Git commits a1, b2, with uncommitted changes}'
  assert note in methods.bibtex(made_of)


def test_a_study_without_records():
  empty = summary.summarize(made.make_study(), [])
  check_latex(tables.latex(empty))
  check_latex(methods.methods(empty))
  assert tables.markdown(empty).count('missing: no record') == 6
  assert tables.csv_text(empty).count('\n') == 3
  assert 'note = {Git commit unknown}' in methods.bibtex(empty)
  assert tables.csv_text(summary.summarize(made.make_study(()), [])) == 'arm\n'


def test_bibtex_is_what_citation_says(broken):
  citation = (REPOSITORY / 'CITATION.cff').read_text(encoding='utf-8')
  of = dict(re.findall(r'^(?:  - )?(\w[\w-]*): (.+)$', citation, re.MULTILINE))
  assert (of['title'], of['name']) == (methods.TITLE, methods.AUTHOR)
  assert (of['version'], of['license']) == (methods.VERSION, methods.LICENSE)
  assert len(re.findall(r'^  - name:', citation, re.MULTILINE)) == 1
  text = methods.bibtex(broken)
  assert text.startswith('@misc{moe_jax,\n') and text.count('{') == text.count('}')
  assert 'author = {{The moe\\_jax maintainers}}' in text and f'Git commit {made.COMMIT}' in text


@hypothesis.given(strategies.text(strategies.characters(max_codepoint=0x7F), max_size=40))
@hypothesis.example('[0]')
@hypothesis.example('*')
@hypothesis.example(made.HOSTILE)
def test_latex_shows_any_ascii(text):
  escaped = markup.escape_latex(text)
  check_latex(escaped)
  visible = ''.join(f'[U+{ord(c):04X}]' if not ' ' <= c <= '~' else c for c in _one_line(text))
  assert _shown(escaped) == visible
  row = f'\\begin{{tabular}}{{ll}}\n{escaped} & {escaped} \\\\\n{escaped} & \\\\\n\\end{{tabular}}'
  assert [row[0] for row in check_latex(row)] == [visible.strip()] * 2


@hypothesis.given(strategies.text(max_size=40))
def test_latex_has_no_character_that_fonts_may_lack(text):
  for char in markup.escape_latex(text):
    assert char in 'éüñçŠ' or char.isascii() or 0xC0 <= ord(char) < 0x180


@hypothesis.given(strategies.text(max_size=40))
def test_markdown_shows_any_text(text):
  escaped = markup.escape_markdown(text)
  assert _markdown_shown(escaped) == _one_line(text)
  assert _markdown_rows(f'| {escaped} | x |\n') == [[_one_line(text), 'x']]


@pytest.mark.parametrize(
  ('text', 'latex'),
  [
    ('a_b', r'a\_b'),
    ('\\', r'\textbackslash{}'),
    ('{}', r'\{\}'),
    ('x^2~', r'x\textasciicircum{}2\textasciitilde{}'),
    ('<->', r'\textless{}-\textgreater{}'),
    ('---x', '-{}-{}-x'),
    ('é ± λ', r'é \ensuremath{\pm} {[}U+03BB{]}'),
    ('a\n\tb', 'a b'),
  ],
)
def test_latex_by_hand(text, latex):
  assert markup.escape_latex(text) == latex


@pytest.mark.parametrize(
  'text',
  [
    'a_b', '50%', 'a & b', 'x}', '{x', r'\begin{tabular}{ll} a \\ \end{tabular}', 'a # b', '2^3',
    'a~b', '$1', 'a<b', r'\unknown', 'λ',
    '\\begin{tabular}{ll}\na & b & c \\\\\n\\end{tabular}',
    '\\begin{tabular}{ll}\na & b \\\\\n[c] & d \\\\\n\\end{tabular}',
    '\\begin{tabular}{ll}\na & b\n\\end{tabular}',
    '\\begin{itemize}\n\\item[a] b\n\\end{itemize}',
    '\\begin{itemize}',
  ],
)  # fmt: skip
def test_the_check_of_latex_finds_errors(text):
  with pytest.raises(AssertionError):
    check_latex(text)


@pytest.mark.slow
def test_compilers_at_hand_take_it(broken, tmp_path):
  # In addition to the checks above, which need none.
  document = '\n'.join(
    [
      r'\documentclass{article}',
      r'\usepackage{booktabs}',
      r'\begin{document}',
      r'\begin{table}',
      tables.latex(broken, {'capacity/router/drop_share': 'drops'}),
      r'\end{table}',
      methods.methods(broken),
      # Everything of ASCII, and the accents that are let through.
      markup.escape_latex(''.join(map(chr, range(0x180)))),
      r'\end{document}',
    ]
  )
  (tmp_path / 'paper.tex').write_text(document, encoding='utf-8')
  options = {
    'pdflatex': ['-halt-on-error', '-interaction=nonstopmode', '-draftmode'],
    'tectonic': [],
  }
  for compiler, flags in options.items():
    if shutil.which(compiler):
      done = subprocess.run(
        [compiler, *flags, 'paper.tex'], cwd=tmp_path, capture_output=True, timeout=300, check=False
      )
      assert done.returncode == 0, done.stdout[-2000:]


# What the tables may use: anything else would have come out of a name.
_COMMANDS = {
  'toprule', 'midrule', 'bottomrule', 'medskip', 'noindent', 'item', 'pm', 'ensuremath', 'times',
  'textbackslash', 'textasciicircum', 'textasciitilde', 'textless', 'textgreater', 'textbar',
  'textquotedblright', 'textquoteleft',
}  # fmt: skip
_SHOWN = {latex: char for char, latex in markup.LATEX.items()} | {'-{}': '-'}
_TOKEN = re.compile(
  r'\\begin\{(?P<begin>\w+)\}(?:\{(?P<columns>[lr]+)\})?|\\end\{(?P<end>\w+)\}'
  r'|\\(?P<command>[a-zA-Z]+)|(?P<row>\\\\)|\\(?P<escaped>[&%$#_{}])|(?P<char>.)',
  re.DOTALL,
)


def check_latex(text: str) -> list[list[str]]:
  """Checks syntax without a compiler and returns the cells of all tabulars, as they will be shown.

  Braces, environments and dollars are balanced, each row has as many cells as its tabular columns,
  and special characters are escaped.
  """
  text = re.sub('^%.*\n', '', text, flags=re.MULTILINE)
  environments, depth, math_mode, columns, rows = [], 0, False, 0, []
  cells, cell = [], ''
  for token in _TOKEN.finditer(text):
    kind, value = token.lastgroup, token.group()
    after = text[token.end() :].lstrip()
    if kind in ('begin', 'columns'):
      assert depth == 0 and not math_mode and token['begin'] in ('tabular', 'itemize')
      assert (token['begin'] == 'tabular') == bool(token['columns'])
      environments.append(token['begin'])
      columns, cells, cell = len(token['columns'] or ''), [], ''
      continue
    if kind == 'end':
      assert environments and environments.pop() == token['end'] and depth == 0 and not math_mode
      assert not columns or (cells == [] and not cell.replace(r'\bottomrule', '').strip()), cell
      columns = 0
    elif kind == 'command':
      assert token['command'] in _COMMANDS, value
      assert token['command'] != 'item' or (environments[-1:] == ['itemize'] and after[:1] != '[')
    elif kind == 'row':
      assert columns and depth == 0 and not math_mode and after[:1] not in ('[', '*'), value
      rows.append([_shown(re.sub(r'\\\w+rule', '', c).strip()) for c in [*cells, cell]])
      assert len(rows[-1]) == columns, rows[-1]
      cells, cell = [], ''
      continue
    elif kind == 'char':
      assert value not in '#%_^~|"`\\', (value, after[:20])
      assert value not in '<>' or math_mode, (value, after[:20])
      assert value.isascii() or markup.is_plain(value), value
      depth += {'{': 1, '}': -1}.get(value, 0)
      assert depth >= 0
      math_mode ^= value == '$'
      if value == '&':
        assert columns and depth == 0 and not math_mode, after[:20]
        cells, cell = [*cells, cell], ''
        continue
    cell += value
  assert not environments and depth == 0 and not math_mode
  return rows


def _shown(latex: str) -> str:
  """Returns what LaTeX shows of escaped text; numbers in dollars stay."""
  if re.fullmatch(r'\$[^$\\]*(\\pm[^$\\]*)?\$', latex):
    return latex
  longest_first = sorted(_SHOWN, key=len, reverse=True)
  return re.sub('|'.join(map(re.escape, longest_first)), lambda m: _SHOWN[m.group()], latex)


def _markdown_shown(text: str) -> str:
  """Returns text without the backslashes that Markdown takes for escapes: those before ASCII."""
  return re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', text)


def _markdown_rows(text: str) -> list[list[str]]:
  """Returns the cells of all tables, as they will be shown."""
  rows = []
  for line in text.split('\n'):
    if line.startswith('|'):
      cells = re.findall(r'((?:\\.|[^\\|])*)\|', line)[1:]
      rows.append([_markdown_shown(cell).strip() for cell in cells])
  return rows


def _one_line(text: str) -> str:
  return ' '.join(text.split())
