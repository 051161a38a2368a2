"""Cross-entropy by parts of the tokens: all logits of a batch are never there at once.

B x T x V logits in float32 are often the largest array of a step. Here each device takes its tokens
part by part. A part's gradients are formed with its loss, while its logits are at hand: the
backward pass computes no logit again, and only multiplies what the forward pass left by a number.

One-letter dimensions: B sequences, T tokens of each, D embed, V vocabulary, N tokens on this
device, P parts, R tokens of a part.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from moe_jax.parallel.mesh import BATCH_AXES
from moe_jax.parallel.sharding import spec

# Logits that a device holds at once: what fits a cache on a CPU; elsewhere what keeps it busy.
_CPU_LOGITS, _LOGITS = 2**20, 2**26


def logits(hidden: Float[Array, '*any D'], output: Float[Array, 'D V']) -> Float[Array, '*any V']:
  """Returns the logits of tokens in float32."""
  return jnp.einsum('...d,dv->...v', hidden, output, preferred_element_type=jnp.float32)


def cross_entropy_sum(
  hidden: Float[Array, 'B T D'],
  output: Float[Array, 'D V'],
  targets: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
  mesh: Mesh,
  num_logits: int = 0,
) -> Float[Array, '']:
  """Returns the cross-entropy in nats, summed over tokens that are not padding.

  Args:
    hidden: of each token, sharded over the batch.
    output: matrix from it to the logits, copied to every device.
    targets: next tokens.
    segment_ids: 0 marks padding.
    mesh: axes ('data', 'expert').
    num_logits: that a device holds at once, at least those of one token; 0 for a number that suits
      the platform. It changes nothing but rounding.

  Tests compare it with the cross-entropy of all logits at once.
  """
  vocab_size = output.shape[-1]
  platform = mesh.devices.flat[0].platform
  most = num_logits or (_CPU_LOGITS if platform == 'cpu' else _LOGITS)
  rows_in_part = max(1, most // vocab_size)

  def local(hidden, output, targets, valid):
    # Each device has a gradient of its own for the matrix; their sum is the transpose of this.
    output = jax.lax.pcast(output, BATCH_AXES, to='varying')
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = _parts(rows, targets.ravel(), valid.ravel(), rows_in_part)
    # Every device holds other sequences, over both axes; their sum is the same everywhere.
    return jax.lax.psum(_nats(*parts, output), BATCH_AXES)

  by_sequence = spec('batch')
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_sequence, spec(), by_sequence, by_sequence),
    out_specs=spec(),
    check_vma=True,
  )(hidden, output, targets, segment_ids > 0)


def _parts(
  rows: Float[Array, 'N D'],
  targets: Int[Array, 'N'],
  valid: Bool[Array, 'N'],
  rows_in_part: int,
) -> tuple[Float[Array, 'P R D'], Int[Array, 'P R'], Bool[Array, 'P R']]:
  """Cuts tokens into equal parts, the last one filled up with padding."""
  # As few parts as the limit allows, and these of equal size: padding is less than one row a part.
  num_parts = -(-rows.shape[0] // rows_in_part)
  rows_in_part = -(-rows.shape[0] // num_parts)
  missing = num_parts * rows_in_part - rows.shape[0]
  return (
    jnp.pad(rows, ((0, missing), (0, 0))).reshape(num_parts, rows_in_part, -1),
    jnp.pad(targets, (0, missing)).reshape(num_parts, rows_in_part),
    jnp.pad(valid, (0, missing)).reshape(num_parts, rows_in_part),
  )


# A custom gradient: reverse mode through the scan would keep the logits of all parts, which is what
# this module avoids.
@jax.custom_vjp
def _nats(rows, targets, valid, output):
  """Sum over all parts."""

  def add(total, part):
    rows, targets, valid = part
    return total + _part_nats(rows, targets, valid, output)[0], None

  return jax.lax.scan(add, _zero(rows), (rows, targets, valid))[0]


def _nats_fwd(rows, targets, valid, output):
  def add(carry, part):
    total, d_output = carry
    rows, targets, valid = part
    nats, probs = _part_nats(rows, targets, valid, output)
    # The gradient of -log softmax(logits)[target] is softmax - one-hot; [R V].
    d_logits = probs - jax.nn.one_hot(targets, output.shape[-1], dtype=probs.dtype)
    d_logits = jnp.where(valid[:, None], d_logits, 0).astype(output.dtype)
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_output += matmul('rd,rv->dv', rows, d_logits)
    return (total + nats, d_output), matmul('rv,dv->rd', d_logits, output).astype(rows.dtype)

  # The [D V] gradient is one float32 sum over parts; the rows' gradients are stacked to [P R D].
  empty = jnp.zeros(output.shape, jnp.float32) + _zero(rows)
  (total, d_output), d_rows = jax.lax.scan(add, (_zero(rows), empty), (rows, targets, valid))
  return total, (d_rows, d_output.astype(output.dtype))


def _nats_bwd(residuals, d_nats):
  d_rows, d_output = residuals
  # The loss is one number, so its gradient is one, too, and scales what was left.
  d_rows, d_output = ((x * d_nats).astype(x.dtype) for x in (d_rows, d_output))
  return d_rows, None, None, d_output


_nats.defvjp(_nats_fwd, _nats_bwd)


def _part_nats(rows, targets, valid, output):
  """Returns the nats of a part, and its probabilities [R V]."""
  row_logits = logits(rows, output)
  # The largest logit is taken out, lest exp overflow, and put back after the logarithm. The powers
  # serve loss and probabilities alike.
  largest = jnp.max(row_logits, axis=-1, keepdims=True)
  powers = jnp.exp(row_logits - largest)
  total = jnp.sum(powers, axis=-1, keepdims=True)
  picked = jnp.take_along_axis(row_logits, targets[:, None], axis=-1)
  nats = (jnp.log(total) + largest - picked)[:, 0]
  return jnp.sum(jnp.where(valid, nats, 0.0)), powers / total


def _zero(rows: Float[Array, 'P R D']) -> Float[Array, '']:
  """0, marked as differing between devices like the rows: what a sum of theirs starts from."""
  # Not 0 * x, which is NaN for an infinite x.
  return jnp.where(True, 0.0, rows[0, 0, 0].astype(jnp.float32))
