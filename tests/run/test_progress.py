"""Bars: one line that changes on a terminal, a line per refresh in a file."""

import io
import sys

import tqdm

from moe_jax.run.progress import bar_file


def test_away_from_a_terminal_each_refresh_is_a_line(monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(sys, 'stderr', stream)
  with tqdm.tqdm(total=4, file=bar_file(), mininterval=0, bar_format='{n}{postfix}') as bar:
    bar.set_postfix_str('compiling')
    bar.update(2)
    bar.set_postfix_str('training')
  lines = stream.getvalue().splitlines()
  assert '\r' not in stream.getvalue() and '' not in lines
  assert lines[0] == '0' and '0, compiling' in lines and lines[-1] == '2, training'


def test_a_terminal_is_written_as_it_is(monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: True
  monkeypatch.setattr(sys, 'stderr', stream)
  assert bar_file() is stream
