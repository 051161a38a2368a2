"""Packages that moe_jax needs, and what to do where one of them is not installed.

Imports none of them, so that it can report what is missing.
"""

import sys

# What is imported, and the package of setup.cfg that it is of.
NEEDED = {
  'absl': 'absl-py',
  'array_record': 'array_record',
  'flax': 'flax',
  'grain': 'grain',
  'importlib_resources': 'importlib_resources',
  'jax': 'jax',
  'jaxtyping': 'jaxtyping',
  'matplotlib': 'matplotlib',
  'ml_collections': 'ml_collections',
  'numpy': 'numpy',
  'optax': 'optax',
  'orbax.checkpoint': 'orbax-checkpoint',
  'pandas': 'pandas',
  'scipy': 'scipy',
  'setuptools': 'setuptools',
  'tensorboardX': 'tensorboardX',
  'tensorflow_datasets': 'tensorflow-datasets',
  'tokenizers': 'tokenizers',
  'tqdm': 'tqdm',
  'yaml': 'pyyaml',
}


def missing(error: BaseException) -> str:
  """Returns which needed package is not installed and what to do; '' for every other error.

  A module of ours that is not there, or one that an installed package lacks, is another error.
  """
  name = error.name if isinstance(error, ModuleNotFoundError) else None
  for module, package in NEEDED.items():
    if name and (module == name or module.startswith(f'{name}.')):
      return (
        f'package={package!r}: not installed for {sys.executable}; use the environment of the '
        'project: source .venv/bin/activate (./launch/quickstart makes it), or add what is '
        'missing with: python -m pip install -e .'
      )
  return ''
