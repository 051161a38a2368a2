"""A document, what makes two documents the same, and which split a document belongs to."""

import dataclasses
import hashlib
import re
import unicodedata

TRAIN, VALID, TEST = 'train', 'valid', 'test'
SPLITS = (TRAIN, VALID, TEST)

# A document may overshoot its split's share by this factor before a smaller one is preferred.
_MAX_OVERSHOOT = 2.0

# Characters that nothing shows, as soft hyphens, zero-width spaces and variation selectors: the
# property Default_Ignorable_Code_Point of Unicode 16.
_IGNORABLE = re.compile(
  '[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e'
  '\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3'
  '\U0001d173-\U0001d17a\U000e0000-\U000e0fff]'
)


@dataclasses.dataclass(frozen=True)
class Document:
  """One whole work: a play, a book, a speech, a file.

  Attributes:
    text: the text.
    domain: the kind of text it is, which evaluation reports apart.
    name: what a person calls it; unique in its dataset by convention, not by force.
  """

  text: str
  domain: str
  name: str


def folded(text: str) -> str:
  """Returns the text without differences of letter case, Unicode form or invisible characters.

  Compatibility caseless matching of identifiers (The Unicode Standard, section 3.13, D147),
  composed: 'Straße' and 'STRASSE' are equal, and so are a composed and a decomposed 'é', and a word
  with and without a soft hyphen.
  """
  text = _IGNORABLE.sub('', text)
  for form in ('NFD', 'NFKD'):
    text = unicodedata.normalize(form, text).casefold()
  return unicodedata.normalize('NFKC', text)


def is_text(string: str) -> bool:
  """True if a string can be written as UTF-8; one with half a surrogate pair cannot."""
  try:
    string.encode()
  except UnicodeEncodeError:
    return False
  return True


def content_key(text: str) -> str:
  """Returns a hash equal for texts that differ only in case, white space or what `folded` drops."""
  return hashlib.sha256(' '.join(folded(text).split()).encode()).hexdigest()


def assign_splits(
  keys: list[str], domains: list[str], num_bytes: list[int], valid_share: float, test_share: float
) -> list[str]:
  """Puts whole documents into splits, domain by domain, with the same result every time.

  Works are taken in the order of their content hash until the share of the domain's bytes is
  reached, so neither names nor the order of the files matter. Equal contents always go to the same
  split. A domain of one work only trains; a domain of two holds out one. A work that would make a
  split more than twice as large as requested is passed over while a smaller one exists.

  Args:
    keys: per document, `content_key` of its text.
    domains: per document, its domain.
    num_bytes: per document, its size in bytes.
    valid_share: share of each domain's bytes for validation, in [0, 1).
    test_share: the same for test.

  Returns:
    Per document, 'train', 'valid' or 'test'.
  """
  works: dict[str, dict[str, int]] = {}
  for key, domain, size in zip(keys, domains, num_bytes, strict=True):
    sizes = works.setdefault(domain, {})
    sizes[key] = sizes.get(key, 0) + size
  chosen: dict[tuple[str, str], str] = {}
  for domain, sizes in works.items():
    remaining = dict(sorted(sizes.items()))
    total = sum(remaining.values())
    # Test first: with two works only one can be held out, and the final number needs it most.
    num_reserved = 2 if valid_share > 0 and len(sizes) > 2 else 1
    for split, share in ((TEST, test_share), (VALID, valid_share)):
      for key in _take(remaining, share * total, num_reserved if split == TEST else 1):
        chosen[domain, key] = split
        del remaining[key]
  # A text that stands in two domains counts as one work, and is held out if either says so.
  by_key: dict[str, str] = {}
  for (_, key), split in chosen.items():
    by_key[key] = TEST if TEST in (split, by_key.get(key)) else split
  return [by_key.get(key, TRAIN) for key in keys]


def _take(sizes: dict[str, int], target: float, num_reserved: int) -> list[str]:
  """Picks keys in order until their sizes reach the target, and leaves `num_reserved`."""
  if target <= 0 or len(sizes) <= num_reserved:
    return []
  taken: list[str] = []
  total = 0
  for key, size in sizes.items():
    if total >= target or len(taken) == len(sizes) - num_reserved:
      break
    if total + size <= _MAX_OVERSHOOT * target:
      taken.append(key)
      total += size
  return taken or [min(sizes, key=lambda key: (sizes[key], key))]
