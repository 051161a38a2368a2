"""Noise on the router's input, for any router.

One-letter dimensions: G routing groups, S tokens of a group, D embed.
"""

import jax
from jaxtyping import Array, Float, Key


def jitter(
  tokens: Float[Array, 'G S D'], keys: Key[Array, 'G'], epsilon: float
) -> Float[Array, 'G S D']:
  """Multiplies the router's input by noise from U(1 - epsilon, 1 + epsilon), drawn per element.

  One key per group, so that the noise does not depend on which device holds the group. Training
  only; the experts see the tokens without noise.

  Source: Fedus et al. 2021, arXiv:2101.03961, app. C, and multiplicative_jitter of Mesh TensorFlow
  (da90793), only on the router's input and only in training.
  """
  # [S D] for each group: a factor for each element, not one for a token.
  draw = jax.vmap(
    lambda key: jax.random.uniform(
      key, tokens.shape[1:], tokens.dtype, minval=1.0 - epsilon, maxval=1.0 + epsilon
    )
  )
  return tokens * draw(keys)
