"""Sampling: what the cache computes is what the whole sequence would give."""

import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import ByteTokenizer
from moe_jax.errors import UserError
from moe_jax.models.build import build_task
from moe_jax.models.decoder import forward
from moe_jax.models.generate import encode_prompt, generate, keep, sample_token
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train.state import init_params, params_shardings
from tests import tiny

# In evaluation each expert takes its best tokens of the whole text.
LEAKY = {
  'moe.router': 'expert_choice',
  'moe.evaluation': 'same',
  'moe.renormalize': 'none',
}
PROMPTS = [[256, 72, 105], [256], [256, 84, 104, 101, 32, 115, 101, 97], [256, 1, 2, 3]]
NO_EOS = -1


@functools.cache
def _model(mesh=(1, 1), every=1):
  config = tiny.config(
    {'mesh.data': mesh[0], 'mesh.expert': mesh[1], 'moe.every': every, 'moe.capacity_factor': 0.5}
  )
  model = build_task(config, make_mesh(*mesh), tiny.VOCAB_SIZE, 'decode')
  with jax.set_mesh(model.mesh):
    params = jax.jit(lambda: init_params(model, jnp.int32(0)))()
  # Enough to make the choices of tokens sharp and to route by content.
  params = jax.tree.map(lambda p: p * 3.0, jax.device_get(params))
  return model, jax.device_put(params, params_shardings(model))


def _generate(prompts, mesh=(1, 1), every=1, num_tokens=6, eos_id=NO_EOS, **how):
  model, params = _model(mesh, every)
  return generate(model, params, {}, prompts, num_tokens=num_tokens, eos_id=eos_id, **how)


@functools.cache
def _logits_function(every):
  """Of the oracle: one-hot products, a slot for every token at every expert."""
  model, _ = _model((1, 1), every)
  moe = dataclasses.replace(model.moe, dispatch='einsum')
  options = dataclasses.replace(model.network.options, moe=moe)
  model = dataclasses.replace(model, network=model.network.clone(options=options))
  return jax.jit(lambda params, *rows: forward(model.network, params, *rows).logits)


def _by_hand(prompt, num_tokens, every):
  """Repeated argmax of the full forward pass, without a cache."""
  _, params = _model((1, 1), every)
  tokens = list(prompt)
  length = 16
  for _ in range(num_tokens):
    row = np.zeros((1, length), np.int32)
    row[0, : len(tokens)] = tokens
    segments = (np.arange(length)[None] < len(tokens)).astype(np.int32)
    positions = np.arange(length, dtype=np.int32)[None]
    logits = _logits_function(every)(params, row, segments, positions)
    tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
  return tokens[len(prompt) :]


@pytest.mark.parametrize('every', [1, 2])
def test_greedy_is_the_argmax_of_the_full_forward_pass(every):
  continued = _generate(PROMPTS, every=every, temperature=0.0)
  assert continued == [_by_hand(prompt, 6, every) for prompt in PROMPTS]
  assert len({tuple(tokens) for tokens in continued}) == len(PROMPTS)


def test_prompts_do_not_influence_each_other():
  together = _generate(PROMPTS, temperature=0.0)
  assert together == [_generate([prompt], temperature=0.0)[0] for prompt in PROMPTS]


def test_prompts_that_do_not_fill_the_mesh():
  expected = _generate(PROMPTS, temperature=0.0)
  assert _generate(PROMPTS, mesh=(2, 4), temperature=0.0) == expected
  assert _generate(PROMPTS[:3] * 3, mesh=(2, 4), temperature=0.0) == expected[:3] * 3


def test_the_seed_decides_what_is_drawn():
  one = _generate(PROMPTS, temperature=1.0, seed=1)
  assert _generate(PROMPTS, temperature=1.0, seed=1) == one
  assert _generate(PROMPTS, mesh=(2, 4), temperature=1.0, seed=1) == one
  assert _generate(PROMPTS, temperature=1.0, seed=2) != one


def test_top_k_of_one_is_greedy():
  greedy = _generate(PROMPTS, temperature=0.0)
  assert _generate(PROMPTS, temperature=2.0, top_k=1) == greedy
  assert _generate(PROMPTS, temperature=2.0, top_p=1e-6) == greedy


def test_eos_ends_a_continuation():
  free = _generate(PROMPTS, temperature=0.0)
  eos = free[0][2]
  ended = _generate(PROMPTS, temperature=0.0, eos_id=eos)
  for tokens, expected in zip(ended, free, strict=True):
    assert tokens == expected[: expected.index(eos) if eos in expected else None]
  assert len(ended[0]) <= 2


def test_one_token():
  assert _generate(PROMPTS, temperature=0.0, num_tokens=1) == [
    tokens[:1] for tokens in _generate(PROMPTS, temperature=0.0)
  ]


@functools.cache
def _sampler(vocab_size):
  del vocab_size
  draw = jax.vmap(sample_token, in_axes=(None, 0, None, None, None))
  return jax.jit(draw)


def _frequencies(logits, temperature=1.0, top_k=0, top_p=1.0, draws=4000):
  keys = jax.random.split(jax.random.key(0), draws)
  numbers = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
  drawn = _sampler(len(logits))(jnp.asarray(logits, jnp.float32), keys, *numbers)
  return np.bincount(np.asarray(drawn), minlength=len(logits)) / draws


def _expected(logits, temperature=1.0, top_k=0, top_p=1.0):
  """The distribution by its definition, in NumPy."""
  scaled = np.asarray(logits, np.float32) / np.float32(temperature)
  order = np.argsort(-scaled, kind='stable')
  probs = np.zeros(len(scaled))
  kept = order[: top_k or None]
  weights = np.exp(scaled[kept] - scaled.max())
  weights /= weights.sum()
  # The fewest: ends with the first of which the sum, without the rounding of float32, is enough.
  reached = np.cumsum(weights) > top_p - 1e-6 if top_p < 1 else np.zeros(len(kept), bool)
  end = int(np.argmax(reached)) + 1 if reached.any() else len(kept)
  kept, weights = kept[:end], weights[:end]
  probs[kept] = weights / weights.sum()
  return probs


# Far enough apart that no two are a tie in float32.
LOGITS = hnp.arrays(np.int32, 6, elements=st.integers(-8, 8), unique=True).map(lambda x: x / 4)


@hypothesis.given(
  logits=LOGITS,
  temperature=st.sampled_from([0.5, 1.0, 2.0]),
  top_k=st.integers(0, 6),
  top_p=st.sampled_from([0.3, 0.7, 0.95, 1.0]),
)
def test_distribution_is_that_of_the_definition(logits, temperature, top_k, top_p):
  how = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
  frequencies, expected = _frequencies(logits, **how), _expected(logits, **how)
  assert np.all(frequencies[expected == 0] == 0)
  # 5 standard deviations of 4000 draws.
  np.testing.assert_allclose(frequencies, expected, atol=0.04)


def test_temperature_zero_is_the_argmax():
  np.testing.assert_array_equal(_frequencies([0.0, 3.0, 2.9], temperature=0.0), [0, 1, 0])


def test_ties_with_the_last_that_is_kept_stay():
  frequencies = _frequencies([1.0, 1.0, 1.0, 0.0], top_k=2)
  assert frequencies[3] == 0
  np.testing.assert_allclose(frequencies[:3], 1 / 3, atol=0.04)


@pytest.mark.parametrize(
  ('probs', 'top_p', 'kept'),
  [
    ([0.25] * 4, 0.25, [0]),
    ([0.25] * 4, 0.5, [0, 1]),
    ([0.25] * 4, 0.51, [0, 1, 2]),
    ([0.4, 0.2, 0.2, 0.2], 0.6, [0, 1]),
    ([0.2, 0.2, 0.4, 0.2], 0.6, [0, 2]),
    ([0.2, 0.2, 0.4, 0.2], 0.4, [2]),
    ([0.1, 0.2, 0.3, 0.4], 0.7, [2, 3]),
    ([0.1, 0.2, 0.3, 0.4], 0.71, [1, 2, 3]),
  ],
)
def test_top_p_keeps_the_fewest_by_hand(probs, top_p, kept):
  """Of four equal ones the first, the second where one is not enough, and so on."""
  frequencies = _frequencies(np.log(probs), top_p=top_p)
  assert np.flatnonzero(frequencies).tolist() == kept
  expected = np.where(np.isin(np.arange(4), kept), probs, 0)
  np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.04)
  np.testing.assert_allclose(_expected(np.log(probs), top_p=top_p) > 0, frequencies > 0)


def test_top_p_of_one_keeps_all():
  """Also those whose probability is less than the rounding of a sum, or than float32 has."""
  logits = jnp.linspace(0, -200, 258)
  assert jax.nn.softmax(logits)[-1] == 0
  for top_p, kept in ((1.0, 258), (0.999, 9)):  # 1 - e^(-9 x 200 / 257) = 0.99909
    made = jax.jit(keep)(logits, jnp.int32(0), jnp.float32(top_p))
    assert np.isfinite(made).sum() == kept
    np.testing.assert_array_equal(made[:kept], logits[:kept])


def test_encode_prompt():
  tokenizer = ByteTokenizer()
  assert encode_prompt('é', tokenizer, 258) == [256, 0xC3, 0xA9]
  assert encode_prompt('', tokenizer, 258) == [256]
  with pytest.raises(UserError, match="--prompt='é': token 195 is outside the vocabulary of 100"):
    encode_prompt('é', ByteTokenizerOf100(), 100)
  with pytest.raises(UserError, match='not UTF-8'):
    encode_prompt('\udcff', tokenizer, 258)


class ByteTokenizerOf100(ByteTokenizer):
  vocab_size = 100
  bos_id = 98
  eos_id = 99


def test_a_run_that_evaluates_by_the_future_is_not_decoded():
  config = tiny.config(LEAKY)
  build_task(config, make_mesh(2, 4), tiny.VOCAB_SIZE, 'eval')
  with pytest.raises(UserError, match="moe.evaluation='same': the run cannot be decoded"):
    build_task(config, make_mesh(2, 4), tiny.VOCAB_SIZE, 'decode')
