"""Sparse mixture-of-experts language models in JAX."""

import sys

__version__ = '0.1.0'

if sys.argv[:1] == ['-m']:
  # A command is about to load its libraries, which takes seconds. Ctrl-C meanwhile has nothing to
  # save and needs no traceback; `moe_jax.cli` takes over from there.
  def _report(kind, value, traceback):
    if kind is not KeyboardInterrupt:
      sys.__excepthook__(kind, value, traceback)

  sys.excepthook = _report
