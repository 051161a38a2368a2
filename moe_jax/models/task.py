"""The interface between model families and everything that trains, evaluates or counts them.

`train`, `run`, `sweep`, `results` and `benchmark` know a `Task`, never a family. A family is a file
that derives from it, and its name in `moe_jax.models.build`.

One-letter dimensions: B sequences, T tokens of each, L MoE layers, E experts, K assignments of a
token, V vocabulary.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax import routing, stacks
from moe_jax.layers.moe_options import MoeOptions

Batch = dict[str, Array]


class Selected(NamedTuple):
  """Experts that the tokens of a batch selected, before any drop.

  Attributes:
    experts: of each MoE layer; -1 is none.
    token_ids: of the vocabulary; the model's input.
    valid: False for padding.
  """

  experts: Int[Array, 'L B T K']
  token_ids: Int[Array, 'B T']
  valid: Bool[Array, 'B T']


class LossTerms(NamedTuple):
  """Sums of a forward pass over a batch, never means: so parts of a batch add up.

  Attributes:
    total: the loss, in nats where it is a cross-entropy.
    router_sums: each leaf with a leading dimension of MoE layers; None without such layers.
    selected: None unless the task was made by `with_selected`.
  """

  total: Float[Array, '']
  router_sums: routing.RouterSums | None = None
  selected: Selected | None = None


class DecodeHooks(NamedTuple):
  """Functions that sample from a model token by token.

  Attributes:
    init_cache: (batch_size, max_length) -> an empty cache, of any structure.
    read: (params, router_state, tokens [B T], valid [B T], positions [B T], cache, last [B]) ->
      (logits [B V] after the token at index `last` of each row, cache with the tokens).
  """

  init_cache: Callable[[int, int], Any]
  read: Callable[..., tuple[Float[Array, 'B V'], Any]]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
  """A model with its loss. Immutable and hashable: an argument of compiled functions.

  A family defines `init` and `loss`; the defaults of the rest are those of a model without experts
  that can't be sampled from.

  Attributes:
    mesh: axes ('data', 'expert').
    vocab_size: V of the tokenizer.
  """

  mesh: Mesh
  vocab_size: int

  # Arrays of a batch: [B T] integers of the data pipeline.
  batch_fields = ('inputs', 'targets', 'segment_ids', 'positions')

  @property
  def moe(self) -> MoeOptions | None:
    """The options of the MoE layers; None if there are none."""
    return None

  @property
  def num_moe_layers(self) -> int:
    """L."""
    return 0

  @abc.abstractmethod
  def init(self, key: Key[Array, '']) -> Any:
    """Returns new parameters: the same numbers on any mesh.

    Arrays are boxed with the names of their dimensions (`flax.linen.Partitioned`) where the table
    of `moe_jax.parallel.sharding` splits one. Those under `layers` have the layers in front.
    """

  def init_router_state(self) -> dict[str, Array]:
    """Returns the state of the routers before the first step, each array with L in front."""
    return {}

  def weight(self, batch: Batch) -> Float[Array, '']:
    """Returns the divisor of the loss of a batch: its number of tokens, without padding."""
    return jnp.sum(batch['segment_ids'] > 0).astype(jnp.float32)

  @abc.abstractmethod
  def loss(
    self, params: Any, router_state: Any, batch: Batch, *, key: Key[Array, ''] | None = None
  ) -> LossTerms:
    """Returns the sums over a batch: with a key as in training, without deterministically."""

  def with_selected(self) -> 'Task':
    """Returns the task whose losses also return the experts that tokens selected."""
    return self

  def param_label(self, path: tuple[str, ...], shape: tuple[int, ...]) -> str:
    """Returns the kind of a parameter, one of `stacks.LABELS`: for optimizer and accounting."""
    return stacks.label(path, shape)

  def expert_weights(self, params: Any) -> list[Float[Array, 'L E ...']]:
    """Returns the weights of the experts."""
    del params
    return []

  def flops_per_token(self, sequence_length: int) -> int:
    """Returns multiply-adds x 2 of a token's forward and backward pass in matmuls.

    Three times those of the forward pass: 2 for each parameter of a matrix that a token passes.
    """
    del sequence_length
    return 6 * matmul_params(self)

  @property
  def decode(self) -> DecodeHooks | None:
    """The hooks that sample from the model; None if it cannot be sampled from."""
    return None


@functools.lru_cache(maxsize=64)
def param_shapes(task: Task) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shape of each parameter by its path; nothing is computed."""
  with jax.set_mesh(task.mesh):
    boxed = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
  leaves, _ = jax.tree_util.tree_flatten_with_path(nn.unbox(boxed))
  return {stacks.names(path): leaf.shape for path, leaf in leaves}


def parameter_counts(task: Task) -> dict[str, int]:
  """Returns the parameters of the model: in `total`, and those one token passes, in `active`."""
  total = sum(size for _, size in _sizes(task))
  experts = expert_params(task)
  return {'total': total, 'active': total - experts + _passed(task, experts)}


def matmul_params(task: Task) -> int:
  """Returns the parameters of matrices that one token passes.

  Router and output are included, the look-up of the embedding is not; a model without an output
  matrix of its own uses the embedding for it.
  """
  sizes = _sizes(task)
  by_label = {label: sum(s for name, s in sizes if name == label) for label in stacks.LABELS}
  output = by_label['output'] or by_label['embedding']
  return output + by_label['matrix'] + by_label['router'] + _passed(task, by_label['expert'])


def num_passed_experts(task: Task) -> int:
  """Returns the routed experts that one token passes."""
  moe = task.moe
  if moe is None:
    return 0
  keeps_all = routing.ROUTERS[moe.router].keeps_all
  return moe.num_experts if keeps_all else moe.num_selected_experts


def expert_params(task: Task) -> int:
  """Returns the parameters of all routed experts of all layers."""
  return sum(size for label, size in _sizes(task) if label == 'expert')


def _passed(task: Task, expert_params: int) -> int:
  moe = task.moe
  return 0 if moe is None else expert_params * num_passed_experts(task) // moe.num_experts


def _sizes(task: Task) -> list[tuple[str, int]]:
  """Returns (label, size) of each array of parameters."""
  return [
    (task.param_label(path, shape), math.prod(shape)) for path, shape in param_shapes(task).items()
  ]
