"""Tokens on disk: flat arrays that are mapped into memory, and the checks that they are whole.

A store is one directory:

    meta.json               format, fingerprint, domains, size and SHA-256 of every other file, and
                            the SHA-256 of all of that
    tokenizer.json          what made the tokens
    SPLIT.tokens.npy        uint16 or uint32: [BOS] tokens [EOS] of one document after the other
    SPLIT.offsets.npy       int64[N + 1]: where document d starts and ends
    SPLIT.domains.npy       int32[N]: index into meta.json's domains
    SPLIT.bytes.npy         int64[N]: UTF-8 bytes of the text

Nothing in it depends on the sequence length. Stores written before meta.json had a digest of its
own are read, too: `TokenStore.has_digest` is False, and the names of domains and the fingerprint
are taken as they stand; that everything else fits together is checked.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import files
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.files import write_atomically

FORMAT = 1
META = 'meta.json'
_DIGEST = 'meta_sha256'
_ARRAYS = ('tokens', 'offsets', 'domains', 'bytes')
_FILES = frozenset(
  [tokenizer_lib.FILE]
  + [f'{split}.{kind}.npy' for split in documents_lib.SPLITS for kind in _ARRAYS]
)
# The keys of meta.json before it had a digest, with their types. More have come since.
_FIRST_KEYS = {
  'format': int,
  'identity': str,
  'fingerprint': str,
  'tokenizer_fingerprint': str,
  'domains': list,
  'num_skipped_short_documents': int,
  'provenance': dict,
  'files': dict,
}

# Larger files are checked only by size, so that opening a big dataset stays instantaneous.
_MAX_HASHED_BYTES = 2**28
_BATCH_CHARACTERS = 2**21


@dataclasses.dataclass(frozen=True)
class SplitTokens:
  """One split of a store.

  Attributes:
    domain_ids: per document, index into the dataset's domains.
    num_bytes: per document, UTF-8 bytes of its text.
    offsets: document d is `tokens[offsets[d]:offsets[d + 1]]`.
    tokens: all documents, one after the other, each [BOS] ... [EOS].
  """

  domain_ids: Int32[np.ndarray, 'N']
  num_bytes: Int64[np.ndarray, 'N']
  offsets: Int64[np.ndarray, 'N+1']
  tokens: UInt[np.ndarray, 'total']


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """An opened store.

  Attributes:
    meta: the content of meta.json.
    tokenizer: what made the tokens.
    splits: by name; 'train', 'valid' and 'test', each possibly without documents.
  """

  meta: dict[str, Any]
  tokenizer: tokenizer_lib.Tokenizer
  splits: dict[str, SplitTokens]

  @property
  def has_digest(self) -> bool:
    """False for a store whose meta.json was written before it had a digest of its own."""
    return _DIGEST in self.meta


class ShortDocumentError(ValueError):
  """A document has fewer than two tokens. Its message is the document's name."""


class SplitWriter:
  """Writes one split, document by document, in memory that does not grow with the text."""

  def __init__(
    self, directory: str, split: str, tokenizer: tokenizer_lib.Tokenizer, skip_short: bool
  ):
    self._directory = directory
    self._split = split
    self._tokenizer = tokenizer
    self._skip_short = skip_short
    self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    self._lengths: list[int] = []
    self._num_bytes: list[int] = []
    self.domains: list[str] = []
    self.num_skipped = 0

  def write(self, documents: Iterable[documents_lib.Document], digest: Any) -> None:
    """Encodes and writes all documents, and feeds them to a hashlib object.

    Raises:
      ShortDocumentError: if a document has fewer than two tokens and those are not skipped.
    """
    path = os.path.join(self._directory, f'{self._split}.tokens.npy')
    with open(path, 'wb') as file:
      self._write_header(file, 0)
      batch: list[documents_lib.Document] = []
      num_characters = 0
      for document in documents:
        for part in (self._split, document.domain, document.name, document.text):
          encoded = part.encode()
          digest.update(len(encoded).to_bytes(8, 'little') + encoded)
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
          self._write_batch(file, batch)
          batch, num_characters = [], 0
      self._write_batch(file, batch)
      file.seek(0)
      self._write_header(file, sum(self._lengths))

  def finish(self, domains: list[str]) -> None:
    """Writes the per-document arrays; `domains` are the dataset's, sorted."""
    index = {domain: i for i, domain in enumerate(domains)}
    offsets = np.zeros(len(self._lengths) + 1, np.int64)
    np.cumsum(self._lengths, out=offsets[1:])
    self._save('offsets', offsets)
    self._save('domains', np.array([index[domain] for domain in self.domains], np.int32))
    self._save('bytes', np.array(self._num_bytes, np.int64))

  def _save(self, kind: str, array: np.ndarray) -> None:
    np.save(os.path.join(self._directory, f'{self._split}.{kind}.npy'), array, allow_pickle=False)

  def _write_header(self, file: Any, length: int) -> None:
    # NumPy pads the header so that a later, longer first axis fits into the same bytes.
    header = {'descr': self._dtype.str, 'fortran_order': False, 'shape': (length,)}
    np.lib.format.write_array_header_1_0(file, header)

  def _write_batch(self, file: Any, batch: list[documents_lib.Document]) -> None:
    encoded = self._tokenizer.encode_batch([document.text for document in batch])
    for document, tokens in zip(batch, encoded, strict=True):
      if len(tokens) < 2:
        if not self._skip_short:
          raise ShortDocumentError(document.name)
        self.num_skipped += 1
        continue
      whole = np.empty(len(tokens) + 2, self._dtype)
      whole[0], whole[1:-1], whole[-1] = self._tokenizer.bos_id, tokens, self._tokenizer.eos_id
      file.write(whole.tobytes())
      self._lengths.append(len(whole))
      self._num_bytes.append(len(document.text.encode()))
      self.domains.append(document.domain)


def write(
  directory: str,
  documents: dict[str, Iterable[documents_lib.Document]],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  identity: str,
  provenance: dict[str, Any],
  kind: str = '',
  skip_short: bool = False,
) -> int:
  """Writes a whole store into an empty directory.

  Args:
    directory: where; the caller makes it appear atomically.
    documents: per split, its documents; read once.
    tokenizer: encodes them.
    identity: what the documents are said to be, part of the fingerprint.
    provenance: JSON-able metadata to keep in meta.json.
    kind: which tokenizer was requested; a small text may give one of fewer tokens.
    skip_short: leave out documents of fewer than two tokens instead of raising.

  Returns:
    The number of documents left out.

  Raises:
    ShortDocumentError: names a document of fewer than two tokens.
  """
  tokenizer.save(directory)
  digest = hashlib.sha256(f'{FORMAT};{identity};{tokenizer.fingerprint};'.encode())
  writers = []
  for split in documents_lib.SPLITS:
    writer = SplitWriter(directory, split, tokenizer, skip_short)
    writer.write(documents.get(split, ()), digest)
    writers.append(writer)
  domains = sorted({domain for writer in writers for domain in writer.domains})
  for writer in writers:
    writer.finish(domains)
  listing = {}
  for name in sorted(os.listdir(directory)):
    path = os.path.join(directory, name)
    listing[name] = {'size': os.path.getsize(path), 'sha256': files.sha256_file(path)}
  num_skipped = sum(writer.num_skipped for writer in writers)
  meta = {
    'format': FORMAT,
    'identity': identity,
    'fingerprint': digest.hexdigest(),
    'tokenizer_fingerprint': tokenizer.fingerprint,
    'domains': domains,
    'num_skipped_short_documents': num_skipped,
    'provenance': provenance,
    'files': listing,
    'vocab_size': tokenizer.vocab_size,
    'kind': kind,
  }
  meta[_DIGEST] = _meta_digest(meta)
  write_atomically(os.path.join(directory, META), json.dumps(meta, indent=1))
  return num_skipped


def open_store(directory: str) -> TokenStore:
  """Opens a store and checks that it is whole.

  Raises:
    FileNotFoundError: if there is no such directory.
    errors.DamagedError: if a file is missing, cut short or changed.
  """
  if not os.path.isdir(directory):
    raise FileNotFoundError(directory)
  try:
    with open(os.path.join(directory, META)) as file:
      meta = json.load(file)
    _check_meta(meta)
    for name, entry in meta['files'].items():
      path = os.path.join(directory, name)
      if os.path.getsize(path) != entry['size']:
        raise ValueError(f'{name} should have {entry["size"]} bytes')
      if entry['size'] <= _MAX_HASHED_BYTES and files.sha256_file(path) != entry['sha256']:
        raise ValueError(f'{name} has changed since it was written')
    splits = {split: _open_split(directory, split) for split in documents_lib.SPLITS}
    for name, split in splits.items():
      _check_split(name, split, len(meta['domains']))
  except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError) as error:
    raise errors.DamagedError(f'{directory} cannot be read: {error}') from error
  tokenizer = tokenizer_lib.load_tokenizer(directory)
  if tokenizer.fingerprint != meta['tokenizer_fingerprint']:
    raise errors.DamagedError(f'{directory} cannot be read: {META} is of another tokenizer')
  return TokenStore(meta, tokenizer, splits)


def _meta_digest(meta: dict[str, Any]) -> str:
  """Returns the SHA-256 over everything in meta.json but the digest itself."""
  rest = {key: value for key, value in meta.items() if key != _DIGEST}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_meta(meta: Any) -> None:
  """Raises ValueError if meta.json is not as it was written, as far as one can tell."""
  if not isinstance(meta, dict):
    raise ValueError(f'{META} is not an object')
  if meta.get('format') != FORMAT:
    raise ValueError(f'it has format {meta.get("format")}, not {FORMAT}')
  for key, kind in _FIRST_KEYS.items():
    if not isinstance(meta.get(key), kind):
      raise ValueError(f'{META} lacks {key}')
  if _DIGEST in meta:
    if meta[_DIGEST] != _meta_digest(meta):
      raise ValueError(f'{META} has changed since it was written')
  elif set(meta) != set(_FIRST_KEYS):
    raise ValueError(f'{META} lacks {_DIGEST}')
  domains = meta['domains']
  if not all(isinstance(d, str) for d in domains) or domains != sorted(set(domains)):
    raise ValueError(f'the domains in {META} are not in order')
  if set(meta['files']) != _FILES:
    raise ValueError(f'{META} does not list the files of a store')


def _check_split(name: str, split: SplitTokens, num_domains: int) -> None:
  """Raises ValueError if the arrays of a split don't fit together."""
  num_documents, offsets = len(split.domain_ids), split.offsets
  fits = (
    len(offsets) == num_documents + 1
    and len(split.num_bytes) == num_documents
    and offsets[0] == 0
    and offsets[-1] == len(split.tokens)
    and (np.diff(offsets) >= 2).all()
    and ((split.domain_ids >= 0) & (split.domain_ids < num_domains)).all()
  )
  if not fits:
    raise ValueError(f'the arrays of {name} do not fit together')


def _open_split(directory: str, split: str) -> SplitTokens:
  def load(kind: str, mmap_mode: Any = None) -> np.ndarray:
    path = os.path.join(directory, f'{split}.{kind}.npy')
    return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)

  offsets = load('offsets')
  # An empty file can't be mapped into memory.
  tokens = load('tokens', mmap_mode='r' if offsets[-1] else None)
  return SplitTokens(load('domains'), load('bytes'), offsets, tokens)
