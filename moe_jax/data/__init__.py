"""The data package: from a name to batches of tokens.

    dataset = data.open_dataset('tier1', data_dir='runs/data')
    windows = dataset.windows('train', sequence_length=256)
    for batch in data.train_iterator(windows, batch_size=32, seed=0): ...

Knows texts, tokenizers and NumPy arrays; nothing of models, devices or configs.
"""

from moe_jax.data.baselines import compression_baselines
from moe_jax.data.dataset import Dataset
from moe_jax.data.documents import SPLITS, Document
from moe_jax.data.evaluation import EVALUATION_SPLIT, evaluation_dataset
from moe_jax.data.examine import Examined, examine
from moe_jax.data.iterators import eval_batches, train_iterator
from moe_jax.data.prepare import open_dataset, open_if_prepared
from moe_jax.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from moe_jax.data.windows import Example, PackedWindows

__all__ = [
  'EVALUATION_SPLIT',
  'SPLITS',
  'BpeTokenizer',
  'ByteTokenizer',
  'Dataset',
  'Document',
  'Examined',
  'Example',
  'PackedWindows',
  'Tokenizer',
  'compression_baselines',
  'eval_batches',
  'evaluation_dataset',
  'examine',
  'load_tokenizer',
  'open_dataset',
  'open_if_prepared',
  'train_iterator',
]
