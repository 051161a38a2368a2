"""From the records of a study to its report: tables, figures, a page, text for a paper."""

import pathlib
from collections.abc import Iterable
from typing import Any

from moe_jax.errors import UserError
from moe_jax.results import figures as figures_lib
from moe_jax.results import methods, scaling, tables
from moe_jax.results.page import Cell, write_page
from moe_jax.results.records import DIVERGED, FINISHED, Record, read_records, write_records
from moe_jax.results.statistics import Interval
from moe_jax.results.summary import ArmSummary, Summary, summarize
from moe_jax.study import Study
from moe_jax.sweep.collect import as_asked, id_today, known_records, records_of
from moe_jax.sweep.trials import load_study, trials_of

# Beside the metric that decides, where an arm has them: names as in `ArmSummary.metrics`.
COLUMNS = {
  'capacity/bits_per_byte': 'bits per byte at capacity',
  'capacity/router/drop_share': 'drop share',
  'capacity/router/max_violation/mean': 'MaxVio',
  'capacity/router/dead_experts/mean': 'dead experts',
}


def report(
  study_file: str, workdir: str | None, results: str | None, out: pathlib.Path, *, figures: bool
) -> Summary:
  """Writes results.jsonl, tables, figures, index.html, methods.tex and cite.bib.

  Args:
    study_file: defines get_study().
    workdir: of the sweep; None if `results` holds all runs.
    results: a results.jsonl of runs kept elsewhere: in place of the sweep's, or beside them.
    out: where the report is put.
    figures: whether to draw figures too.

  Raises:
    UserError: if the runs must not be compared, or there are none.
  """
  study = load_study(study_file)
  records = _records(study, study_file, workdir, results)
  _check_out(out)
  try:
    out.mkdir(parents=True, exist_ok=True)
    _refuse_early(study, records, out)
    write_records(out / 'results.jsonl', records)
    return write_report(study, records, out, figures)
  except OSError as error:
    raise UserError('--out', str(out), f'cannot be written: {error.strerror}') from error


def _refuse_early(study: Study, records: list[Record], out: pathlib.Path) -> None:
  """Ends before an earlier report is touched; without one, what was found is kept."""
  try:
    summarize(study, records)
  except UserError:
    if not (out / 'results.jsonl').exists():
      write_records(out / 'results.jsonl', records)
    raise


def _check_out(out: pathlib.Path) -> None:
  """Checks that nothing but an earlier report is overwritten."""
  if out.is_dir() and any(out.iterdir()) and not (out / 'results.jsonl').exists():
    raise UserError('--out', str(out), 'holds other files; name a new folder, or one of a report')


def _records(
  study: Study, study_file: str, workdir: str | None, results: str | None
) -> list[Record]:
  if results and not workdir:
    return _of_this_study(study, read_records(results), results)
  assert workdir is not None
  command = f'python -m moe_jax.sweep --study={study_file} --workdir={workdir}'
  known = known_records(trials_of(study), results) if results else None
  return records_of(study, workdir, command, known)


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
  return [as_asked(study, record) for record in records]


def write_report(
  study: Study, records: list[Record], out: pathlib.Path, with_figures: bool
) -> Summary:
  """Writes everything but results.jsonl, and returns what tables are made of.

  Raises:
    UserError: if the runs must not be compared.
  """
  summary = summarize(study, records)
  known = {name for arm in summary.arms for name in arm.metrics}
  columns = {
    name: title for name, title in COLUMNS.items() if name in known and name != study.metric.name
  }
  for name, text in (
    ('table.md', tables.markdown(summary, columns)),
    ('table.tex', tables.latex(summary, columns)),
    ('table.csv', tables.csv_text(summary)),
    ('methods.tex', methods.methods(summary)),
    ('cite.bib', methods.bibtex(summary)),
  ):
    (out / name).write_text(text, encoding='utf-8')
  if study.scaling:
    text = scaling.markdown(study, scaling.fit(study, records))
    (out / 'scaling.md').write_text(text, encoding='utf-8')
  if with_figures:
    figures_lib.save_all(study, records, out / 'figures')
  titles = {
    'arm': 'arm',
    'metric': f'{study.metric.name}, {study.metric.unit}',
    'difference': f'minus {study.baseline}' if study.baseline else '',
    'seeds': 'seeds',
    **columns,
    'active': 'active parameters',
    'total': 'parameters',
    'per_expert': 'tokens per expert',
  }
  titles = {key: title for key, title in titles.items() if title}
  rows = [_row(arm, columns) for arm in summary.arms if not arm.dropped]
  write_page(
    study,
    records,
    titles,
    rows,
    out / 'index.html',
    tables.comparisons(summary),
    tables.notes(summary),
    summary.warnings,
  )
  return summary


def _row(arm: ArmSummary, columns: Iterable[str]) -> dict[str, Any]:
  """Returns what the page's table says of an arm."""
  row: dict[str, Any] = {
    'arm': arm.name,
    'metric': _cell(arm.interval),
    'difference': _cell(arm.difference.interval if arm.difference else None, '+'),
    'seeds': len(arm.values),
    'active': arm.parameters.get('active'),
    'total': arm.parameters.get('total'),
    'per_expert': arm.tokens_per_expert,
  }
  return row | {name: _cell(arm.metrics.get(name)) for name in columns}


def _cell(interval: Interval | None, sign: str = '') -> Cell:
  if interval is None or not interval.num:
    return Cell('-', None)
  text = f'{interval.mean:{sign}.4f}'
  if interval.num > 1:
    text += f' [{interval.low:{sign}.4f}, {interval.high:{sign}.4f}]'
  return Cell(text, interval.mean)
