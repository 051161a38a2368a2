"""The paragraph on methods of a paper, and the entry that cites this software."""

import collections
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from moe_jax.errors import DamagedError, UserError
from moe_jax.field_names import field_value
from moe_jax.models.build import FAMILIES
from moe_jax.results import number_text, tables
from moe_jax.results.markup import break_latex, escape_latex
from moe_jax.results.statistics import LEVEL
from moe_jax.results.summary import SIGNIFICANCE, ArmSummary, Summary

# As in CITATION.cff, which is not installed with the package.
TITLE = 'moe_jax'
AUTHOR = 'The moe_jax maintainers'
VERSION = '0.1.0'
LICENSE = 'Apache-2.0'
CITATION = pathlib.Path(__file__).resolve().parents[2] / 'CITATION.cff'
# Digits of a commit in running text; the whole of it stands in the entry's own field.
_SHORT = 12


def methods(summary: Summary) -> str:
  """Returns a paragraph in LaTeX: models, data, seeds, statistics, commit.

  It states the fields of the config that all finished trials agree on, and names those that arms
  change.
  """
  sentences = [
    *_on_models(summary),
    *_on_training(summary),
    *_on_statistics(summary),
    *_on_provenance(summary),
  ]
  # Hashes and fields are long words for a narrow column.
  return f'{{\\emergencystretch=3em\n{break_latex(" ".join(sentences))}\\par}}\n'


def repository(citation: pathlib.Path = CITATION) -> str:
  """Returns the address of the source code: `repository-code` of CITATION.cff, '' without one.

  A fork sets it there. The file lies in a checkout, and not in an installed package.

  Raises:
    DamagedError: for a file that is no YAML mapping.
    UserError: for a value that is no address.
  """
  if not citation.is_file():
    return ''
  try:
    fields = yaml.safe_load(citation.read_text(encoding='utf-8'))
  except (UnicodeDecodeError, yaml.YAMLError) as error:
    raise DamagedError(f'{citation} is no YAML') from error
  if not isinstance(fields, dict):
    raise DamagedError(f'{citation} has no fields')
  url = fields.get('repository-code') or ''
  # What LaTeX and BibTeX would take for more than itself is written as %xx in an address.
  if url and not re.fullmatch(r'https?://[^\s{}\\"<>^`|]+', str(url)):
    raise UserError('repository-code', url, f'in {citation}: must be an address, as https://...')
  return str(url)


def bibtex(summary: Summary, url: str = '') -> str:
  """Returns an entry for this software at the commits that finished trials ran.

  Of type `misc`, which every BibTeX style knows; styles print the note, tools read the rest. Year
  and month are those of the last commit.

  Args:
    summary: of a study.
    url: of the software; the entry has none if it is ''.
  """
  of = summary.provenance
  dated = [
    f'{commit[:_SHORT]} ({of.dates[commit]})' if commit in of.dates else commit[:_SHORT]
    for commit in of.commits
  ]
  note = f'Version {VERSION}, Git {_count_noun("commit", dated)} {", ".join(dated) or "unknown"}'
  if of.dirty:
    note += ', with uncommitted changes'
  fields = {'author': f'{{{escape_latex(AUTHOR)}}}', 'title': f'{{{escape_latex(TITLE)}}}'}
  last = max(of.dates.values(), default='')
  if last:
    fields |= {'year': last[:4], 'month': str(int(last[5:7])), 'date': last}
  fields |= {'version': VERSION} | ({'url': url} if url else {})
  fields |= {'license': LICENSE, 'commit': ', '.join(of.commits) or 'unknown'}
  fields['note'] = break_latex(note)
  lines = [f'  {name} = {{{value}}},' for name, value in fields.items()]
  return '\n'.join([f'@misc{{{TITLE},', *lines, '}']) + '\n'


def _on_models(summary: Summary) -> list[str]:
  study, config = summary.study, summary.provenance.config
  run = [arm for arm in summary.arms if not arm.dropped]
  question = study.question if study.question.endswith(('?', '.')) else f'{study.question}.'
  sentences = [f'Study {study.name} ({len(run)} {_count_noun("arm", run)}): {question}']
  family = FAMILIES.get(config.get('model.family', ''))
  shape = _known(config, *family.shown) if family else ''
  sentence = f'All models are {family.plural}' if family else 'Models are of several families'
  sentence += f' with {shape}' if shape else ''
  total = _range(arm.parameters.get('total') for arm in run)
  active = _range(arm.parameters.get('active') for arm in run)
  if total and active:
    sentence += f'; they have {total} parameters, of which {active} are active for a token'
  sentences.append(f'{sentence}.')
  fields = _differing(summary, run)
  if fields:
    sentences.append(f'Arms differ in {", ".join(fields)}.')
  for arm, field in summary.provenance.not_causal.items():
    sentences.append(f'{arm} is not causal: a token can depend on later ones ({field}).')
  return sentences


def _differing(summary: Summary, run: Sequence[ArmSummary]) -> list[str]:
  """Returns the fields whose values differ between arms, that of the base where an arm has none."""

  def value(arm: ArmSummary, field: str) -> str:
    given = field in arm.changes
    return repr(arm.changes[field] if given else field_value(summary.study.base, field))

  fields = sorted({field for arm in run for field in arm.changes})
  return [field for field in fields if len({value(arm, field) for arm in run}) > 1]


def _on_training(summary: Summary) -> list[str]:
  config, data = summary.provenance.config, summary.provenance.data
  texts = ' and '.join(f'{d["name"]} (fingerprint {str(d["fingerprint"])[:16]})' for d in data)
  sentence = f'They are trained on {texts or "no data yet"}'
  sentence += f' as {config["data.tokenizer"]}' if 'data.tokenizer' in config else ''
  batch = _known(
    config,
    ('train.num_steps', '{} steps'),
    ('data.batch_size', '{} sequences a step'),
    ('data.sequence_length', '{} tokens a sequence'),
  )
  tokens = _range(arm.tokens for arm in summary.arms)
  sentence += f' for {batch}' if batch else ''
  sentences = [sentence + (f' ({tokens} tokens without padding).' if tokens else '.')]
  optimizer = _known(
    config,
    ('optim.name', '{}'),
    ('optim.learning_rate', 'peak learning rate {}'),
    ('optim.schedule', '{} schedule'),
    ('optim.warmup_steps', '{} steps of warm-up'),
    ('optim.weight_decay', 'weight decay {}'),
  )
  return sentences + ([f'Optimizer: {optimizer}.'] if optimizer else [])


def _on_statistics(summary: Summary) -> list[str]:
  study = summary.study
  seeds = ', '.join(str(seed) for seed in study.seeds)
  sentences = [
    f'Each arm is trained with {_count_noun("seed", study.seeds)} {seeds}, of initial values, data '
    'order and noise.',
    f'What decides is {tables.metric(summary)}, as the mean over seeds with the {LEVEL:.0%} '
    'interval of Student t.',
  ]
  if study.comparisons:
    sentences.append(
      f'{len(study.comparisons)} planned {_count_noun("comparison", study.comparisons)}: mean '
      'difference paired by seed, two-sided paired t-test, p-values adjusted by Holm, significant '
      f'below {SIGNIFICANCE}.'
    )
  by_status = collections.Counter(trial.status for arm in summary.arms for trial in arm.absent)
  if by_status:
    counts = ', '.join(f'{count} {status}' for status, count in by_status.items())
    num = by_status.total() + sum(len(arm.values) for arm in summary.arms)
    sentences.append(
      f'{by_status.total()} of {num} trials have no value and are in no mean ({counts}).'
    )
  return sentences


def _on_provenance(summary: Summary) -> list[str]:
  of = summary.provenance
  if not of.commits:
    return []
  commits = ', '.join(commit[:_SHORT] for commit in of.commits)
  sentence = f'Trials ran {TITLE} at {_count_noun("commit", of.commits)} {commits}'
  sentence += ' with uncommitted changes' if of.dirty else ''
  sentence += f', on {" and ".join(of.devices)}' if of.devices else ''
  if of.packs:
    sentence += f', {" or ".join(map(str, of.packs))} trials as one program'
  return [f'{sentence}.']


def _known(config: dict[str, Any], *fields: tuple[str, str]) -> str:
  """Returns the phrases of those fields that all trials agree on."""
  return ', '.join(phrase.format(config[name]) for name, phrase in fields if name in config)


def _range(values: Iterable[int | float | None]) -> str:
  known = [value for value in values if value is not None]
  texts = [number_text.count(number) for number in (min(known), max(known))] if known else []
  return ' to '.join(dict.fromkeys(texts))


def _count_noun(noun: str, things: Sequence[Any]) -> str:
  return noun if len(things) <= 1 else f'{noun}s'
