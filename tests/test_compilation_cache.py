"""The cache of compiled programs on disk that conftest.py sets up serves programs of 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.parallel.mesh import make_mesh


def test_a_program_of_eight_devices_is_read_from_disk_with_the_same_result():
  mesh = make_mesh(2, 4)
  seen = []

  def listen(name, **_):
    seen.append(name)

  x = jax.device_put(
    np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32),
    NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
  )

  def program(x):
    # A sum over all devices, and a buffer of the caller's that the result may take.
    return x @ (x.T @ x) / jnp.sum(jnp.square(x))

  def run():
    # As after each module of tests.
    jax.clear_caches()
    seen.clear()
    result = jax.jit(program, donate_argnums=0)(jax.device_put(x, x.sharding, may_alias=False))
    return np.asarray(result), seen.count('/jax/compilation_cache/cache_hits')

  before = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.monitoring.register_event_listener(listen)
  try:
    first, _ = run()
    second, hits = run()
  finally:
    jax.monitoring.unregister_event_listener(listen)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', before)
  assert hits >= 1
  np.testing.assert_array_equal(first, second)
