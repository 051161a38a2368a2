"""The two errors by which a run ends because of its input, and their exit codes.

Everything else that is raised is a defect of this package: exit code 1 and a traceback.
"""

import difflib
import errno
import os
import re
import traceback
from collections.abc import Iterable
from typing import Any

USER_ERROR_EXIT_CODE = 2
DAMAGED_EXIT_CODE = 3


# No space: the next write is refused, too.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the operating system refuses and the user can fix: space, rights, names.
_REFUSALS = (
  *_FULL,
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.ENAMETOOLONG,
)


def is_refusal(error: OSError) -> bool:
  """True if the operating system refused something that the user can fix, wherever it surfaced."""
  return error.errno in _REFUSALS


def refusal_in(error: BaseException | None) -> OSError | None:
  """Returns the refusal of the operating system, anywhere in the causes of an error.

  Libraries wrap it, and some keep only its text.
  """
  while error is not None:
    if isinstance(error, OSError) and is_refusal(error):
      return error
    # TensorStore: "ValueError: ... No space left on device [os_error_code='28']".
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(found[1]) if found else None
    if code in _REFUSALS:
      return OSError(code, os.strerror(code))
    for text in ('No space left on device', 'Not enough disk space'):
      if text in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = error.__cause__ or error.__context__
  return None


def is_full(error: BaseException) -> bool:
  """True if the error is due to a full disk or quota."""
  refusal = refusal_in(error)
  return refusal is not None and refusal.errno in _FULL


class UserError(ValueError):
  """The user's input is wrong. Printed as one `error:` line; exit code 2.

  Attributes:
    field: what the user set, for example `moe.num_experts` or a path.
    value: the value it was given.
    allowed: what is allowed there, and where it helps, what to do.
  """

  def __init__(self, field: str, value: Any = None, allowed: str = ''):
    self.field = field
    self.value = value
    self.allowed = allowed
    # ml_collections makes a new error from the text of one that a config file raised.
    # What was not given has no value to show.
    absent = value is None and allowed.startswith(('must be given', 'must have a value'))
    shown = field if absent else f'{field}={value!r}'
    text = f'{shown}: {allowed}' if allowed else field
    super().__init__(text.replace('\n', ' ') if allowed else text)


def did_you_mean(word: str, known: Iterable[str], prefix: str = '') -> str:
  """Returns '; did you mean X?' with the known names that resemble a word, '' if none does."""
  near = difflib.get_close_matches(word, list(known), n=2, cutoff=0.7)
  return f'; did you mean {" or ".join(prefix + name for name in near)}?' if near else ''


def raised_by(error: BaseException | None, path: str) -> str:
  """Returns 'line 3: NameError: ...' if the code of a file raised an error, or one of its causes.

  Returns '' for what it did not raise, and for a UserError, which names the error itself.
  """
  file = os.path.abspath(path)
  while error is not None and not isinstance(error, UserError):
    if isinstance(error, SyntaxError) and error.filename is not None:
      own = os.path.abspath(error.filename) == file
      place = f'line {error.lineno}' if own else f'{error.filename}:{error.lineno}'
      return f'{place}: {type(error).__name__}: {error.msg}'
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == file]
    if lines:
      text = ' '.join(str(error).split())
      return f'line {lines[-1]}: {type(error).__name__}{": " if text else ""}{text}'
    error = error.__cause__ or error.__context__
  return ''


class DamagedError(RuntimeError):
  """A checkpoint or data file is damaged and nothing good is left. Exit code 3."""
