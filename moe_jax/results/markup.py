"""Text that a format shows as it is, whatever its characters mean there."""

import re
import unicodedata

_MARKDOWN_SPECIALS = re.compile(r'[\\`*_{}\[\]<>#|~$&!]')
# Brackets and stars would be read as arguments of the \\ or \item before them.
LATEX = {
  '\\': r'\textbackslash{}',
  '{': r'\{',
  '}': r'\}',
  '$': r'\$',
  '&': r'\&',
  '#': r'\#',
  '%': r'\%',
  '_': r'\_',
  '^': r'\textasciicircum{}',
  '~': r'\textasciitilde{}',
  '<': r'\textless{}',
  '>': r'\textgreater{}',
  '|': r'\textbar{}',
  '"': r'\textquotedblright{}',
  '`': r'\textquoteleft{}',
  '[': '{[}',
  ']': '{]}',
  '*': '{*}',
  '±': r'\ensuremath{\pm}',
  '×': r'\ensuremath{\times}',
}
# Accents that LaTeX puts on letters in any font encoding, of code points below _MOST_ACCENTED.
_ACCENTS = '\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327'
_MOST_ACCENTED = 0x180
# What a narrow column holds of a word without a possible break, with the punctuation after it.
_PIECE = re.compile(
  r'(?:(?<!\S)[\W_]+)?'
  # A count keeps its suffix: 4.93M.
  r'(?:[-+]?\d{1,6}(?:\.\d{1,6}){1,2}(?:[kMGT](?![^\W_]))?|(?=[A-Z]{8})[A-Z]{5}|[^\W_]{1,13})'
  r'(?:[\W_]+(?!\S))?[\W_]?|[\W_]'
)


def escape_markdown(text: str) -> str:
  """Returns text on one line that Markdown shows as it is, in a cell of a table too."""
  return _MARKDOWN_SPECIALS.sub(lambda match: f'\\{match.group()}', one_line(text))


def escape_latex(text: str) -> str:
  """Returns text on one line that LaTeX shows as it is; [U+XXXX] for what its fonts may lack."""
  shown = ''.join(c if is_plain(c) else f'[U+{ord(c):04X}]' for c in one_line(text))
  escaped = ''.join(LATEX.get(c, c) for c in shown)
  # Two hyphens would be joined to a dash.
  return re.sub('-(?=-)', '-{}', escaped)


def break_latex(text: str) -> str:
  """Returns the same as `escape_latex`, with the points at which a long word may break.

  These are after punctuation within a word, except in numbers, and in long runs of letters and
  digits, as hashes are.
  """
  return ' '.join(_break_word(word) for word in one_line(text).split(' '))


def _break_word(word: str) -> str:
  return r'\allowbreak{}'.join(escape_latex(piece) for piece in _PIECE.findall(word))


def latex_number(text: str) -> str:
  """Returns a number, or '-1.2 ± 0.1', in math mode."""
  return '$' + text.replace('±', r'\pm') + '$'


def with_minus(text: str) -> str:
  """Returns a number, or one with its interval, with minus signs instead of hyphens."""
  is_number = re.fullmatch(r'[-+]?\d[\d.e+-]*( ± [\d.e+-]+)?|\[[-+\d.e, ]+\]', text)
  return re.sub(r'(?<!\d)-|(?<=e)-', '\u2212', text) if is_number else text


def is_plain(char: str) -> bool:
  """True if any font of LaTeX has the character, or `LATEX` a command for it."""
  if ' ' <= char <= '~' or char in LATEX:
    return True
  letter, *accents = list(unicodedata.normalize('NFD', char))
  return (
    ord(char) < _MOST_ACCENTED and letter.isascii() and len(accents) == 1 and accents[0] in _ACCENTS
  )


def one_line(text: str) -> str:
  """Returns the words with one space between them."""
  return ' '.join(text.split())
