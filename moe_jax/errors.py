"""The two ways in which a run ends because of what it was given, and their exit codes.

Everything else that is raised is a defect of this package: exit code 1 and a traceback.
"""

import errno
from typing import Any

USER_ERROR_EXIT_CODE = 2
DAMAGED_EXIT_CODE = 3


# What the operating system refuses and the user can mend: space, rights, names.
_REFUSALS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.ENAMETOOLONG,
)


def is_refusal(error: OSError) -> bool:
  """Whether the operating system refused what the user can mend, wherever it surfaced."""
  return error.errno in _REFUSALS


class UserError(ValueError):
  """The user's input is wrong. Printed as one `error:` line; exit code 2.

  Attributes:
    field: what the user set, for example `moe.num_experts` or a path.
    value: the value it was given.
    allowed: what is allowed there, and where it helps, what to do.
  """

  def __init__(self, field: str, value: Any, allowed: str):
    self.field = field
    self.value = value
    self.allowed = allowed
    super().__init__(f'{field}={value!r}: {allowed}'.replace('\n', ' '))


class DamagedError(RuntimeError):
  """A checkpoint or data file is damaged and nothing good is left. Exit code 3."""
