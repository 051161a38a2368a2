"""Every test runs on 8 simulated CPU devices, with shapes checked at every call of the package."""

import gc
import importlib.metadata
import os
import signal
import tempfile

NUM_DEVICES = 8

# Before the first import of jax. The last two flags cut the time of compiling to a third. XLA ends
# the process at a flag that it does not know, as the last is to 0.11 and later.
_OLDER = tuple(int(x) for x in importlib.metadata.version('jaxlib').split('.')[:2]) < (0, 11)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    f'--xla_force_host_platform_device_count={NUM_DEVICES}',
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false' if _OLDER else '',
  ]
).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Before the first import of moe_jax: its annotations are checked, shapes included.
jaxtyping.install_import_hook('moe_jax', 'beartype.beartype')
# [S, E] + [E] must be written as what it is.
jax.config.update('jax_numpy_rank_promotion', 'raise')

hypothesis.settings.register_profile(
  'deterministic', derandomize=True, database=None, deadline=None, max_examples=25
)
hypothesis.settings.load_profile('deterministic')


def pytest_configure(config):
  config.addinivalue_line('markers', 'slow: starts processes of its own.')
  config.addinivalue_line(
    'markers', 'all: only with ./launch/test --all; another case stands for it.'
  )
  config.addinivalue_line('filterwarnings', 'error')
  # What threads of TensorStore say to the loop that Orbax closed after a damaged file, whenever.
  closed = r'ignore:(?s).*Event loop is closed:pytest.PytestUnraisableExceptionWarning'
  config.addinivalue_line('filterwarnings', closed)
  # Of third parties.
  config.addinivalue_line('filterwarnings', r'ignore:the load_module\(\) method:DeprecationWarning')
  # One worker may find what another is just writing, and then compiles for itself.
  damaged = 'ignore:Error reading persistent compilation cache entry:UserWarning'
  config.addinivalue_line('filterwarnings', damaged)
  keep_programs(config)


def keep_programs(config):
  """Keeps compiled programs on disk, for all workers of this run, since `forget_programs` forgets.

  Set here rather than in the environment: what a test kills must not leave half a program to
  others. A folder that JAX_COMPILATION_CACHE_DIR names outlives the run.
  """
  if jax.config.jax_compilation_cache_dir:
    return
  if hasattr(config, 'workerinput'):
    folder = config.workerinput['programs']
  else:
    made = tempfile.TemporaryDirectory(prefix='moe_jax_programs_', ignore_cleanup_errors=True)
    config.add_cleanup(made.cleanup)
    folder = config.programs = made.name
  jax.config.update('jax_compilation_cache_dir', folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
  """Tells a worker of pytest-xdist the folder."""
  node.workerinput['programs'] = getattr(node.config, 'programs', '')


def pytest_sessionstart():
  # A test that skips for want of devices is a test that never runs.
  if jax.device_count() < NUM_DEVICES:
    pytest.exit(f'{jax.device_count()} devices: the tests need {NUM_DEVICES}', returncode=1)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Frees the compiled programs of a module after it.

  Each keeps some memory mappings. Linux allows a process 65,530 (vm.max_map_count), the suite has
  more in all, and then XLA crashes.
  """
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def no_hang():
  """Fails a test that would never end, as one that reads a pipe into which nobody writes."""

  def end(number, frame):
    raise AssertionError('not ended after 60 s')

  before = signal.signal(signal.SIGALRM, end)
  signal.alarm(60)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """Config overrides of a prepared text."""
  from tests import tiny  # After the hook above.

  return tiny.prepared_text(tmp_path_factory.getbasetemp())
