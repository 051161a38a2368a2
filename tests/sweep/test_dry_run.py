"""Time of a sweep, worked out by hand, and what stands in its way."""

import dataclasses
import json

import pytest
import tqdm

from moe_jax.data import SPLITS
from moe_jax.errors import UserError
from moe_jax.run import setup
from moe_jax.study import Metric, Study, point, product
from moe_jax.sweep import dry_run, probe, runner, time_estimate, trials
from moe_jax.sweep.progress import Progress
from moe_jax.sweep.stopwatch import Pace, Stopwatch
from moe_jax.sweep.time_estimate import EVALUATION, TRAINING, Measured, Work
from moe_jax.train import accounting
from tests import tiny

RATE = 1e9


def test_seconds_by_flops():
  # Two trials of one program: 100 steps of 5e8 FLOPs, 10 batches of 1e8, at 1e9 FLOP/s.
  trial = [Work(TRAINING, 'a', 100, 5e8), Work(EVALUATION, 'b', 10, 1e8)]
  found = time_estimate.estimate([trial, trial], {}, RATE)
  assert found.seconds == {
    TRAINING: pytest.approx(2 * 100 * 0.5),
    EVALUATION: pytest.approx(2 * 10 * 0.1),
    # One program to train, one to evaluate.
    'compiling': 30 + 15,
    'starting': 2 * 5,
  }
  assert found.total == pytest.approx(100 + 2 + 45 + 10) and not found.unknown
  said = '200 steps of 2 trials, the time of a step from its FLOPs at 1.0e+09 FLOP/s'
  assert found.basis[TRAINING].startswith(said)
  assert '20 batches of 2 evaluations, the time of a batch from' in found.basis[EVALUATION]
  assert time_estimate.seconds_of(trial, {}, RATE) == pytest.approx(50 + 1)


def test_seconds_as_measured_and_of_programs_that_were_not():
  measured = {
    # The second and third found the program compiled.
    (TRAINING, 'a'): [Measured(20, 0.2, 5e8), Measured(2, 0.3, 5e8), Measured(3, 0.4, 5e8)],
    (EVALUATION, 'b'): [Measured(10, 0.1, 1e8), Measured(1, 0.1, 1e8)],
  }
  known = [Work(TRAINING, 'a', 100, 5e8), Work(EVALUATION, 'b', 10, 1e8)]
  # Of twice the FLOPs; half of its evaluation is as another program's.
  other = [Work(TRAINING, 'c', 100, 1e9), Work(EVALUATION, 'b', 10, 1e8)]
  found = time_estimate.estimate([known, other], measured, RATE)
  assert found.seconds == {
    TRAINING: pytest.approx(100 * 0.3 + 100 * 0.6),
    EVALUATION: pytest.approx(2 * 10 * 0.1),
    # As long as the longest set-up; that of `c` as that of `a`.
    'compiling': 20 + 10 + 20,
    'starting': 2 * (2 + 1),
  }
  said = 'as measured (1), as measured of other programs, in proportion to FLOPs (1)'
  assert found.basis[TRAINING].endswith(said)


def test_evaluation_of_data_that_is_not_prepared_is_not_counted():
  trial = [Work(TRAINING, 'a', 100, 5e8), Work(EVALUATION, 'b', None, 1e8)]
  found = time_estimate.estimate([trial], {}, RATE)
  assert found.seconds[EVALUATION] == 0 and EVALUATION not in found.basis
  assert 'evaluation' in found.unknown and '--probe' in found.unknown


def test_a_stopwatch_tells_set_up_from_steps():
  times = iter([10.0, 17.0, 19.5])
  watch = Stopwatch(lambda: next(times))
  seen = []
  count = watch.counting(seen.append)
  for step in (1, 2, 3):
    count(step)
  assert seen == [1, 2, 3]
  assert watch.seconds(2) == {'setup': 7.0, 'running': 2.5, 'steps': 3, 'together': 2}
  # What finished trials keep of it: 2 steps of 2 trials in 2.5 s, each 0.625 s of a trial.
  work = [Work(TRAINING, 'a', 3, 5e8), Work(EVALUATION, 'b', 3, 1e8)]
  seconds = {'training': {'setup': 7.0, 'running': 2.5, 'steps': 3, 'together': 2}}
  kept = time_estimate.measured_in(work, {'seconds': {**seconds, 'evaluation': {'dropless': {}}}})
  assert kept == {(TRAINING, 'a'): Measured(7.0, 0.625, 5e8)}
  assert time_estimate.measured_in(work, {}) == {}


def test_flops_count_empty_slots():
  """8 experts without drops compute 8 slots for each token that selects 2."""
  config = tiny.config({'moe.num_selected_experts': 2, 'moe.capacity_factor': 1.0})
  vocab = tiny.VOCAB_SIZE
  tight = accounting.computed_flops_per_token(config, vocab)
  # Capacity 16 tokens x 2 / 8 = 4; slots of a token 8 x 4 / 16 = 2, as many as are requested.
  assert tight == accounting.training_flops_per_token(config, vocab) / 3
  config.moe.capacity_factor = 4.0
  loose = accounting.computed_flops_per_token(config, vocab)
  # SwiGLU experts of 16 x 2 * 16 and 16 x 16 weights, 2 layers, 6 more slots for each token.
  assert loose - tight == 2 * 2 * 6 * (16 * 32 + 16 * 16)
  config.moe.dispatch = 'dropless'
  assert accounting.computed_flops_per_token(config, vocab) == tight


def make_study(text, **changes):
  arms = product({'moe.load_balancing_weight': (0, 0.01)})
  study = Study('test', 'does it?', tiny.config({'train.num_steps': 4, **text}), arms, (0,))
  return dataclasses.replace(study, **changes)


def problems(study, free=None):
  return [str(p) for p in dry_run.problems(study, trials.trials_of(study, free))]


def test_what_stands_in_the_way_is_said_of_each_kind(text, tmp_path):
  assert problems(make_study(text)) == []
  absent = make_study({**text, 'data.name': 'text:/nowhere'})
  assert problems(absent) == [
    "data.name='text:/nowhere': '/nowhere' does not exist; give a folder or a file of text"
  ]
  (found,) = problems(make_study(text), {'mesh.data': 4, 'mesh.expert': 4})
  assert found.startswith('mesh.data=4')
  (tmp_path / 'file').write_text('no folder')
  (found,) = problems(make_study({**text, 'data.data_dir': str(tmp_path / 'file' / 'data')}))
  assert found.startswith('data.data_dir=') and 'writable directory' in found
  # Nothing was made.
  assert [p.name for p in tmp_path.iterdir()] == ['file']
  metric = Metric('dropless/domains/drama/loss')
  (found,) = problems(make_study(text, metric=metric))
  assert found.startswith("study.metric='dropless/domains/drama/loss'") and 'prose, verse' in found


@pytest.fixture
def new_text(tmp_path):
  """A text that is not prepared, and config overrides that name it."""
  folder = tiny.write_text(tmp_path / 'new')
  changes = {'data.name': f'text:{folder}', 'data.data_dir': str(tmp_path / 'data')}
  return folder, changes


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('prose/0.txt', b'caf\xe9', '0.txt is not UTF-8 text (byte 3)'),
    ('prose/0.txt', b' ', '0.txt is empty'),
    ('verse/more.jsonl', b'{"text": 7}', 'more.jsonl:1 is not an object with a string "text"'),
  ],
)
def test_a_text_that_is_not_prepared_is_read(new_text, name, content, words):
  folder, changes = new_text
  (folder / name).write_bytes(content)
  (found,) = problems(make_study(changes))
  assert found.startswith("data.name='text:") and words in found
  assert not (folder.parent / 'data').exists()


@pytest.mark.parametrize(
  ('changes', 'more', 'words'),
  [
    ({'data.test_fraction': 0.0}, {}, "study.split='test': "),
    ({'data.valid_fraction': 0.0, 'train.eval_every': 2}, {}, 'train.eval_every=2: must be 0'),
    ({'data.valid_fraction': 0.0}, {'split': 'valid'}, "study.split='valid': "),
    ({}, {'metric': Metric('dropless/domains/drama/loss')}, 'it has prose, verse'),
    ({'data.name': 'tfds:moe_jax_no_such_name'}, {}, 'must be a name that TFDS knows'),
    ({'data.name': 'tfds:moe_jax_no_such_name/a:1.0.0'}, {}, 'must be a name that TFDS knows'),
  ],
)
def test_a_text_that_is_not_prepared_is_divided_as_it_will_be(new_text, changes, more, words):
  folder, given = new_text
  (found,) = problems(make_study({**given, **changes}, **more))
  assert words in found
  assert not (folder.parent / 'data').exists()
  if 'data.name' in changes:
    return
  # And so says the sweep, which prepares it.
  study = make_study({**given, **changes}, **more)
  with pytest.raises(UserError) as error:
    made = trials.trials_of(study)
    if 'eval_every' in words:
      setup.check_splits(made[0].config, setup.dataset_of(made[0].config))
    runner.run(study, made, str(folder.parent / 'sweep'), print)
  assert str(error.value) == found


def test_what_is_not_known_before_it_is_prepared_is_said(new_text, tmp_path):
  _, changes = new_text
  for name, words in (
    (changes['data.name'], 'was read, documents: 4 train, 4 valid, 4 test; its tokens are counted'),
    ('tier2', 'is fetched, and checked, when it is prepared'),
    ('tfds:mnist', 'is known to TFDS; what it holds is checked when it is prepared'),
  ):
    study = make_study({**changes, 'data.name': name})
    plan = dry_run.make_plan(study, trials.trials_of(study), None, probes=False)
    assert not plan.problems and plan.notes == [f'{name} {plan.notes[0].split(" ", 1)[1]}']
    assert words in plan.notes[0]
    assert f'not prepared  {plan.notes[0]}' in dry_run.text(plan)
    assert json.loads(dry_run.as_json(plan))['unprepared'] == plan.notes
  assert not (tmp_path / 'data').exists()
  config = tiny.config(changes)
  known, prepared = setup.examined_text_of(config), setup.dataset_of(config)
  assert known.domains == prepared.domains
  for split in SPLITS:
    for domain in (None, *prepared.domains):
      assert known.num_documents(split, domain) == prepared.num_documents(split, domain)


def test_a_sweep_without_any_data_is_refused_once(tmp_path):
  study = make_study({'data.name': 'text:/nowhere', 'data.data_dir': str(tmp_path / 'data')})
  with pytest.raises(UserError, match="data.name='text:/nowhere': .* does not exist"):
    runner.run(study, trials.trials_of(study), str(tmp_path / 'sweep'), print)
  assert not (tmp_path / 'sweep' / 'outcomes').exists()
  assert not list(tmp_path.rglob('logs'))


def test_time_is_one_sentence_that_leaves_out_only_what_is_not_known(text):
  study = make_study(text)
  # Too few devices: the data is there, and is looked at all the same.
  plan = dry_run.make_plan(
    study, trials.trials_of(study, {'mesh.data': 4, 'mesh.expert': 4}), None, probes=False
  )
  assert len(plan.problems) == 1 and not plan.unprepared and not plan.estimate.unknown
  said = dry_run.text(plan)
  sentence = next(line for line in said.splitlines() if line.startswith('On this machine'))
  assert 'the 2 trials left will take about ' in sentence and 'not included' not in sentence
  assert all(f's {part}' in sentence for part in (TRAINING, EVALUATION, 'compiling', 'starting'))
  # The error line says the first problem; the text repeats none of it.
  assert 'mesh.data' not in said
  new = make_study({**text, 'data.valid_fraction': 0.25})
  plan = dry_run.make_plan(new, trials.trials_of(new), None, probes=False)
  assert plan.unprepared
  said = dry_run.text(plan)
  assert 'at least' in said and 'not included: preparing the data' in said
  assert [dry_run.duration(x) for x in (0.2, 89.5, 90.0, 3599.0, 3900.0)] == [
    '1s', '90s', '2m', '1h00m', '1h05m'
  ]  # fmt: skip


def test_time_left_counts_evaluations_once_one_was_timed(tmp_path, capsys):
  study = make_study({'train.num_steps': 12})
  now = [0.0]
  todo = trials.trials_of(study)
  with Progress(study, todo, str(tmp_path), clock=lambda: now[0]) as progress:
    progress.begin(todo[0])
    progress.show_phase('')
    for step in range(1, 13):
      now[0] += 1
      progress.at(step)
    assert ' of training left,' in progress._text()
    with progress.evaluating() as show:
      now[0] += 40
      show('dropless, batch 3 of 9')
    assert 'evaluating: dropless, batch 3 of 9' in progress._text()
    assert 'evaluating: dropless, batch 3 of 9' in capsys.readouterr().err
    progress.end(todo[0])
    # Of the others each trains for 12 s and is evaluated for 40 s.
    seconds = (len(todo) - 1) * (12 + 40)
    assert f' about {tqdm.tqdm.format_interval(seconds)} left,' in progress._text()


def test_time_left_waits_for_a_step_that_does_not_compile():
  now = [0.0]
  pace = Pace(lambda: now[0])

  def step(seconds, cost=10.0):
    now[0] += seconds
    pace.step(cost)

  pace.begin()
  step(600)  # Compiles.
  step(0.1)  # Begun before the first ended.
  assert pace.left(100.0) is None
  step(2)
  assert pace.left(100.0) == pytest.approx(20)
  # Saving takes no time of training.
  pace.pause()
  now[0] += 50
  pace.resume()
  step(4)
  assert pace.left(100.0) == pytest.approx((2 + 4) / 20 * 100)
  # Nor does the start of the next trial, whose estimate is that of the steps before.
  now[0] += 30
  pace.pause()
  spent = pace.left(100.0)
  pace.begin()
  step(600)
  step(0.1)
  assert pace.left(100.0) == spent


def test_the_command_says_problems_last(text, tmp_path):
  study = make_study(text)
  base = study.base.to_dict() | {'data': study.base.data.to_dict() | {'name': 'text:/nowhere'}}
  path = tmp_path / 'study.py'
  path.write_text(
    'import ml_collections\nfrom moe_jax.study import Study, point\n\n\ndef get_study():\n'
    f'  base = ml_collections.ConfigDict({base!r})\n'
    "  return Study('s', 'Does it?', base, point('only', {}, label='o'), (0, 1))\n"
  )
  result = tiny.command('sweep', f'--study={path}', '--dry_run', '--json')
  result.assert_error("data.name='text:/nowhere'", 'does not exist')
  plan = json.loads(result.out)
  assert [row['label'] for row in plan['trials']] == ['o', 'o'] and len(plan['problems']) == 1
  assert plan['seconds']['total'] > 0 and 'evaluation' in plan['not_counted']
  tiny.command('sweep', f'--study={path}', '--json', '--workdir=w').assert_error(
    '--json', 'dry_run'
  )


def test_a_probe_measures_every_program_and_leaves_nothing(text, tmp_path, monkeypatch):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  study = make_study({**text, 'train.num_steps': 8}, evaluations=('dropless',))
  plan = dry_run.make_plan(study, trials.trials_of(study), None, probes=True)
  # Both arms are one program, which ran twice; so is their evaluation.
  measured = '16 steps of 2 trials, the time of a step as measured'
  assert plan.estimate.basis[TRAINING] == measured
  assert 'of 2 evaluations, the time of a batch as measured' in plan.estimate.basis[EVALUATION]
  assert '2 programs' in plan.estimate.basis['compiling'] and not plan.estimate.unknown
  assert not list(tmp_path.iterdir())
  text_ = dry_run.text(plan)
  assert '2 trials, 0 of them done' in text_ and 'not included' not in text_
  measured = probe.probe(study, trials.trials_of(study)[:1])
  assert all(len(many) == 2 and many[0].step > 0 for many in measured.values())


def test_a_point_needs_no_baseline(text):
  study = make_study(text, arms=point('one', {}))
  assert len(dry_run.make_plan(study, trials.trials_of(study), None, False).rows) == 1
