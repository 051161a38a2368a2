"""Ordinary compressors on the same text: the baseline that a language model must beat."""

import lzma
import zlib
from collections.abc import Iterable

_GZIP_FORMAT = 31  # zlib's window bits: the largest window (15), plus 16 for gzip's header.


def compression_baselines(texts: Iterable[bytes]) -> dict[str, float]:
  """Compresses documents, one after the other as a single stream, with `gzip -9` and `xz -9`.

  Args:
    texts: the documents' UTF-8 bytes.

  Returns:
    Bits per byte of 'gzip' and 'xz'; the file headers count.

  Raises:
    ValueError: if there is no text.
  """
  gzip_compressor = zlib.compressobj(9, wbits=_GZIP_FORMAT)
  xz_compressor = lzma.LZMACompressor(preset=9)
  num_bytes = num_gzip = num_xz = 0
  for text in texts:
    num_bytes += len(text)
    num_gzip += len(gzip_compressor.compress(text))
    num_xz += len(xz_compressor.compress(text))
  if not num_bytes:
    raise ValueError('no text to compress')
  num_gzip += len(gzip_compressor.flush())
  num_xz += len(xz_compressor.flush())
  return {'gzip': 8 * num_gzip / num_bytes, 'xz': 8 * num_xz / num_bytes}
