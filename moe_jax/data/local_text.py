"""A user's own text: a folder of .txt and .jsonl files, or one such file."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import file_walk

SUFFIXES = ('.txt', '.jsonl')
_DEFAULT_DOMAIN = 'text'
# Reading less is done before a line could be read.
_SILENT_FILES, _SILENT_BYTES = 1000, 50_000_000


class LocalText:
  """The documents below a path, read again at every pass.

  A .txt file is one document; its domain is the first-level sub-folder that it lies in, or 'text'.
  A .jsonl file is one document per line, `{"text": ..., "domain": ..., "name": ...}`, the last two
  optional. Files are read in the order of their relative paths; hidden files and folders and other
  suffixes are passed over. Links are followed, but no folder is read twice: see `file_walk`.

  Attributes:
    path: the folder or file.
    left_out: relative paths of links that were not followed, since what they point to is read
      under another name.
    fingerprint: SHA-256 over the relative paths and contents.
  """

  def __init__(self, path: str, dataset_name: str, say: Callable[[str], None] = lambda line: None):
    """Finds and fingerprints the files.

    Args:
      path: a folder or a file.
      dataset_name: the user's `data.name`, for error messages.
      say: takes a line, before many or large files are read.

    Raises:
      errors.UserError: if the path is missing or unreadable or holds no .txt or .jsonl file, or a
        file is not an ordinary one or has a name that is not UTF-8.
    """
    self.path = path
    self.left_out: list[str] = []
    self._dataset_name = dataset_name
    self._files = self._find()
    size = sum(_size(file) for _, file in self._files)
    if len(self._files) >= _SILENT_FILES or size >= _SILENT_BYTES:
      say(f'{path}: reading {len(self._files):,} files, {size / 1e6:,.1f} MB')
    digest = hashlib.sha256()
    for relative, file in self._files:
      content = hashlib.sha256(self._read(file)).hexdigest()
      digest.update(f'{len(relative)}:{relative}:{content};'.encode())
    self.fingerprint = digest.hexdigest()

  def __iter__(self) -> Iterator[documents_lib.Document]:
    """Yields the documents.

    Raises:
      errors.UserError: if a file is not UTF-8, is empty, or holds a record without text; names the
      file and the line.
    """
    for relative, file in self._files:
      text = self._decode(file)
      domain = relative.split(os.sep)[0] if os.sep in relative else _DEFAULT_DOMAIN
      if file.endswith('.jsonl'):
        yield from self._records(file, relative, text, domain)
      else:
        self._check_length(text, file)
        yield documents_lib.Document(text, domain, relative)

  def _error(self, what: str) -> errors.UserError:
    return errors.UserError('data.name', self._dataset_name, what)

  def _find(self) -> list[tuple[str, str]]:
    if not os.path.exists(self.path):
      raise self._error(f'{self.path!r} does not exist; give a folder or a file of text')
    if not os.path.isdir(self.path):
      if not self.path.endswith(SUFFIXES):
        raise self._error(f'{self.path} is not a {" or ".join(SUFFIXES)} file')
      return [(self._checked_name(os.path.basename(self.path)), self.path)]
    walk = file_walk.walk(self.path, SUFFIXES, self._error)
    if not walk.files:
      raise self._error(f'{self.path} holds no {" or ".join(SUFFIXES)} file')
    self.left_out = walk.left_out
    return sorted((self._checked_name(relative), file) for relative, file in walk.files.items())

  def _checked_name(self, relative: str) -> str:
    """Returns the name if it can name a document: it is in results and in files of text."""
    if not documents_lib.is_text(relative):
      raise self._error(f'the name of {ascii(relative)} is not UTF-8; rename it')
    return relative

  def _read(self, file: str) -> bytes:
    try:
      # Reading a pipe or a device may never end.
      if not stat.S_ISREG(os.stat(file).st_mode):
        raise self._error(f'{file} is not an ordinary file')
      with open(file, 'rb') as stream:
        return stream.read()
    except OSError as error:
      raise self._error(f'{file} cannot be read ({error.strerror})') from error

  def _decode(self, file: str) -> str:
    content = self._read(file)
    try:
      # A byte order mark is a trace of an editor, not text.
      text = content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      raise self._error(f'{file} is not UTF-8 text (byte {error.start})') from error
    if not text.strip():
      raise self._error(f'{file} is empty')
    return text

  def _check_length(self, text: str, where: str) -> None:
    if len(text.encode()) < 2:
      raise self._error(f'{where} is a document shorter than two tokens')

  def _records(
    self, file: str, relative: str, text: str, domain: str
  ) -> Iterator[documents_lib.Document]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters it splits at.
    for number, line in enumerate(text.split('\n'), start=1):
      where = f'{file}:{number}'
      if not line.strip():
        continue
      try:
        # No number is used, and `int` refuses one of 5,000 digits.
        record = json.loads(line, parse_int=float)
      except json.JSONDecodeError as error:
        raise self._error(f'{where} is not JSON ({error.msg})') from error
      except RecursionError as error:
        raise self._error(f'{where} is nested too deeply') from error
      if not isinstance(record, dict) or not isinstance(record.get('text'), str):
        raise self._error(f'{where} is not an object with a string "text"')
      for key in ('text', 'domain', 'name'):
        if not isinstance(record.get(key, ''), str):
          raise self._error(f'{where} has a "{key}" that is not a string')
        if not documents_lib.is_text(record.get(key, '')):
          raise self._error(f'{where} holds half a surrogate pair in "{key}", which is not text')
      self._check_length(record['text'], where)
      yield documents_lib.Document(
        record['text'], record.get('domain') or domain, record.get('name') or f'{relative}:{number}'
      )


def _size(file: str) -> int:
  """Returns the bytes of a file; 0 if it can't be accessed, which reading it will report."""
  try:
    return os.stat(file).st_size
  except OSError:
    return 0
