"""Progress of a long preparation, in lines; a short one stays silent."""

import time
from collections.abc import Callable, Iterable, Iterator

from moe_jax.data import documents as documents_lib

_INTERVAL_SECONDS = 15.0


def watched(
  documents: Iterable[documents_lib.Document],
  what: str,
  say: Callable[[str], None],
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[documents_lib.Document]:
  """Yields the documents, and every 15 s prints how many of them there were.

  Args:
    documents: what to pass on.
    what: is being done with them; opens the line.
    say: takes a line of text.
    clock: gives seconds.
  """
  last = clock()
  num_documents = num_characters = 0
  spoke = False
  for document in documents:
    yield document
    num_documents += 1
    num_characters += len(document.text)
    if clock() - last >= _INTERVAL_SECONDS:
      say(f'{what}: {num_documents} documents, {num_characters / 1e6:.1f} M characters so far')
      last, spoke = clock(), True
  if spoke:
    say(f'{what}: all {num_documents} documents read')
