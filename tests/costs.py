"""Costs of each file of tests, printed at the end by `pytest -n 0 -p tests.costs`.

Programs compiled, programs read from the cache on disk instead, and seconds of CPU, of this process
and of those that it started: unlike seconds by the clock, they can be compared on a busy machine.
"""

import collections
import resource

_costs: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
_events: collections.Counter = collections.Counter()
_last: collections.Counter = collections.Counter()


def _so_far():
  usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  return collections.Counter(_events, cpu=sum(u.ru_utime + u.ru_stime for u in usage))


def pytest_collection_finish():
  import jax  # Not earlier: conftest.py sets its flags first.

  jax.monitoring.register_event_listener(lambda name, **_: _events.update([name]))
  jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: _events.update([name]))
  _last.update(_so_far())


def pytest_runtest_logfinish(location):
  now = _so_far()
  costs = _costs[location[0].removeprefix('tests/')]
  costs['tests'] += 1
  for name, value in now.items():
    costs[name] += value - _last[name]
  _last.clear()
  _last.update(now)


def pytest_terminal_summary(terminalreporter):
  rows = [('file', 'tests', 'compiled', 'read', 'CPU s')]
  for name, costs in sorted(_costs.items(), key=lambda item: -item[1]['cpu']):
    read = costs['/jax/compilation_cache/cache_hits']
    compiled = costs['/jax/core/compile/backend_compile_duration'] - read
    rows.append((name, costs['tests'], compiled, read, round(costs['cpu'])))
  for row in rows:
    terminalreporter.write_line('| {:<40} | {:>5} | {:>8} | {:>5} | {:>6} |'.format(*row))
