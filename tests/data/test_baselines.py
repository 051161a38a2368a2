"""The baselines are what `gzip -9` and `xz -9` would give."""

import gzip
import lzma

import pytest

from moe_jax import data

from . import conftest


def test_equal_the_whole_stream_compressed():
  texts = [conftest.prose(f'x{i}', 30).encode() for i in range(3)]
  whole = b''.join(texts)
  found = data.compression_baselines(iter(texts))
  assert found['gzip'] == 8 * len(gzip.compress(whole, 9)) / len(whole)
  assert found['xz'] == 8 * len(lzma.compress(whole, preset=9)) / len(whole)


def test_no_text():
  with pytest.raises(ValueError, match='no text'):
    data.compression_baselines([b''])
