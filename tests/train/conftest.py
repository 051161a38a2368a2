"""What the tests of training share."""

import pytest

from tests import tiny


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """Config overrides of a prepared text."""
  return tiny.prepared_text(tmp_path_factory.getbasetemp())
