"""A long preparation says how far it is; a short one says nothing."""

from moe_jax.data import documents as documents_lib
from moe_jax.data import progress

DOCUMENTS = [documents_lib.Document('x' * 500_000, 'a', str(i)) for i in range(6)]


def _said(seconds_per_document):
  now = [0.0]

  def slow():
    for document in DOCUMENTS:
      now[0] += seconds_per_document
      yield document

  lines = []
  passed = list(progress.watched(slow(), 'reading', lines.append, clock=lambda: now[0]))
  assert passed == DOCUMENTS
  return lines


def test_a_line_every_15_seconds():
  # 8 s a document: after the second (16 s), the fourth and the sixth.
  assert _said(8.0) == [
    'reading: 2 documents, 1.0 M characters so far',
    'reading: 4 documents, 2.0 M characters so far',
    'reading: 6 documents, 3.0 M characters so far',
    'reading: all 6 documents read',
  ]


def test_silent_when_it_is_soon_done():
  assert _said(2.4) == []
