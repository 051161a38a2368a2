"""Sparse mixture-of-experts language models in JAX.

`moe_jax.load_run(DIR)` opens a trained run. It is loaded on first use: `import moe_jax` by itself
imports no library.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from moe_jax.loading import Run, TextOutput, load_run

__all__ = ['Run', 'TextOutput', 'load_run']
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from moe_jax import loading

  return getattr(loading, name)


if sys.argv[:1] == ['-m']:
  # A command is about to load its libraries, which takes seconds. Ctrl-C meanwhile has nothing to
  # save and needs no traceback; `moe_jax.cli` takes over from there.
  # A package that is not installed needs none either.
  def _report(kind, value, traceback):
    if kind is KeyboardInterrupt:
      return
    from moe_jax import installed

    message = installed.missing(value)
    if not message:
      sys.__excepthook__(kind, value, traceback)
      return
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)

  sys.excepthook = _report
