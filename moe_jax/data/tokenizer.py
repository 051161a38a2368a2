"""Text to token ids and back: bytes, and byte-level BPE.

Both are lossless for any text, and neither ever turns text into a special token: a document that
spells `<eos>` stays text.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from moe_jax import errors
from moe_jax.files import write_atomically

FILE = 'tokenizer.json'
KINDS = ('bytes', 'bpe')
BYTES_VOCAB_SIZE = 258
MIN_BPE_VOCAB_SIZE = 512
# Four times the largest in use. The trainer takes memory for as many tokens before it reads a text.
MAX_BPE_VOCAB_SIZE = 2**20

_BYTES_MODEL = 'moe_jax.bytes'
_BOS, _EOS = '<bos>', '<eos>'


@runtime_checkable
class Tokenizer(Protocol):
  """Interface that the data package needs of a tokenizer.

  Attributes:
    name: 'bytes' or 'bpe'.
    vocab_size: number of tokens, specials included.
    bos_id: stands before every document.
    eos_id: stands after every document.
    fingerprint: SHA-256; equal for tokenizers that encode alike.
  """

  name: str
  vocab_size: int
  bos_id: int
  eos_id: int
  fingerprint: str

  def encode(self, text: str) -> Int32[np.ndarray, 'N']:
    """Returns the tokens of a text, without specials."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, '_']]:
    """Returns `encode` of every text, faster."""
    ...

  def decode(self, ids: Integer[np.ndarray, 'N'] | Sequence[int]) -> str:
    """Returns the text; skips specials, and writes U+FFFD for what is not UTF-8."""
    ...

  def save(self, directory: str) -> None:
    """Writes `tokenizer.json`."""
    ...


class ByteTokenizer:
  """A token per UTF-8 byte: 0 to 255, then BOS 256 and EOS 257. See `Tokenizer`."""

  name = 'bytes'
  vocab_size = BYTES_VOCAB_SIZE
  bos_id = 256
  eos_id = 257
  fingerprint = hashlib.sha256(b'bytes-1').hexdigest()

  def encode(self, text: str) -> Int32[np.ndarray, 'N']:
    """Returns the UTF-8 bytes."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, '_']]:
    """Returns the UTF-8 bytes of every text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Integer[np.ndarray, 'N'] | Sequence[int]) -> str:
    """Returns the text; skips specials, and writes U+FFFD for what is not UTF-8."""
    array = np.asarray(ids, np.int64)
    return array[(array >= 0) & (array < 256)].astype(np.uint8).tobytes().decode(errors='replace')

  def save(self, directory: str) -> None:
    """Writes `tokenizer.json`."""
    text = json.dumps({'model': {'type': _BYTES_MODEL}, 'vocab_size': self.vocab_size})
    write_atomically(os.path.join(directory, FILE), text)


# The ByteLevel pre-tokenizer always ends a word at a single newline between two visible
# characters, so cutting there changes no token. The library is 1.6x as fast on short strings, and
# spreads them over the cores. ASCII only: what counts as white space elsewhere differs between
# Python and the library.
_SAFE_CUT = re.compile(r'(?<=[!-~]\n)(?=[!-~])')
_PIECE_CHARACTERS = 2000


def _pieces(text: str) -> list[str]:
  pieces, start = [], 0
  while cut := _SAFE_CUT.search(text, start + _PIECE_CHARACTERS):
    pieces.append(text[start : cut.start()])
    start = cut.start()
  return [*pieces, text[start:]]


# Counting a pair again takes time in proportion to the word that it stands in, so a word of 300,000
# letters takes minutes. No word of a language comes near this length, in characters.
_TRAINING_WORD = 1000


def _may_hold_long_word(text: str) -> bool:
  """Tells if a word may exceed `_TRAINING_WORD`, quickly and erring towards yes.

  Such a word is white space, or but for a leading space has no space or newline in it. It covers
  one of the blocks of half its length that the text divides into.
  """
  size = _TRAINING_WORD // 2
  blocks = (text[start : start + size] for start in range(0, len(text) - size + 1, size))
  return any((' ' not in block and '\n' not in block) or block.isspace() for block in blocks)


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
  """Yields what to train on: the texts, with words of more than 1,000 characters in pieces.

  A word is what the ByteLevel pre-tokenizer takes for one: a run of letters, of digits, of white
  space or of other characters. A text without such a word gives the same words as before.
  """
  splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  for text in texts:
    if not _may_hold_long_word(text):
      yield text
      continue
    for piece in _pieces(text):
      if not _may_hold_long_word(piece):
        yield piece
        continue
      start = 0
      for _, (first, last) in splitter.pre_tokenize_str(piece):
        for cut in range(first + _TRAINING_WORD, last, _TRAINING_WORD):
          yield piece[start:cut]
          start = cut
      yield piece[start:]


class BpeTokenizer:
  """Byte-level BPE of the `tokenizers` library. See `Tokenizer`.

  The file is an ordinary Hugging Face tokenizer.json, with `<bos>` and `<eos>` as its specials.
  """

  name = 'bpe'

  def __init__(self, serialized: str):
    self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
    # Else a document that spells '<eos>' would be encoded as the end of a document. The file format
    # has no field for this setting.
    self._tokenizer.encode_special_tokens = True
    self.vocab_size: int = self._tokenizer.get_vocab_size()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.bos_id: int = vocabulary[_BOS]
    self.eos_id: int = vocabulary[_EOS]
    self._serialized = serialized
    self.fingerprint = hashlib.sha256(serialized.encode()).hexdigest()

  def encode(self, text: str) -> Int32[np.ndarray, 'N']:
    """Returns the tokens of a text, without specials."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, '_']]:
    """Returns `encode` of every text, on all cores."""
    pieces = [_pieces(text) for text in texts]
    flat = [piece for group in pieces for piece in group]
    encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    return [
      np.concatenate([np.array(next(encodings).ids, np.int32) for _ in group]) for group in pieces
    ]

  def decode(self, ids: Integer[np.ndarray, 'N'] | Sequence[int]) -> str:
    """Returns the text; skips specials, and writes U+FFFD for what is not UTF-8."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def save(self, directory: str) -> None:
    """Writes `tokenizer.json`."""
    write_atomically(os.path.join(directory, FILE), self._serialized)


def check_request(kind: str, vocab_size: int) -> None:
  """Checks what the user requested, before any work is done.

  Raises:
    errors.UserError: if `kind` is unknown, or `vocab_size` is not possible for it.
  """
  if kind not in KINDS:
    raise errors.UserError('data.tokenizer', kind, f'must be one of {", ".join(KINDS)}')
  if kind == 'bytes' and vocab_size not in (0, BYTES_VOCAB_SIZE):
    raise errors.UserError(
      'data.vocab_size',
      vocab_size,
      f'must be {BYTES_VOCAB_SIZE} (or 0, the default) with data.tokenizer=bytes',
    )
  if kind == 'bpe' and not MIN_BPE_VOCAB_SIZE <= vocab_size <= MAX_BPE_VOCAB_SIZE:
    raise errors.UserError(
      'data.vocab_size',
      vocab_size,
      f'must be {MIN_BPE_VOCAB_SIZE} to {MAX_BPE_VOCAB_SIZE:,} with data.tokenizer=bpe',
    )


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
  """Trains byte-level BPE; the same texts in the same order give the same tokenizer.

  A small text may not have enough pairs that repeat; then `vocab_size` of the result is smaller.
  Words longer than any of a language are cut for training, not for encoding: see `cut_long_words`.

  Args:
    texts: what to train on.
    vocab_size: number of tokens wanted, the 256 bytes and 2 specials included.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    min_frequency=2,
    show_progress=False,
    special_tokens=[_BOS, _EOS],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator(cut_long_words(texts), trainer)
  return BpeTokenizer(tokenizer.to_str())


def load_tokenizer(directory: str) -> Tokenizer:
  """Restores what `save` wrote.

  Raises:
    errors.DamagedError: if the file is missing or is not a tokenizer that `save` wrote.
  """
  path = os.path.join(directory, FILE)
  try:
    with open(path, encoding='utf-8') as file:
      serialized = file.read()
    model = json.loads(serialized)['model']['type']
  except OSError as error:
    raise errors.DamagedError(f'{path} cannot be read: {error.strerror}') from error
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise errors.DamagedError(f'{path} is not a tokenizer ({error})') from error
  if model == _BYTES_MODEL:
    return ByteTokenizer()
  if model != 'BPE':
    raise errors.DamagedError(f'{path} holds a tokenizer of the unknown type {model!r}')
  try:
    return BpeTokenizer(serialized)
  # The library raises nothing more special.
  except Exception as error:
    raise errors.DamagedError(f'{path} is not a tokenizer ({error})') from error
