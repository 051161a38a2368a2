"""Writes the report of a study: python -m moe_jax.report --study=FILE --workdir=DIR --out=DIR.

Tables, figures, a page, and what a paper needs. Examples:
  python -m moe_jax.report --study=experiments/NAME/study.py --workdir=runs/NAME --out=runs/report
  python -m moe_jax.report --study=experiments/NAME/study.py --results=FILE.jsonl --out=runs/report
"""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from moe_jax import arguments, cli

if TYPE_CHECKING:
  from moe_jax.sweep import report as sweep_report

_STUDY = cli.define_path('study', 'File that defines get_study().')
_WORKDIR = cli.define_path('workdir', 'Of the sweep.')
_RESULTS = cli.define_path(
  'results', 'A results.jsonl of runs kept elsewhere: instead of --workdir, or in addition to it.'
)
_OUT = cli.define_path('out', 'Where the report is put.')
_COLUMNS = flags.DEFINE_list(
  'columns',
  [],
  'Columns of the tables, in order: seeds, metric, difference, parameters, active, '
  'flops_per_token, tokens, tokens_per_expert, or paths of metrics, as '
  'capacity/router/drop_share or dropless/router/max_violation/mean. By default all that is known '
  'and differs between arms; table.csv always holds all.',
)
_WIDE_TABLE = flags.DEFINE_bool('wide_table', False, 'table.tex spans both columns of a page.')
_FIGURES = flags.DEFINE_bool('figures', True, 'Draw figures too.')
_THIN = flags.DEFINE_bool(
  'thin',
  False,
  'Write what a repository should hold: results.jsonl of at most 300 kB with every final number '
  'but fewer points of curves and loads, no page, and of the figures those that README.md in --out '
  'shows. --out may be the folder of the study.',
)
_JSON = cli.define_json_flag()


def main() -> None:
  """Writes results.jsonl, tables, figures, index.html, methods.tex and cite.bib."""
  study, out = cli.required(_STUDY), pathlib.Path(cli.required(_OUT))
  arguments.check_file('--study', study)
  if _RESULTS.value:
    arguments.check_file('--results', _RESULTS.value)
  if not _RESULTS.value or _WORKDIR.value:
    arguments.check_folder('--workdir', cli.required(_WORKDIR))
  from moe_jax.results.as_json import as_json
  from moe_jax.sweep import report

  made = report.report(
    study,
    _WORKDIR.value,
    _RESULTS.value,
    out,
    figures=_FIGURES.value,
    columns=_COLUMNS.value,
    wide_table=_WIDE_TABLE.value,
    thinned=_THIN.value,
  )
  if _JSON.value:
    more = {'left_out_of_table_tex': made.left_out, 'figures': made.figures, 'cite_url': made.url}
    cli.print_json(as_json(made.summary) | more)
    return
  lines = [(out / 'table.md').read_text(encoding='utf-8'), *_remarks(made)]
  if _THIN.value:
    size = (out / 'results.jsonl').stat().st_size
    lines.append(f'report: {out}, results.jsonl of {size / 1000:.0f} kB')
  else:
    lines.append(f'report: {out / "index.html"}')
  cli.show('\n'.join(lines))


def _remarks(made: 'sweep_report.Report') -> Iterator[str]:
  """Returns remarks on the files for a paper's author, a line each."""
  from moe_jax.results.style import COLUMN_WIDTH, PAGE_WIDTH

  if made.left_out:
    yield (
      f'table.tex: no space for {", ".join(made.left_out)}; --wide_table or --columns shows them'
    )
  for width, place in ((COLUMN_WIDTH, 'one column'), (PAGE_WIDTH, 'both columns (figure*)')):
    names = [name for name, of in made.figures.items() if of == width]
    if names:
      yield f'figures as wide as {place}, {width:g} in: {", ".join(names)}'
  if not made.url:
    yield 'cite.bib: has no url; set repository-code in CITATION.cff to the address of your fork'


if __name__ == '__main__':
  cli.run(main)
