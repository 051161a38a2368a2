"""The experts' products: all in one batched product, or one expert at a time.

What `moe_jax.layers.experts` chooses between by shape, measured here at any shape.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.benchmark.arms import Shape, with_tokens_per_expert
from moe_jax.benchmark.timing import compile_arm, is_void, measure, milliseconds, ratio
from moe_jax.layers import experts as experts_lib
from moe_jax.layers.basic import hidden_dim
from moe_jax.layers.weight_gradients import batched_gradient


def _looped_weights_gradient(rows: jax.Array, grad: jax.Array) -> jax.Array:
  return jax.lax.map(lambda pair: pair[0].T @ pair[1], (rows, grad))


# Of rows x, weights W and the gradient of x W: (all in one, one at a time).
PRODUCTS = {
  'x W': (experts_lib.batched, experts_lib.looped),
  'dx': (experts_lib.batched_rows_gradient, experts_lib.looped_rows_gradient),
  'dW': (batched_gradient, _looped_weights_gradient),
}


def rows(
  shape: Shape, *, num_experts: Sequence[int], tokens_per_expert: int, rounds: int, seed: int
) -> Iterator[dict[str, Any]]:
  """Measures the three products of both matrices of an expert.

  Args:
    shape: of all rows; each expert has as many rows as it has slots.
    num_experts: values of E.
    tokens_per_expert: if not 0, tokens are as many as give each expert so many.
    rounds: of interleaved calls.
    seed: of the inputs and the orders.

  Yields:
    num_experts, num_rows (of each expert), weights ([D, F] of one), product, speed (time of the
    batched product / time of the loop), loops (whether the layer takes the loop on CPUs), null,
    void, milliseconds of the batched product.
  """
  for experts in num_experts:
    of_experts = with_tokens_per_expert(shape, tokens_per_expert, experts)
    num_rows = routing.expert_capacity(
      of_experts.num_tokens, experts, shape.num_selected_experts, shape.capacity_factor
    )
    columns = hidden_dim(shape.mlp_dim, shape.activation)
    for sizes in ((shape.embed_dim, columns), (shape.mlp_dim, shape.embed_dim)):
      keys = jax.random.split(jax.random.key(seed), 3)
      dims = ((num_rows, sizes[0]), sizes, (num_rows, sizes[1]))
      x, weights, grad = (
        jax.random.normal(key, (experts, *dim), jnp.dtype(shape.dtype))
        for key, dim in zip(keys, dims, strict=True)
      )
      for product, arguments in {
        'x W': (x, weights),
        'dx': (grad, weights),
        'dW': (x, grad),
      }.items():
        batched, looped = (compile_arm(way, *arguments) for way in PRODUCTS[product])
        calls = {'batched': batched.call, 'copy': batched.call, 'loop': looped.call}
        seconds = measure(calls, rounds, seed)
        null = ratio(seconds['batched'], seconds['copy'])
        yield {
          'num_experts': experts,
          'num_rows': num_rows,
          'weights': list(sizes),
          'product': product,
          'speed': ratio(seconds['batched'], seconds['loop'])._asdict(),
          'loops': product != 'dW' and experts_lib.prefers_loop(num_rows, weights.shape),
          'null': null._asdict(),
          'void': is_void(null),
          'milliseconds': milliseconds(seconds['batched']),
        }
