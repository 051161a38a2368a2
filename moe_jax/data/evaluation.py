"""Opens any text to evaluate a trained model on, with the tokenizer that the model has."""

import os

from moe_jax import errors
from moe_jax.data import dataset as dataset_lib
from moe_jax.data import prepare, sources
from moe_jax.data import tokenizer as tokenizer_lib

EVALUATION_SPLIT = sources.WHOLE


def evaluation_dataset(
  source: str, tokenizer: tokenizer_lib.Tokenizer, data_dir: str, *, field: str = '--data'
) -> dataset_lib.Dataset:
  """Opens a source as one split of all its documents, encoded by a given tokenizer.

  Nothing is held out and no tokenizer is trained. Domains are those of the source. The documents
  of every split that the source has stand in `EVALUATION_SPLIT` ('test'), one split after the
  other; 'train' and 'valid' are empty. So a tier's training texts count, too: for only its held-out
  works, open it with `prepare.open_dataset`. Bits per byte compare between tokenizers, loss per
  token does not.

  Prepared once per source and tokenizer, in `<data_dir>/tokens/SOURCE-whole/`; instantaneous from
  then on.

  Args:
    source: 'text:PATH', 'tier1', 'tier2' or 'tfds:NAME[/CONFIG][:VERSION]'; see `open_dataset`.
    tokenizer: of the trained run, for example `restore_run(...).tokenizer`.
    data_dir: where prepared data is kept.
    field: what the user set to `source`, for error messages.

  Example:
    dataset = evaluation_dataset('text:letters', run.tokenizer, 'runs/data')
    windows = dataset.windows(EVALUATION_SPLIT, sequence_length=256)

  Raises:
    errors.UserError: if there is no such source, its texts can't be obtained or read, or `data_dir`
      can't be written to; names the field.
    errors.DamagedError: if the prepared data is damaged and can't be made again.
  """
  data_dir = os.path.abspath(sources.expand('data.data_dir', data_dir, data_dir))
  try:
    found = sources.find_source(source, data_dir, None)
    kind = prepare.kind_of(tokenizer)
    return prepare.open_prepared(source, found, data_dir, kind, lambda read: tokenizer)
  except errors.UserError as error:
    if error.field != 'data.name':
      raise
    raise errors.UserError(field, error.value, error.allowed) from error
