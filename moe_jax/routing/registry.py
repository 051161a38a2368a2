"""All routers by name: every module of `routers/` that has a `ROUTER`."""

import importlib
import pkgutil

from moe_jax.routing import routers
from moe_jax.routing.router import Router


def _find() -> dict[str, Router]:
  found = {}
  for module in pkgutil.iter_modules(routers.__path__):
    router = importlib.import_module(f'{routers.__name__}.{module.name}').ROUTER
    assert router.name == module.name, f'{module.name}.py holds the router {router.name}'
    found[router.name] = router
  return dict(sorted(found.items()))


ROUTERS: dict[str, Router] = _find()
