"""From the records of a study to its report: tables, figures, a page, text for a paper."""

import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from moe_jax.errors import UserError
from moe_jax.files import write_atomically
from moe_jax.results import csv_table, latex, methods, page_figures, scaling, tables, thin
from moe_jax.results import figures as figures_lib
from moe_jax.results.markup import with_minus
from moe_jax.results.page import Cell, write_page
from moe_jax.results.records import (
  DIVERGED,
  FINISHED,
  MISSING,
  Record,
  read_records,
  write_records,
)
from moe_jax.results.summary import Summary, summarize
from moe_jax.run import manifest
from moe_jax.study import Study
from moe_jax.sweep.collect import as_requested, given_records, id_today, known_records, records_of
from moe_jax.sweep.trials import load_study, trials_of


class Report(NamedTuple):
  """The report as written.

  Attributes:
    summary: source of the tables.
    left_out: keys of the columns that do not fit in table.tex.
    figures: width in inches of each figure that was drawn, by its name.
    url: of the software in cite.bib; '' if none is known.
  """

  summary: Summary
  left_out: tuple[str, ...]
  figures: dict[str, float]
  url: str


def report(
  study_file: str,
  workdir: str | None,
  results: str | None,
  out: pathlib.Path,
  *,
  figures: bool,
  columns: Sequence[str] = (),
  wide_table: bool = False,
  thinned: bool = False,
) -> Report:
  """Writes results.jsonl, tables, figures, index.html, methods.tex and cite.bib.

  Args:
    study_file: defines get_study().
    workdir: of the sweep; None if `results` holds all runs.
    results: a results.jsonl of runs kept elsewhere: instead of the sweep's, or in addition to them.
    out: where the report is put.
    figures: whether to draw figures too.
    columns: of the tables, as `tables.columns` takes them.
    wide_table: table.tex spans both columns of a page.
    thinned: for a repository: small results, no page, the figures that OUT/README.md shows.

  Raises:
    UserError: if the runs must not be compared, or there are none.
  """
  study = load_study(study_file)
  records = _records(study, study_file, workdir, results)
  _check_out(study, out, study_file if thinned else '')
  if thinned:
    records = thin.thin(records, study.metric.name)
  try:
    _refuse_early(study, records, out, columns)
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / 'results.jsonl', records, compact=thinned)
    drawn = _shown_in_readme(out) if thinned and figures else figures
    return write_report(
      study, records, out, drawn, columns=columns, wide_table=wide_table, with_page=not thinned
    )
  except OSError as error:
    raise UserError('--out', str(out), f'cannot be written: {error.strerror}') from error


def _shown_in_readme(out: pathlib.Path) -> frozenset[str]:
  """Returns the names of the figures that OUT/README.md shows."""
  try:
    text = (out / 'README.md').read_text(encoding='utf-8')
  except FileNotFoundError:
    return frozenset()
  return frozenset(re.findall(r'\(figures/([\w.-]+)\)', text))


def _refuse_early(
  study: Study, records: list[Record], out: pathlib.Path, columns: Sequence[str]
) -> None:
  """Ends before an earlier report is touched; without one, incomparable results are kept."""
  try:
    summary = summarize(study, records)
  except UserError:
    if not (out / 'results.jsonl').exists():
      out.mkdir(parents=True, exist_ok=True)
      write_records(out / 'results.jsonl', records)
    raise
  tables.columns(summary, columns)


def _check_out(study: Study, out: pathlib.Path, thinned_study: str) -> None:
  """Checks that nothing but an earlier report is overwritten, and no results by fewer.

  Args:
    study: reported.
    out: where the report is put.
    thinned_study: file of the study, whose folder may take thinned results; '' for whole ones.
  """
  results = out / 'results.jsonl'
  if not results.exists():
    folder = os.path.dirname(os.path.realpath(thinned_study)) if thinned_study else ''
    if out.is_dir() and any(out.iterdir()) and os.path.realpath(out) != folder:
      raise UserError('--out', str(out), 'holds other files; name a new folder, or one of a report')
  elif thinned_study and not thin.is_thin(read_records(results), study.metric.name):
    raise UserError(
      '--out',
      str(out),
      'holds results of which --thin would leave something out; move its results.jsonl elsewhere, '
      'and name it by --results',
    )


def _records(
  study: Study, study_file: str, workdir: str | None, results: str | None
) -> list[Record]:
  if results and not workdir:
    return _of_this_study(study, given_records(results), results)
  assert workdir is not None
  command = f'python -m moe_jax.sweep --study={study_file} --workdir={workdir}'
  known = known_records(trials_of(study), results) if results else None
  records = records_of(study, workdir, command, known)
  if all(record.status == MISSING for record in records):
    run = ', but a run; name the folder of the sweep' if manifest.holds_run(workdir) else ''
    raise UserError('--workdir', workdir, f'holds no trial of this study{run}')
  return records


def _of_this_study(study: Study, records: list[Record], path: str) -> list[Record]:
  """Refuses results of trials that the study no longer has: their base or seeds were others."""
  ids = {(trial.arm, trial.seed): trial.id for trial in trials_of(study)}
  for record in records:
    expected = ids.get((record.arm, record.seed))
    ended = record.status in (FINISHED, DIVERGED)
    if ended and expected and id_today(record, path) != expected:
      raise UserError(
        '--results',
        path,
        f'arm {record.arm!r}, seed {record.seed} was trained with another config than the '
        'study has now',
      )
  return [as_requested(study, record) for record in records]


def write_report(
  study: Study,
  records: list[Record],
  out: pathlib.Path,
  figures_drawn: bool | Collection[str] = True,
  *,
  columns: Sequence[str] = (),
  wide_table: bool = False,
  with_page: bool = True,
) -> Report:
  """Writes everything but results.jsonl, and returns the report.

  Args:
    study: of the records.
    records: of all trials.
    out: directory, which is there.
    figures_drawn: all, none, or files by their names.
    columns: of the tables, as `tables.columns` takes them.
    wide_table: table.tex spans both columns of a page.
    with_page: writes index.html, too.

  Raises:
    UserError: if the runs must not be compared.
  """
  summary = summarize(study, records)
  url = methods.repository()
  for name, text in (
    ('table.md', tables.markdown(summary, columns)),
    ('table.tex', latex.latex(summary, columns, wide=wide_table)),
    ('table.csv', csv_table.csv_text(summary)),
    ('methods.tex', methods.methods(summary)),
    ('cite.bib', methods.bibtex(summary, url)),
  ):
    write_atomically(out / name, text)
  if study.scaling:
    text = scaling.markdown(study, scaling.fit(study, records))
    write_atomically(out / 'scaling.md', text)
  widths: dict[pathlib.Path, float] = {}
  if figures_drawn:
    only = None if figures_drawn is True else figures_drawn
    widths = figures_lib.save_all(study, records, out / 'figures', only=only)
  if with_page:
    _write_page(summary, records, out / 'index.html', columns)
  left_out = latex.left_out(summary, columns, wide=wide_table)
  return Report(
    summary,
    tuple(column.key for column in left_out),
    {path.stem: width for path, width in widths.items()},
    url,
  )


def _write_page(
  summary: Summary, records: list[Record], path: pathlib.Path, columns: Sequence[str]
) -> None:
  # The page has a column of trials by status of its own.
  shown = [c for c in tables.columns(summary, columns) if columns or c.key != tables.SEEDS]
  titles = {'arm': 'arm'} | {column.key: column.title for column in shown}
  rows = [
    {'arm': arm.name} | {c.key: Cell(with_minus(c.cells[row]), c.values[row]) for c in shown}
    for row, arm in enumerate(tables.shown_arms(summary))
  ]
  write_page(
    summary.study,
    records,
    titles,
    rows,
    path,
    [[with_minus(cell) for cell in row] for row in tables.comparisons(summary)],
    tables.notes(summary, columns),
    summary.warnings,
    figures=page_figures.content(summary, records),
  )
