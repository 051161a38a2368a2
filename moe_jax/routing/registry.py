"""All routers by name: every module of `routers/` that has a `ROUTER`."""

import importlib
import pkgutil

from moe_jax.routing import routers
from moe_jax.routing.router import Router


def _find() -> dict[str, Router]:
  found = {}
  for module in pkgutil.iter_modules(routers.__path__):
    router = getattr(importlib.import_module(f'{routers.__name__}.{module.name}'), 'ROUTER', None)
    if not isinstance(router, Router) or router.name != module.name:
      # Not skipped: the config would lack the router, and nothing would say why.
      raise ImportError(
        f'routing/routers/{module.name}.py must define ROUTER, a Router with name={module.name!r}; '
        f'it has {getattr(router, "name", None)!r}'
      )
    found[router.name] = router
  return dict(sorted(found.items()))


ROUTERS: dict[str, Router] = _find()
