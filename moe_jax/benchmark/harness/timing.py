"""Timing of arms against each other on a machine that others use, too.

Every round runs each arm once, in a new random order, and gives one ratio between two arms; the
median of the ratios is reported with their quartiles. A copy of the dense layer runs as an arm of
its own, the A/A control: if its median ratio leaves 0.95 to 1.05, the machine was too noisy and the
row is invalid.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import profiling
from moe_jax.benchmark.harness.tables import Ratio

NULL_BOUNDS = (0.95, 1.05)


class Compiled(NamedTuple):
  """A compiled function with its arguments.

  Attributes:
    call: runs it once and waits.
    first_seconds: of the first call after compiling.
    compile_seconds: of XLA; None where nothing is compiled beforehand.
    temporary_bytes: on top of arguments and results; None where that is not known.
    program: returns its text; empty where there is none.
  """

  call: Callable[[], Any]
  first_seconds: float
  compile_seconds: float | None
  temporary_bytes: int | None
  program: Callable[[], str] = lambda: ''


class Memory:
  """Results of earlier calls, to be written over by those of later ones.

  Memory that is new to a process is cleared and mapped when it is first written: for a gradient as
  large as all experts that can take as long as the layer, and swings between rounds.
  """

  def __init__(self) -> None:
    self._kept: dict[Any, list[jax.Array]] = {}

  def take(self, structs: Any) -> Any:
    """Returns arrays of these shapes and dtypes, with anything in them."""
    return jax.tree.map(self._take, structs)

  def keep(self, arrays: Any) -> None:
    """Takes arrays that are no longer needed."""
    for array in jax.tree.leaves(arrays):
      self._kept.setdefault((array.shape, array.dtype), []).append(array)

  def _take(self, struct: jax.ShapeDtypeStruct) -> jax.Array:
    kept = self._kept.get((struct.shape, struct.dtype))
    return kept.pop() if kept else jnp.zeros(struct.shape, struct.dtype)


def compile_arm(function: Callable, *arguments: Any, memory: Memory | None = None) -> Compiled:
  """Compiles and warms up a function.

  Args:
    function: runs as the arm.
    arguments: of it.
    memory: where results are written, on one device; None for new memory in each call.
  """
  if memory is None:
    lowered = jax.jit(function).lower(*arguments)
  else:
    structs = jax.eval_shape(function, *arguments)
    over = jax.jit(lambda _, *rest: function(*rest), donate_argnums=0, keep_unused=True)
    lowered = over.lower(structs, *arguments)
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds = time.perf_counter() - start

  def call():
    if memory is None:
      return jax.block_until_ready(compiled(*arguments))
    result = jax.block_until_ready(compiled(memory.take(structs), *arguments))
    memory.keep(result)
    return None

  start = time.perf_counter()
  call()
  first = time.perf_counter() - start
  analysis: Any = compiled.memory_analysis()
  temporary = analysis.temp_size_in_bytes
  return Compiled(call, first, seconds, temporary, lambda: compiled.as_text() or '')


def is_out_of_memory(error: Exception) -> bool:
  """Returns True for the errors by which XLA, or torch, refuses to allocate memory."""
  text = str(error).lower()
  return any(s in text for s in ('resource_exhausted', 'out of memory', "can't allocate memory"))


def measure(
  arms: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0, least_seconds: float = 0.0
) -> dict[str, list[float]]:
  """Times the arms in interleaved rounds.

  Args:
    arms: each runs once and waits for its result.
    rounds: at least 9.
    seed: of the orders.
    least_seconds: that an arm takes in a round. A faster one runs several times, and counts with
      the mean: single calls of a millisecond swing with whatever else the machine does.

  Returns:
    For each arm, the seconds of one call in every round.
  """
  order = random.Random(seed)
  calls = {name: _calls(arm, least_seconds) for name, arm in arms.items()}
  seconds: dict[str, list[float]] = {name: [] for name in arms}
  for _ in range(rounds):
    names = list(arms)
    order.shuffle(names)
    for name in names:
      seconds[name].append(_seconds(arms[name], calls[name]))
  return seconds


def _calls(arm: Callable[[], Any], least_seconds: float) -> int:
  """Returns how often an arm runs in a round."""
  return 1 if not least_seconds else max(1, math.ceil(least_seconds / _seconds(arm, 1)))


def _seconds(arm: Callable[[], Any], calls: int) -> float:
  start = time.perf_counter()
  for _ in range(calls):
    arm()
  return (time.perf_counter() - start) / calls


def ratio(reference: list[float], arm: list[float]) -> Ratio:
  """Returns the time of a reference over that of an arm, round by round."""
  low, median, high = np.quantile(np.array(reference) / np.array(arm), [0.25, 0.5, 0.75])
  return Ratio(float(median), float(low), float(high))


def profiled(arm: Compiled, directory: str, name: str) -> dict[str, Any]:
  """Traces an arm after it was measured: {'profile': table of its time by part}.

  Args:
    arm: is traced.
    directory: of --profile; without one nothing happens and {} comes back.
    name: of the directory in it.
  """
  if not directory:
    return {}
  table = profiling.trace_calls(arm.call, arm.program(), '--profile', f'{directory}/{name}')
  return {'profile': table.to_json()}


def milliseconds(seconds: list[float]) -> float:
  """Returns the median."""
  return float(np.median(seconds)) * 1000


def is_invalid(null: Ratio) -> bool:
  """Returns True if the copy of the reference came out too far from the reference."""
  return not NULL_BOUNDS[0] <= null.median <= NULL_BOUNDS[1]
