"""Compiled programs of a sweep, kept on disk."""

import contextlib
import os
import platform
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def kept_programs(workdir: str) -> Iterator[None]:
  """Keeps compiled programs on disk for the next worker, or for this one after a kill."""
  # A program for one CPU may use instructions that another lacks: each machine keeps its own.
  host = f'cpu-{platform.node()}' if jax.default_backend() == 'cpu' else jax.default_backend()
  settings = {
    'jax_compilation_cache_dir': os.path.join(workdir, 'compilation_cache', host),
    'jax_persistent_cache_min_compile_time_secs': 0.5,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
