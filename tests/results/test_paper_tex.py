"""Papers with the tables of studies, methods and citation, through pdfLaTeX and BibTeX."""

import dataclasses
import re
import shutil
import subprocess

import pytest

from moe_jax.results import latex, markup, methods, summary, tables
from moe_jax.results.records import read_records
from moe_jax.study import Comparison
from moe_jax.sweep.trials import load_study
from tests import tiny
from tests.results import example, made

pytestmark = pytest.mark.slow

STUDIES = sorted((tiny.REPOSITORY / 'experiments').glob('*/results.jsonl'))


def _of_example():
  study = dataclasses.replace(example.study(), may_differ=('compute',))
  return summary.summarize(study, example.records())


def _summaries():
  """Of the committed studies, of broken ones, and with a margin."""
  for path in STUDIES:
    study = load_study(str(path.parent / 'study.py'))
    yield summary.summarize(study, read_records(path))
  yield _of_example()
  close = {'a' * 60: [1.0, 2.0, 3.0], 'W' * 30: [1.0001, 2.0003, 3.0], '0.5' * 20: [0.9, 1.9, 2.8]}
  first, *others = close
  study = made.make_study(
    tuple(close),
    name='with_a_margin',
    baseline=first,
    comparisons=tuple(Comparison(other, first) for other in others),
    equivalence_margin=0.01,
  )
  yield summary.summarize(study, made.make_records(close))


@pytest.mark.parametrize(
  'document', [r'{article}', r'[twocolumn]{article}', r'{IEEEtran}'], ids=['one', 'two', 'ieee']
)
def test_a_paper_takes_it_without_an_overfull_box(document, tmp_path):
  parts = []
  for of in [*_summaries(), made.make_broken()]:
    every = [column.key for column in tables.columns(of)]
    for text in (latex.latex(of), latex.latex(of, every), latex.latex(of, every, wide=True)):
      # The same table more than once: its label would be, too.
      parts += [re.sub(r'\\label\{.*?\}', '', text), r'\clearpage']
    parts.append(methods.methods(of))
  # Everything of ASCII, and the accents that are let through.
  every_char = markup.break_latex(' '.join(map(chr, range(0x180))))
  parts.append(rf'{{\raggedright {every_char}\par}}')
  address = 'https://example.org/a_b/moe?x=1%20#y'
  with_key = methods.bibtex(summary.summarize(made.make_study(), _dated()), address)
  (tmp_path / 'cite.bib').write_text(with_key, encoding='utf-8')
  log = _compiled(tmp_path, document, [*parts, r'\cite{moe_jax}'])
  # A table of every column may be longer than a page.
  wrong = re.findall(r'^Overfull.*\n.*|^LaTeX Warning: (?!Float too large|Text page).*', log, re.M)
  assert wrong == []


def test_the_check_finds_a_table_that_is_too_wide(tmp_path):
  wide = r'\begin{table}\begin{tabular}{r}' + '0' * 60 + r'\end{tabular}\end{table}'
  assert 'Overfull' in _compiled(tmp_path, '[twocolumn]{article}', [wide])


def _dated():
  records = made.make_records({'dense': [1.0, 2.0, 3.0]})
  return [dataclasses.replace(record, git_date='2026-11-30') for record in records]


def _compiled(folder, document, parts):
  """Compiles a paper of these parts, with its bibliography if it has one; returns the last log."""
  cites = (folder / 'cite.bib').exists()
  style = 'IEEEtran' if 'IEEEtran' in document else 'plain'
  ending = [rf'\bibliographystyle{{{style}}}', r'\bibliography{cite}'] if cites else []
  lines = [
    rf'\documentclass{document}',
    r'\usepackage{booktabs,tabularx,url}',
    r'\begin{document}',
    *parts,
    *ending,
    r'\end{document}',
  ]
  (folder / 'paper.tex').write_text('\n'.join(lines), encoding='utf-8')
  tex = [
    _program('pdflatex'),
    '-halt-on-error',
    '-interaction=nonstopmode',
    '-draftmode',
    'paper.tex',
  ]
  commands = [tex, [_program('bibtex'), 'paper'], tex, tex] if cites else [tex]
  for command in commands:
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=300, check=False)
    said = done.stdout.decode('utf-8', 'replace')
    assert done.returncode == 0, said[-3000:]
    assert command[0] == tex[0] or 'Warning' not in said, said
  return said


def _program(name):
  path = shutil.which(name)
  if path is None:
    pytest.fail(
      f'{name} is not installed: apt-get install texlive-latex-recommended texlive-publishers '
      'texlive-fonts-recommended',
      pytrace=False,
    )
  return path
