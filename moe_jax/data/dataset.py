"""A prepared data set: what its splits hold, and rows of tokens to train and evaluate on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int64

from moe_jax import errors
from moe_jax.data import documents as documents_lib
from moe_jax.data import token_store
from moe_jax.data import tokenizer as tokenizer_lib
from moe_jax.data import windows as windows_lib


class Dataset:
  """Documents in three splits, tokenized, each with its domain. Made by `open_dataset`.

  Attributes:
    name: the user's `data.name`.
    fingerprint: SHA-256 over the texts, their splits and domains, and the tokenizer.
    tokenizer: what made the tokens.
    domains: sorted; `domain_ids` index into it.
    provenance: JSON-able metadata on where the texts come from.
  """

  def __init__(self, name: str, store: token_store.TokenStore):
    self.name = name
    self.fingerprint: str = store.meta['fingerprint']
    self.tokenizer: tokenizer_lib.Tokenizer = store.tokenizer
    self.domains: tuple[str, ...] = tuple(store.meta['domains'])
    self.provenance: dict[str, Any] = dict(store.meta['provenance'])
    self._splits = store.splits

  def num_documents(self, split: str, domain: str | None = None) -> int:
    """Returns how many documents a split holds, of one domain or all.

    Raises:
      errors.UserError: if there is no such split or domain; so for all methods.
    """
    return len(self._select(split, domain))

  def num_bytes(self, split: str, domain: str | None = None) -> int:
    """Returns the UTF-8 bytes of the texts."""
    return int(self._split(split).num_bytes[self._select(split, domain)].sum())

  def num_tokens(self, split: str, domain: str | None = None) -> int:
    """Returns the tokens to predict: those of the texts, and one EOS per document.

    It is the number of (input, target) pairs in the split's windows.
    """
    lengths = np.diff(self._split(split).offsets)[self._select(split, domain)]
    return int((lengths - 1).sum())

  def token_counts(self, split: str) -> Int64[np.ndarray, 'V']:
    """Returns how often each token of the vocabulary stands in the texts."""
    return np.bincount(self._split(split).tokens, minlength=self.tokenizer.vocab_size)

  def document_text(self, split: str, domain: str | None = None) -> Iterator[bytes]:
    """Returns the texts as UTF-8, document by document, in the order of the store."""
    tokens, documents = self._split(split), self._select(split, domain)
    return (
      self.tokenizer.decode(tokens.tokens[tokens.offsets[d] : tokens.offsets[d + 1]]).encode()
      for d in documents
    )

  def windows(
    self, split: str, sequence_length: int, domain: str | None = None
  ) -> windows_lib.PackedWindows:
    """Returns the split as rows of `sequence_length` token pairs.

    Raises:
      errors.UserError: if there is no such split or domain or no document in it, or the sequence
        length is below 1.
    """
    documents = self._select(split, domain)
    if not len(documents):
      whose = f'domain {domain!r} of {self.name}' if domain else self.name
      raise errors.UserError(
        'split',
        split,
        f'must be a split with documents; {whose} has none there (whole documents are held out, '
        'so a domain of one document has nothing to hold out)',
      )
    description = f'{self.fingerprint[:16]}, {split}, {domain or "all domains"}'
    return windows_lib.PackedWindows(
      self._split(split), documents, sequence_length, description=description
    )

  def _split(self, split: str) -> token_store.SplitTokens:
    if split not in self._splits:
      raise errors.UserError('split', split, f'must be one of {", ".join(documents_lib.SPLITS)}')
    return self._splits[split]

  def _select(self, split: str, domain: str | None) -> Int64[np.ndarray, 'N']:
    domain_ids = self._split(split).domain_ids
    if domain is None:
      return np.arange(len(domain_ids))
    if domain not in self.domains:
      raise errors.UserError('domain', domain, f'must be one of {", ".join(self.domains)}')
    return np.flatnonzero(domain_ids == self.domains.index(domain))
