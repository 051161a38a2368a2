"""Text that no format can take for its own signs."""

import hypothesis
import pytest
from hypothesis import strategies

from moe_jax.results import markup
from tests.results import made, shown


@hypothesis.given(strategies.text(strategies.characters(max_codepoint=0x7F), max_size=40))
@hypothesis.example('[0]')
@hypothesis.example('*')
@hypothesis.example(made.HOSTILE)
def test_latex_shows_any_ascii(text):
  escaped = markup.escape_latex(text)
  shown.check_latex(escaped)
  visible = ''.join(f'[U+{ord(c):04X}]' if not ' ' <= c <= '~' else c for c in shown.one_line(text))
  assert shown.latex_shown(escaped) == visible
  row = f'\\begin{{tabular}}{{ll}}\n{escaped} & {escaped} \\\\\n{escaped} & \\\\\n\\end{{tabular}}'
  assert [row[0] for row in shown.check_latex(row)] == [visible.strip()] * 2


@hypothesis.given(strategies.text(max_size=40))
def test_latex_has_no_character_that_fonts_may_lack(text):
  for char in markup.escape_latex(text):
    assert char in 'éüñçŠ' or char.isascii() or 0xC0 <= ord(char) < 0x180


@hypothesis.given(strategies.text(max_size=40))
def test_markdown_shows_any_text(text):
  escaped = markup.escape_markdown(text)
  assert shown.markdown_shown(escaped) == shown.one_line(text)
  assert shown.markdown_rows(f'| {escaped} | x |\n') == [[shown.one_line(text), 'x']]


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
    shown.check_latex(text)


def test_a_count_is_not_parted_from_its_suffix():
  assert markup.break_latex('parameters 4.93M, 12.3456M') == 'parameters 4.93M, 12.3456M'
  assert r'\allowbreak' in markup.break_latex('4.93Mega')


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('-0.07', '−0.07'),
    ('-0.07 ± 0.10', '−0.07 ± 0.10'),
    ('+0.70 ± 0.01', '+0.70 ± 0.01'),
    ('1.2e-05', '1.2e−05'),
    ('[-0.1, +0.2]', '[−0.1, +0.2]'),
    ('-', '-'),
    ('top-2', 'top-2'),
    ('a-1', 'a-1'),
    ('<0.001', '<0.001'),
  ],
)
def test_numbers_on_a_page_have_minus_signs(text, said):
  assert markup.with_minus(text) == said
