"""Writes the report of a study: python -m moe_jax.report --study=FILE --workdir=DIR --out=DIR.

Tables, figures, a page, and what a paper needs. Examples:
  python -m moe_jax.report --study=experiments/NAME/study.py --workdir=runs/NAME --out=runs/report
  python -m moe_jax.report --study=experiments/NAME/study.py --results=FILE.jsonl --out=runs/report
"""

import os
import pathlib

from absl import flags

from moe_jax import cli
from moe_jax.errors import UserError

_STUDY = cli.define_path('study', 'File that defines get_study().')
_WORKDIR = cli.define_path('workdir', 'Of the sweep.')
_RESULTS = cli.define_path(
  'results', 'A results.jsonl of runs kept elsewhere: in place of --workdir, or beside it.'
)
_OUT = cli.define_path('out', 'Where the report is put.')
_FIGURES = flags.DEFINE_bool('figures', True, 'Draw figures too.')


def main() -> None:
  """Writes results.jsonl, tables, figures, index.html, methods.tex and cite.bib."""
  study, out = cli.required(_STUDY), pathlib.Path(cli.required(_OUT))
  if not os.path.isfile(study):
    raise UserError('--study', study, 'does not exist')
  if _RESULTS.value and not os.path.isfile(_RESULTS.value):
    raise UserError('--results', _RESULTS.value, 'does not exist')
  if not _RESULTS.value or _WORKDIR.value:
    workdir = cli.required(_WORKDIR)
    if not os.path.isdir(workdir):
      raise UserError('--workdir', workdir, 'does not exist')
  from moe_jax.sweep import report

  report.report(study, _WORKDIR.value, _RESULTS.value, out, figures=_FIGURES.value)
  print((out / 'table.md').read_text(encoding='utf-8'))
  print(f'report: {out / "index.html"}')


if __name__ == '__main__':
  cli.run(main)
