"""Writes all that is generated again, after a meant change: python -m tests.golden.regenerate.

The text of every named config, the list of fields `configs/FIELDS.md`, and the table of routers in
`moe_jax/routing/README.md`.
"""

import pathlib
import re

from configs import debug, dense_matched, lm_small, quickstart
from moe_jax import config as config_lib
from moe_jax import routers

FOLDER = pathlib.Path(__file__).parent
FIELDS = FOLDER.parents[1] / 'configs' / 'FIELDS.md'
ROUTERS = FOLDER.parents[1] / 'moe_jax' / 'routing' / 'README.md'
_TABLE_OF_ROUTERS = re.compile(r'^\| router \|.*\n(\|.*\n)*', re.MULTILINE)
_INTRODUCTION = """# Every field

`--config.SECTION.NAME=VALUE` sets a field on the command line, `config.SECTION.update(NAME=VALUE)`
in a config file, `'SECTION.NAME'` in the arms of a study. Columns `debug` and `quickstart` show
where these two configs differ from the default. Fields that list routers are read by these alone.
"""


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
  """Returns one `section.field = value` per line, sorted."""
  lines = [
    f'{room}.{field} = {value!r}'
    for room, fields in config.to_dict().items()
    for field, value in fields.items()
  ]
  return '\n'.join(sorted(lines)) + '\n'


def fields_page():
  """Returns the text of configs/FIELDS.md."""
  shown = {'debug': debug.get_config(), 'quickstart': quickstart.get_config()}
  lines = [_INTRODUCTION.strip()]
  section = None
  for name, field in config_lib.fields().items():
    own_section, own_name = name.split('.')
    if own_section != section:
      section = own_section
      lines += [f'\n## {section}\n', '| field | default | debug | quickstart | meaning | allowed |']
      lines += ['|---|---|---|---|---|---|']
    values = [config[section][own_name] for config in shown.values()]
    differing = ['' if value == field['default'] else f'`{value!r}`' for value in values]
    allowed = field['allowed'].removeprefix('must be ')
    allowed = re.sub(rf'in (\d+)\.\.{2**31 - 1}', r'>= \1', allowed)
    cells = [f'`{own_name}`', f'`{field["default"]!r}`', *differing, field['meaning'], allowed]
    lines.append(f'| {" | ".join(cell.replace("|", "/") for cell in cells)} |')
  return '\n'.join(lines) + '\n'


def routers_page():
  """Returns the text of moe_jax/routing/README.md, with the table that the registry makes."""
  text = ROUTERS.read_text(encoding='utf-8')
  new, count = _TABLE_OF_ROUTERS.subn(lambda _: f'{routers.markdown()}\n', text)
  if count != 1:
    raise ValueError(f'{ROUTERS}: must have one table that begins with "| router |", has {count}')
  return new


def main():
  """Writes one file for each named config, the list of fields, and the table of routers."""
  FIELDS.write_text(fields_page(), encoding='utf-8')
  ROUTERS.write_text(routers_page(), encoding='utf-8')
  for path in FOLDER.glob('*.txt'):
    path.unlink()
  for name, config in named_configs().items():
    (FOLDER / f'{name}.txt').write_text(as_text(config), encoding='utf-8')


if __name__ == '__main__':
  main()
