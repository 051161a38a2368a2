"""The slices of a ragged exchange, moved by the words of JAX's docs, against the padded one."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import dispatch
from moe_jax.dispatch.exchange import Slices, send_slices, slices_of
from moe_jax.parallel.mesh import EXPERT_AXIS, make_mesh
from moe_jax.routing.plan import Plan

WIDTH = 2


def all_to_all(values):
  """Tiled, along the first axis, of what each device has."""
  num_devices = len(values)
  parts = [np.split(value, num_devices) for value in values]
  return [np.concatenate([parts[r][d] for r in range(num_devices)]) for d in range(num_devices)]


def ragged_all_to_all(operands, outputs, slices):
  """Returns the rows of every device after `jax.lax.ragged_all_to_all`, from its docstring.

  Slices must lie within their arrays, and no row may be written twice.
  """
  num_devices = len(operands)
  fields = [[np.asarray(getattr(s, name)) for s in slices] for name in Slices._fields]
  starts, sizes, places, received = fields
  for here, there in zip(sizes, all_to_all(received), strict=True):
    np.testing.assert_array_equal(here, there)
  each, leftover = divmod(len(starts[0]), num_devices)
  assert not leftover
  messages = [[[] for _ in range(num_devices)] for _ in range(num_devices)]
  for device in range(num_devices):
    for i, (start, size) in enumerate(zip(starts[device], sizes[device], strict=True)):
      assert start >= 0 and start + size <= len(operands[device])
      messages[device][i // each].append(operands[device][start : start + size])
  results = []
  for device, places_here in enumerate(all_to_all(places)):
    result, written = outputs[device].copy(), np.zeros(len(outputs[device]), int)
    for i, (place, size) in enumerate(zip(places_here, received[device], strict=True)):
      assert place >= 0 and place + size <= len(result)
      result[place : place + size] = messages[i // each][device].pop(0)
      written[place : place + size] += 1
    assert written.max() <= 1
    results.append(result)
  return results


def test_the_simulation_does_the_example_of_the_docstring():
  slices = [
    Slices(*map(np.array, ([0, 1], [1, 2], [0, 0], [1, 1]))),
    Slices(*map(np.array, ([0, 1], [1, 1], [1, 2], [2, 1]))),
  ]
  operands = [np.array([1, 2, 2]), np.array([3, 4, 0])]
  results = ragged_all_to_all(operands, [np.zeros(4, int)] * 2, slices)
  np.testing.assert_array_equal(results, [[1, 3, 0, 0], [2, 2, 4, 0]])


def buffers(filled, capacity):
  """A buffer [E, G, C, D] for each device: numbers where there is a token, else 0."""
  num_devices, num_experts, groups = filled.shape
  numbers = 1 + np.arange(num_devices * num_experts * groups * capacity * WIDTH)
  numbers = numbers.reshape(num_devices, num_experts, groups, capacity, WIDTH)
  return np.where(np.arange(capacity) < filled[..., None], 1, 0)[..., None] * numbers


def padded(sent):
  """Device d gets from each device r the slots of its own experts: [E_local, R * G, C, D]."""
  num_devices, num_experts, *rest = sent.shape
  by_owner = sent.reshape(num_devices, num_devices, num_experts // num_devices, *rest)
  received = np.moveaxis(by_owner, 0, 2)  # [owner, E_local, sender, G, C, D]
  return received.reshape(num_devices, num_experts // num_devices, -1, *rest[1:])


def slices_of_all(filled, capacity):
  """The slices of every device, there and back."""
  received = all_to_all(list(filled))
  pairs = [
    slices_of(jnp.asarray(mine), jnp.asarray(theirs), capacity, device, len(filled))
    for device, (mine, theirs) in enumerate(zip(filled, received, strict=True))
  ]
  return [there for there, _ in pairs], [back for _, back in pairs]


def move(flat, slices):
  return np.stack(ragged_all_to_all(list(flat), [np.zeros_like(rows) for rows in flat], slices))


def check(filled, capacity, change=lambda slices: slices):
  num_devices = len(filled)
  sent = buffers(filled, capacity)
  there, back = slices_of_all(filled, capacity)
  exchanged = move(sent.reshape(num_devices, -1, WIDTH), [change(s) for s in there])
  wanted = padded(sent)
  np.testing.assert_array_equal(exchanged, wanted.reshape(exchanged.shape))
  # Experts whose outputs are zero where there is no token, and differ from device to device.
  outputs = exchanged * 1000
  np.testing.assert_array_equal(move(outputs, back).reshape(sent.shape), sent * 1000)


@st.composite
def fills(draw):
  num_devices = draw(st.sampled_from([1, 2, 4]))
  each, groups, capacity = (draw(st.integers(1, 3)) for _ in range(3))
  shape = (num_devices, num_devices * each, groups)
  count = int(np.prod(shape))
  drawn = draw(st.lists(st.integers(0, capacity), min_size=count, max_size=count))
  return np.array(drawn, np.int32).reshape(shape), capacity


@hypothesis.given(fills())
def test_only_filled_rows_cross_and_nothing_differs(case):
  check(*case)


def random_fill():
  return np.random.default_rng(0).integers(0, 4, (4, 8, 2)).astype(np.int32), 3


@pytest.mark.parametrize('number', [0, 3])
def test_none_and_all_filled(number):
  filled, capacity = random_fill()
  check(np.full_like(filled, number), capacity)


@pytest.mark.parametrize(
  'change',
  [
    lambda s: s._replace(output_offsets=s.output_offsets[::-1]),
    lambda s: s._replace(output_offsets=s.input_offsets),
    lambda s: s._replace(input_offsets=s.input_offsets + 1),
    lambda s: s._replace(send_sizes=s.recv_sizes, recv_sizes=s.send_sizes),
    lambda s: s._replace(recv_sizes=s.send_sizes),
    lambda s: s._replace(send_sizes=s.send_sizes * 0, recv_sizes=s.recv_sizes * 0),
  ],
)
def test_any_wrong_offset_or_size_would_be_seen(change):
  check(*random_fill())
  with pytest.raises(AssertionError):
    check(*random_fill(), change)


def test_slices_are_no_more_than_what_is_filled():
  filled, capacity = random_fill()
  for mine, there in zip(filled, slices_of_all(filled, capacity)[0], strict=True):
    np.testing.assert_array_equal(there.send_sizes, mine.ravel())


def test_filled_slots_reach_to_the_last_that_holds_a_token():
  # Two groups of 3 tokens with K = 1: 3 says that a slot is empty.
  source = jnp.array([[[0, 2], [1, 3]], [[3, 3], [0, 1]]])
  nothing = jnp.zeros((2, 3, 1), jnp.int32)
  some = nothing.astype(bool)
  plan = Plan(nothing, nothing, some, some, nothing.astype(jnp.float32), source)
  np.testing.assert_array_equal(dispatch.filled_slots(plan), [[2, 0], [1, 2]])


def test_the_gradient_goes_along_the_slices_back(monkeypatch):
  def stand_in(operand, output, input_offsets, *rest, axis_name):
    return output + operand * input_offsets[0]

  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', stand_in)
  there, back = (Slices(*[jnp.full(2, number)] * 4) for number in (2, 5))

  def local(rows):
    outputs, pull = jax.vjp(lambda x: send_slices(EXPERT_AXIS, x, there, back), rows)
    return outputs, *pull(rows)

  everywhere = PartitionSpec()
  run = jax.shard_map(local, mesh=make_mesh(1, 1), in_specs=everywhere, out_specs=everywhere)
  outputs, gradient = run(jnp.ones((4, WIDTH)))
  np.testing.assert_array_equal(outputs, np.full((4, WIDTH), 2.0))
  np.testing.assert_array_equal(gradient, np.full((4, WIDTH), 5.0))
