"""Tokenizers lose nothing and never mistake text for a special token."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax import errors
from moe_jax.data import tokenizer as tokenizer_lib

from . import conftest

TEXTS = [conftest.prose(f'text{i}', 60) + 'Grüße, <bos> and <eos>!\r\n\t x\n' for i in range(6)]


@pytest.fixture(scope='module')
def bpe():
  return tokenizer_lib.train_bpe(TEXTS, 700)


@pytest.fixture(params=['bytes', 'bpe'])
def tokenizer(request, bpe):
  return bpe if request.param == 'bpe' else tokenizer_lib.ByteTokenizer()


fixed_tokenizer = hypothesis.settings(
  max_examples=80,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@fixed_tokenizer
@hypothesis.given(st.lists(st.text() | st.sampled_from(['<bos>', '<eos>', '\n', '\u2028', ' '])))
def test_lossless_for_any_text(tokenizer, parts):
  text = ''.join(parts)
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id]) == text


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  st.lists(st.sampled_from(['word', ' ', '\n', '\n\n', '.', "'s", '\x1c', 'é', '\r\n'])).map(
    lambda parts: ''.join(parts) * 40
  )
)
def test_cutting_long_texts_changes_no_token(bpe, text):
  old = tokenizer_lib._PIECE_CHARACTERS
  tokenizer_lib._PIECE_CHARACTERS = 5
  try:
    cut = bpe.encode(text)
  finally:
    tokenizer_lib._PIECE_CHARACTERS = old
  assert cut.tolist() == bpe._tokenizer.encode(text, add_special_tokens=False).ids


def test_incomplete_utf8_becomes_replacement_characters(tokenizer):
  ids = [int(i) for i in tokenizer.encode('é')]
  if tokenizer.name == 'bytes':
    assert tokenizer.decode(ids[:1]) == '\ufffd'
  assert tokenizer.decode([]) == ''


def test_batch_equals_one_by_one(tokenizer):
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_training_is_deterministic_and_small_texts_give_small_vocabularies(bpe):
  assert tokenizer_lib.train_bpe(TEXTS, 700).fingerprint == bpe.fingerprint
  assert bpe.vocab_size == 700
  tiny = tokenizer_lib.train_bpe(['ab'], 700)
  assert tiny.vocab_size == 258
  assert tiny.decode(tiny.encode('Ω zebra')) == 'Ω zebra'


def test_save_and_load(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path))
  loaded = tokenizer_lib.load_tokenizer(str(tmp_path))
  for key in ('name', 'vocab_size', 'bos_id', 'eos_id', 'fingerprint'):
    assert getattr(loaded, key) == getattr(tokenizer, key)
  np.testing.assert_array_equal(loaded.encode('<eos> a'), tokenizer.encode('<eos> a'))


SHORT_WORDS = [
  *TEXTS,
  ' '.join('word' * 249 for _ in range(9)),  # 996 letters
  'a' * 999 + '\n' + ' ' * 999 + 'b.\n' + '=' * 999,
  '\n'.join(['x' * 700, 'visible\ntext', '漢' * 700, '\u2003' * 700] * 8),
  '',
]


def test_words_of_normal_length_train_as_they_stand(monkeypatch):
  cut = tokenizer_lib.train_bpe(SHORT_WORDS, 700)
  assert ''.join(tokenizer_lib.cut_long_words(SHORT_WORDS)) == ''.join(SHORT_WORDS)
  monkeypatch.setattr(tokenizer_lib, 'cut_long_words', lambda texts: texts)
  assert tokenizer_lib.train_bpe(SHORT_WORDS, 700).fingerprint == cut.fingerprint


@pytest.mark.parametrize('letter', ['a', '7', ' ', '\n', '=', '漢', '\u2003', '\x1c'])
@pytest.mark.parametrize('around', ['', ' ', 'A few words.\nAnd more.\n' * 120])
def test_long_words_train_in_pieces_of_1000_characters(letter, around):
  text = around + letter * 5500 + around
  pieces = list(tokenizer_lib.cut_long_words([text]))
  assert ''.join(pieces) == text
  words = [
    word
    for piece in pieces
    for word, _ in tokenizer_lib.tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    ).pre_tokenize_str(piece)
  ]
  # The library writes a byte as a character; a leading space belongs to the word.
  assert max(map(len, words)) <= (1000 + 1) * len(letter.encode())
  assert len(words) >= 6


def test_training_counts_no_pair_across_a_cut():
  # Cut into pieces of 1,000 characters this word holds no 'qw', uncut it holds two.
  word = 'q'.join(['a' * 999, 'w' + 'a' * 998, 'w' + 'a' * 500])
  assert len(tokenizer_lib.train_bpe([word], 512).encode('qw')) == 2
  assert len(tokenizer_lib.train_bpe([word[990:1010], word[1990:2010]], 512).encode('qw')) == 1


def test_a_long_word_is_encoded_without_loss(bpe):
  text = 'antidis' * 40_000
  assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize(
  'content',
  [
    *(None, '', '{"model"', '[]', '{"model": {"type": "WordPiece"}}', '[' * 20_000),
    # Of the right type, and then: no vocabulary, a merge of what is not in it, no special tokens.
    '{"model": {"type": "BPE"}}',
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
  ],
  ids=range(9),
)
def test_damaged_file(tmp_path, content):
  if content is not None:
    (tmp_path / tokenizer_lib.FILE).write_text(content)
  with pytest.raises(errors.DamagedError, match=tokenizer_lib.FILE):
    tokenizer_lib.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
  ('kind', 'vocab_size', 'field'),
  [
    ('words', 0, 'data.tokenizer'),
    ('bytes', 512, 'data.vocab_size'),
    ('bpe', 0, 'data.vocab_size'),
    ('bpe', 511, 'data.vocab_size'),
    # The library would end the process for want of memory.
    ('bpe', 2**31 - 1, 'data.vocab_size'),
    ('bpe', 2**20 + 1, 'data.vocab_size'),
  ],
)
def test_bad_requests_name_the_field(kind, vocab_size, field):
  with pytest.raises(errors.UserError) as error:
    tokenizer_lib.check_request(kind, vocab_size)
  assert error.value.field == field


def test_good_requests():
  for kind, vocab_size in (('bytes', 0), ('bytes', 258), ('bpe', 512), ('bpe', 2**20)):
    tokenizer_lib.check_request(kind, vocab_size)
