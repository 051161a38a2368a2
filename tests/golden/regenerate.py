"""Writes the golden texts anew, after a meant change: python -m tests.golden.regenerate."""

import pathlib

from configs import debug, dense_matched, lm_small, quickstart

FOLDER = pathlib.Path(__file__).parent


def named_configs():
  """Returns {name: config}; an argument of a config follows its name after a dot."""
  return {
    'debug': debug.get_config(),
    'quickstart': quickstart.get_config(),
    'lm_small': lm_small.get_config(),
    'dense_matched.debug': dense_matched.get_config('debug'),
    'dense_matched.quickstart': dense_matched.get_config('quickstart'),
    'dense_matched.lm_small': dense_matched.get_config('lm_small'),
  }


def as_text(config):
  """Returns one `room.field = value` per line, sorted."""
  lines = [
    f'{room}.{field} = {value!r}'
    for room, fields in config.to_dict().items()
    for field, value in fields.items()
  ]
  return '\n'.join(sorted(lines)) + '\n'


def main():
  """Writes one file for each named config."""
  for path in FOLDER.glob('*.txt'):
    path.unlink()
  for name, config in named_configs().items():
    (FOLDER / f'{name}.txt').write_text(as_text(config), encoding='utf-8')


if __name__ == '__main__':
  main()
