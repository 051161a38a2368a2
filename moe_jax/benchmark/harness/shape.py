"""The sizes of the layers that a suite measures."""

from typing import NamedTuple


class Shape(NamedTuple):
  """The layer that is measured, next to a dense layer of the same active FLOPs.

  Attributes:
    num_tokens: S, all of one group unless a suite says otherwise.
    embed_dim: D.
    mlp_dim: F of one expert.
    num_selected_experts: K.
    capacity_factor: of every number of experts.
    activation: of the experts and of the dense layer.
    dtype: of the matmuls.
  """

  num_tokens: int
  embed_dim: int
  mlp_dim: int
  num_selected_experts: int
  capacity_factor: float
  activation: str
  dtype: str


def with_tokens_per_expert(shape: Shape, tokens_per_expert: int, num_experts: int) -> Shape:
  """Returns the shape with S such that each expert gets N tokens on average; unchanged for 0."""
  if not tokens_per_expert:
    return shape
  return shape._replace(num_tokens=tokens_per_expert * num_experts // shape.num_selected_experts)
