"""Text as LaTeX and Markdown show it, without a compiler, and a check of their syntax."""

import re

from moe_jax.results import markup

# What the tables may use: anything else would have come out of a name.
_COMMANDS = {
  'toprule', 'midrule', 'bottomrule', 'smallskip', 'medskip', 'par', 'pm', 'ensuremath', 'times',
  'centering',
  'emergencystretch', 'caption', 'label', 'footnotesize', 'setlength', 'tabcolsep', 'allowbreak',
  'textbackslash', 'textasciicircum', 'textasciitilde', 'textless', 'textgreater', 'textbar',
  'textquotedblright', 'textquoteleft',
}  # fmt: skip
_SHOWN = {latex: char for char, latex in markup.LATEX.items()} | {'-{}': '-'}
# Columns that wrap their words.
_WRAPPED = r'>{\raggedright\arraybackslash\hspace{0pt}}'
_TOKEN = re.compile(
  r'\\begin\{(?P<begin>\w+\*?)\}(?:\[tb\])?'
  r'(?:\{\\linewidth\})?(?:\{(?:@\{\})?(?P<columns>[lrpX]+)(?:@\{\})?\})?'
  r'|\\end\{(?P<end>\w+\*?)\}'
  r'|\\(?P<command>[a-zA-Z]+)|(?P<row>\\\\)|\\(?P<escaped>[&%$#_{}])|(?P<char>.)',
  re.DOTALL,
)


def check_latex(text: str) -> list[list[str]]:
  """Checks syntax without a compiler and returns the cells of all tabulars, as they will be shown.

  Braces, environments and dollars are balanced, each row has as many cells as its tabular columns,
  and special characters are escaped.
  """
  text = re.sub('^%.*\n', '', text, flags=re.MULTILINE)
  # As wide as they are, they are one column each.
  text = re.sub(r'p\{\d+pt\}', 'p', text.replace(_WRAPPED, ''))
  text = re.sub(r'\\label\{tab:[\w-]+\}', '', text)
  environments, depth, math_mode, columns, rows = [], 0, False, 0, []
  cells, cell = [], ''
  for token in _TOKEN.finditer(text):
    kind, value = token.lastgroup, token.group()
    after = text[token.end() :].lstrip()
    if kind in ('begin', 'columns'):
      assert depth == 0 and not math_mode
      assert token['begin'] in ('table', 'table*', 'tabular', 'tabularx')
      assert token['begin'].startswith('tabular') == bool(token['columns'])
      environments.append(token['begin'])
      columns, cells, cell = len(token['columns'] or ''), [], ''
      continue
    if kind == 'end':
      assert environments and environments.pop() == token['end'] and depth == 0 and not math_mode
      assert not columns or (cells == [] and not cell.replace(r'\bottomrule', '').strip()), cell
      columns = 0
    elif kind == 'command':
      assert token['command'] in _COMMANDS, value
    elif kind == 'row':
      assert columns and depth == 0 and not math_mode and after[:1] not in ('[', '*'), value
      rows.append([latex_shown(re.sub(r'\\\w+rule', '', c).strip()) for c in [*cells, cell]])
      assert len(rows[-1]) == columns, rows[-1]
      cells, cell = [], ''
      continue
    elif kind == 'char':
      assert value not in '#%^~|"`\\', (value, after[:20])
      # Half the width of an interval is a subscript.
      assert value != '_' or (math_mode and after[0] == '{'), after[:20]
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


def latex_shown(latex: str) -> str:
  """Returns what LaTeX shows of escaped text; numbers in dollars stay."""
  if re.fullmatch(r'\$[^$\\]*(\\pm[^$\\]*)?\$', latex):
    return latex
  latex = latex.replace(r'\allowbreak{}', '')
  longest_first = sorted(_SHOWN, key=len, reverse=True)
  return re.sub('|'.join(map(re.escape, longest_first)), lambda m: _SHOWN[m.group()], latex)


def markdown_shown(text: str) -> str:
  """Returns text without the backslashes that Markdown takes for escapes: those before ASCII."""
  return re.sub(r'\\([!-/:-@\[-`{-~])', r'\1', text)


def markdown_rows(text: str) -> list[list[str]]:
  """Returns the cells of all tables, as they will be shown."""
  rows = []
  for line in text.split('\n'):
    if line.startswith('|'):
      cells = re.findall(r'((?:\\.|[^\\|])*)\|', line)[1:]
      rows.append([markdown_shown(cell).strip() for cell in cells])
  return rows


def one_line(text: str) -> str:
  return ' '.join(text.split())
