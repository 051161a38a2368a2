"""The words of docstrings, comments and READMEs: those of the field, no private language.

`WORDS` is the table to extend; its patterns are whole words, in either case. Files are
read as text: nothing of the package is imported.
"""

import ast
import pathlib
import re

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SOURCES = sorted((REPOSITORY / 'moe_jax').rglob('*.py'))
# Docstrings of studies are questions, so those of `experiments` may open as they like.
OTHERS = sorted(path for name in ('configs', 'tests') for path in (REPOSITORY / name).rglob('*.py'))
READMES = sorted(
  path
  for path in REPOSITORY.rglob('README.md')
  if not {'.venv', 'runs', '.hypothesis'} & set(path.relative_to(REPOSITORY).parts)
)

# Words that a docstring does not open with: it opens with a verb or with the noun that it is about.
OPENERS = re.compile(r'(What|Whether|Who|How|Where|When|Which|Why|That)\b')

# Pattern of a word: the word to use.
WORDS = {
  'products|matrix products?': 'matmuls, grouped GEMM',
  'rooms?': 'section (of a config), package, or space',
  'knobs?': 'hyperparameters',
  'facts': 'metadata, manifest',
  'asks? for|asked for': 'selects, requests',
  'so many|so much': 'at most N, this many',
  'beside': 'next to, besides',
  'in place of': 'instead of',
  'anew': 'again',
  'mend(?:s|ed|ing)?': 'fix, repair',
  'whoever': 'the reader, the process',
  'strangers?': 'unknown',
  'culprits?': 'bad metric, largest field',
  'excuses?': 'reason',
  'restless': 'noisy',
  'void': 'invalid',
  'null arms?': 'A/A control',
}

# (file or folder, word): why the word is right there.
EXCEPTIONS = {
  ('moe_jax/benchmark', 'products'): 'the key of an arm in results that are kept',
  ('moe_jax/benchmark', 'void'): 'a key of rows in results that are kept',
  ('moe_jax/routing/routers/hierarchical.py', 'products'): 'of probabilities',
  ('moe_jax/routing/routers/group_limited.py', 'products'): 'of two shares',
  ('moe_jax/routing/routers/kmeans.py', 'products'): 'inner products of tokens and centroids',
  (
    'experiments/load_balance/README.md',
    'asked for',
  ): 'the question of a study, in its results too',
}


def bad_openers(name, text):
  """Yields a message for each docstring that opens with a word of `OPENERS`."""
  if not re.search(rf'"""{OPENERS.pattern}', text):  # Most files need no parser.
    return
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      opener = OPENERS.match(ast.get_docstring(node) or '')
      if opener:
        line = node.body[0].lineno
        yield f'{name}:{line}: {opener.group()!r}: open with a verb or a noun, as "Returns"'


def bad_words(name, text):
  """Yields (message, word as found, in lower case) for each word of `WORDS`."""
  for pattern, better in WORDS.items():
    # Two words may stand on two lines, of a comment as well.
    pattern = pattern.replace(' ', r'\s+(?:# )?')
    for found in re.finditer(rf'\b(?:{pattern})\b', text, re.IGNORECASE):
      line = text.count('\n', 0, found.start()) + 1
      word = ' '.join(found.group().replace('#', '').split())
      yield f'{name}:{line}: {word!r}: say {better}', word.lower()


def excepted(name, word):
  """Returns the exceptions that allow a word in a file."""
  return [
    (path, kept)
    for path, kept in EXCEPTIONS
    if kept == word and (name == path or name.startswith(f'{path}/'))
  ]


def relative(path):
  return path.relative_to(REPOSITORY).as_posix()


def test_docstrings_open_with_a_verb_or_a_noun():
  assert len(SOURCES) > 100
  messages = [
    message
    for path in (*SOURCES, *OTHERS)
    for message in bad_openers(relative(path), path.read_text('utf-8'))
  ]
  assert not messages, '\n'.join(messages)


def test_words_are_those_of_the_field():
  assert len(READMES) > 5
  messages, used = [], set()
  for path in (*SOURCES, *READMES):
    name = relative(path)
    for message, word in bad_words(name, path.read_text('utf-8')):
      allowed = excepted(name, word)
      used.update(allowed)
      messages += [] if allowed else [message]
  assert not messages, '\n'.join(messages)
  assert used == set(EXCEPTIONS), f'not needed any more: {sorted(set(EXCEPTIONS) - used)}'


def test_no_file_is_named_for_nothing():
  names = {'utils.py', 'util.py', 'common.py', 'misc.py', 'helpers.py'}
  folders = (REPOSITORY / name for name in ('moe_jax', 'configs', 'experiments', 'launch', 'tests'))
  found = [relative(path) for folder in folders for path in folder.rglob('*.py')]
  assert not [name for name in found if name.rpartition('/')[2] in names]


def test_control_planted_words_are_found():
  text = '"""What is asked\nfor."""\n\n\ndef f():\n  """Whether so."""\n'
  text += '  # Mended in\n  # place of it.\n'
  assert [message.partition(': open')[0] for message in bad_openers('a.py', text)] == [
    "a.py:1: 'What'",
    "a.py:6: 'Whether'",
  ]
  assert [message for message, _ in bad_words('a.py', text)] == [
    "a.py:1: 'asked for': say selects, requests",
    "a.py:7: 'in place of': say instead of",
    "a.py:7: 'Mended': say fix, repair",
  ]
  # In place, a mendicant, and a docstring about a whole.
  clean = '"""Whole. Adds in place; a mendicant, has_room, facts_of."""\n'
  assert not [*bad_openers('a.py', clean), *bad_words('a.py', clean)]


def test_control_an_exception_is_for_its_folder_and_word():
  assert excepted('moe_jax/benchmark/harness/peers.py', 'void')
  assert not excepted('moe_jax/benchmark/harness/peers.py', 'anew')
  assert not excepted('moe_jax/benchmarks.py', 'void')
